"""A network run with its skip connections or its MLPs taken out, layer by layer.

    norm first (Llama):  Y = s X + A(N_1 X),       X' = s Y + F(N_2 Y)
    norm last (BERT):    Y = N_1(s X + A(X)),      X' = N_2(s Y + F(Y))
    s = 1 with skips, 0 without; without MLPs X' = Y

The four arms of Dong, Cordonnier, Loukas (arXiv 2103.03404). Each attends to its own input. The network's
modules are called as they are and never changed, so other requests may run meanwhile. That a layer was taken
apart rightly is checked in numbers: the arm with skips and MLPs must give what the network itself gave.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kernels.api import attend, parse_params
from kernels.math.diagnostics_rank import rank_one_residual
from models.diagnose_told import Arm
from models.forward import offer_to_pause
from models.seam import NAME, LayerPlan, window_params

SAME = 1e-3
"""Largest deviation of the taken-apart network, relative to its largest number."""
ARMS: tuple[tuple[Any, bool, bool], ...] = (
    ("attention", False, False),
    ("attention+skip", True, False),
    ("attention+mlp", False, True),
    ("full", True, True),
)


class NotTakenApart(Exception):
    """Why the arms of a network cannot be run, in a sentence."""


@dataclass(frozen=True)
class Parts:
    """A layer's parts: attention with its output projection, MLP, and the two norms around them.
    ``attention`` is the module whose projections are asked for by name."""

    norm_first: bool
    norms: tuple[nn.Module, nn.Module]
    attend: Callable[..., Tensor]
    feed: Callable[[Tensor], Tensor]
    attention: nn.Module
    output: nn.Linear | None


@dataclass
class LayerCall:
    """What a layer was called with, and its hidden states before and after."""

    layer: nn.Module
    keywords: dict[str, Any]
    before: Tensor
    after: Tensor | None = None


class OnlyExact:
    """The forward keyword ``longreach`` of a short text alone: exact attention, or a layer's own window.
    Where ``probabilities`` is asked for, they are kept: [H, n, n] of the last call."""

    def __init__(self, plans: Sequence[LayerPlan], keep: bool = False) -> None:
        self.plans, self.keep = plans, keep
        self.next = 0
        self.probabilities: Tensor | None = None

    def attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        scale: float,
        extra: dict[str, Any],
    ) -> Tensor:
        plan = self.plans[self.next]
        self.next += 1
        offer_to_pause()
        if self.keep:
            marks = torch.eye(k.shape[2], dtype=v.dtype, device=v.device).expand(1, k.shape[1], -1, -1)
            self.probabilities = _exact(plan, q, k, marks, scale)[0]
        return _exact(plan, q, k, v, scale).transpose(1, 2).contiguous()


def _exact(plan: LayerPlan, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    name = "exact" if plan.window is None else "window"
    params = parse_params("exact") if plan.window is None else window_params(plan.window)
    return attend(q, k, v, backend=name, params=params, causal=plan.causal, scale=scale).out


_watched: ContextVar[Watch | None] = ContextVar("longreach_diagnosed", default=None)


@dataclass
class Watch:
    """Sees the layers of a network called, within one context alone: hooks on shared modules are met by
    other forwards too, those of other diagnoses among them, and do nothing there."""

    see: Callable[[LayerCall], None]
    calls: dict[int, LayerCall] = field(default_factory=dict)

    @contextmanager
    def on(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        token = _watched.set(self)
        handles = [layer.register_forward_pre_hook(self._before, with_kwargs=True) for layer in layers]
        handles += [layer.register_forward_hook(self._after) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            _watched.reset(token)

    def _before(self, layer: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if _watched.get() is self:
            bound = inspect.signature(layer.forward).bind(*args, **keywords).arguments
            more = bound.pop("kwargs", {})
            told = {**bound, **more}
            self.calls[id(layer)] = LayerCall(layer, told, told.pop("hidden_states"))

    def _after(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if _watched.get() is self:
            call = self.calls.pop(id(layer))
            call.after = output[0] if isinstance(output, tuple) else output
            self.see(call)


def stack_of(body: nn.Module, num_layers: int) -> Sequence[nn.Module] | None:
    """The body's layers in order: its list of as many modules as it calls attention; None where it has
    none."""
    lists = (m for m in body.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers)
    found = next(lists, None)
    return None if found is None else list(found)


def parts_of(layer: nn.Module) -> Parts:
    """NotTakenApart where the layer is of no known form."""
    names = {name for name, _ in layer.named_children()}
    if {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"} <= names:
        return _modern(layer, True, ("input_layernorm", "post_attention_layernorm"))
    if {"post_attention_layernorm", "self_attn", "post_mlp_layernorm", "mlp"} <= names:
        return _modern(layer, False, ("post_attention_layernorm", "post_mlp_layernorm"))
    if {"attention", "intermediate", "output"} <= names:
        return _bert(layer)
    raise NotTakenApart(f"layers of the form {type(layer).__name__} are not taken apart")


def _modern(layer: Any, norm_first: bool, norms: tuple[str, str]) -> Parts:
    output = getattr(layer.self_attn, "o_proj", None)

    def call(x: Tensor, keywords: dict[str, Any]) -> Tensor:
        found: Tensor = layer.self_attn(hidden_states=x, **keywords)[0]
        return found

    def feed(x: Tensor) -> Tensor:
        found = layer.mlp(x)
        fed: Tensor = found[0] if isinstance(found, tuple) else found
        return fed

    both = getattr(layer, norms[0]), getattr(layer, norms[1])
    return Parts(norm_first, both, call, feed, layer.self_attn, output)


def _bert(layer: Any) -> Parts:
    inner, beside, output = getattr(layer.attention, "self", None), layer.attention.output, layer.output
    if inner is None or not all(
        hasattr(part, "dense") and hasattr(part, "LayerNorm") for part in (beside, output)
    ):
        raise NotTakenApart(f"layers of the form {type(layer).__name__} are not taken apart")

    def call(x: Tensor, keywords: dict[str, Any]) -> Tensor:
        kept = {name: value for name, value in keywords.items() if not name.startswith("encoder_")}
        found: Tensor = beside.dense(inner(x, **kept)[0])
        return found

    def feed(x: Tensor) -> Tensor:
        found: Tensor = output.dense(layer.intermediate(x))
        return found

    return Parts(False, (beside.LayerNorm, output.LayerNorm), call, feed, inner, beside.dense)


@dataclass(frozen=True)
class Apart:
    """A network taken apart on one short text: its layers' parts, and what each was called with."""

    plans: tuple[LayerPlan, ...]
    parts: tuple[Parts, ...]
    calls: tuple[LayerCall, ...]

    def run(
        self, skip: bool, mlp: bool, see: Callable[[int, Tensor, OnlyExact], None], keep: bool = False
    ) -> Tensor:
        """What the last layer gives, [1, n, E]; ``see`` is told what every layer reads once it attended."""
        x, context = self.calls[0].before, OnlyExact(self.plans, keep)
        for index, (parts, call) in enumerate(zip(self.parts, self.calls, strict=True)):
            offer_to_pause()
            keywords = {**call.keywords, NAME: context}
            before, x = x, _attended(parts, x, keywords, skip)
            see(index, before, context)
            x = _fed(parts, x, skip) if mlp else x
        return x

    def arms(self) -> tuple[Arm, ...]:
        """NotTakenApart where the whole does not equal the network."""
        found = []
        for name, skip, mlp in ARMS:
            read: list[float] = []
            out = self.run(skip, mlp, partial(_note, read))
            found.append(Arm(name, (*read, _residual(out))))
        self._check(out)
        return tuple(found)

    def _check(self, out: Tensor) -> None:
        """``out`` of the arm with skips and MLPs."""
        wanted = self.calls[-1].after
        assert wanted is not None
        off = (out - wanted).abs().max() / wanted.abs().max()
        if not off <= SAME:
            name = type(self.calls[0].layer).__name__
            raise NotTakenApart(
                f"layers of the form {name} do more than attention, MLP, norms and skips: taken apart, "
                f"the network's output is {off:.2g} off"
            )


def _attended(parts: Parts, x: Tensor, keywords: dict[str, Any], skip: bool) -> Tensor:
    if parts.norm_first:
        added = parts.attend(parts.norms[0](x), keywords)
        return x + added if skip else added
    added = parts.attend(x, keywords)
    found: Tensor = parts.norms[0](x + added if skip else added)
    return found


def _fed(parts: Parts, x: Tensor, skip: bool) -> Tensor:
    if parts.norm_first:
        added = parts.feed(parts.norms[1](x))
        return x + added if skip else added
    added = parts.feed(x)
    found: Tensor = parts.norms[1](x + added if skip else added)
    return found


def _note(residuals: list[float], index: int, x: Tensor, context: OnlyExact) -> None:
    residuals.append(_residual(x))


def _residual(x: Tensor) -> float:
    return rank_one_residual(x[0]).item()
