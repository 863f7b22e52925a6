"""What the papers talk about, of one text in one network: entropy, support mass, ranks, rank collapse, paths,
and the attention that each head would bear.

One forward of exact attention, in which every diagnosed layer is looked at as it attends and forgotten: what
is held at once is one layer's queries, keys and values, not the network's. Then the arms on the text's first
tokens. All of it has yield points, so a server may leave it and go on later; modules are called as they are,
never changed. Call it in inference mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kernels.math.diagnostics import sample_positions
from kernels.math.diagnostics_rank import rank_one_residual
from models.contract import Choice
from models.diagnose_arms import Apart, LayerCall, NotTakenApart, OnlyExact, Watch, parts_of, stack_of
from models.diagnose_heads import Heads, figures_of, mean_errors, pooled
from models.diagnose_paths import paths_of, refusal
from models.diagnose_regime import candidates_of, recommend, regime_of
from models.diagnose_told import (
    MAX_ARM_TOKENS,
    MAX_TOKENS,
    Arm,
    Asked,
    Diagnosis,
    LayerFigures,
    Paths,
    RankCollapse,
)
from models.errors import NonFiniteOutput, all_finite
from models.forward import offer_to_pause
from models.network import Network
from models.rotary import sequence_lengths
from models.seam import NAME

__all__ = ["MAX_ARM_TOKENS", "MAX_TOKENS", "diagnose", "predicted_flops"]


class _Looking:
    """The forward keyword ``longreach``: attends exactly, and looks at the wanted layers."""

    def __init__(self, network: Network, asked: Asked, choices: list[Choice]) -> None:
        self._network, self._asked, self._choices = network, asked, choices
        self._next = 0
        self.found: list[LayerFigures] = []

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
        number = self._next
        self._next += 1
        plan = self._network.plan.layers[number]
        learned = {} if plan.window is not None else self._network.learned
        of_layer = {backend: layers[plan.ordinal] for backend, layers in learned.items()}
        heads = Heads(number, plan, q, k, v, scale, of_layer)
        out = heads.exact.out
        if number in self._asked.layers:
            if not all(map(all_finite, (q, k, v))):
                raise NonFiniteOutput(0, f"queries, keys or values of layer {number}")
            self.found.append(figures_of(heads, self._asked, self._choices))
        return out.transpose(1, 2).contiguous()


def diagnose(
    network: Network, token_ids: Sequence[int], asked: Asked, able: Callable[[Choice], bool]
) -> Diagnosis:
    """Read ``token_ids`` and say what was seen. ``able``: whether the model can run a choice. ValueError
    beyond MAX_TOKENS, or for layers to which no choice applies."""
    _check(network, token_ids, asked)
    looking = _Looking(network, asked, candidates_of(asked, able))
    residuals: list[float] = []

    def see(call: LayerCall) -> None:
        offer_to_pause()
        residuals.append(_residual(call.before))
        if len(residuals) == len(network.plan.layers) and call.after is not None:
            residuals.append(_residual(call.after))

    stack = stack_of(network.body, len(network.plan.layers))
    _read(network, token_ids, looking, see, stack)
    return _told(network, token_ids, asked, looking.found, residuals if stack else None)


def predicted_flops(network: Network, tokens: int, asked: Asked) -> float:
    """About what a diagnosis computes: the forward, exact attention some six times over in each diagnosed
    layer, sampled rows and ranks, and the arms with their paths."""
    layers, n = len(network.plan.layers), tokens
    plan = network.plan.layers[0]
    pairs = n * n / (2 if plan.causal else 1)
    attention = plan.num_heads * pairs * plan.flops_per_pair * (layers + 6 * len(asked.layers))
    rows = min(asked.rows, n) * n * plan.num_heads * (4 * plan.shape.key_dim + 4 * asked.budget)
    ranks = 8 * n * plan.num_heads * plan.shape.key_dim**2
    arms = 8 * network.linear_params * min(asked.arm_tokens, n) * (1 + layers / 8)
    return 2 * network.linear_params * n + attention + (rows + ranks) * len(asked.layers) + arms


def _check(network: Network, token_ids: Sequence[int], asked: Asked) -> None:
    if not 1 <= len(token_ids) <= MAX_TOKENS:
        raise ValueError(f"{len(token_ids):,} tokens; a diagnosis reads 1 to {MAX_TOKENS:,}")
    unknown = sorted(set(asked.layers) - set(network.plan.applied_layers))
    if unknown or not asked.layers:
        known = ", ".join(map(str, network.plan.applied_layers))
        raise ValueError(f"layers {unknown or '[]'}: attention can be chosen in layers {known or 'none'}")
    if not 0 <= asked.arm_tokens <= MAX_ARM_TOKENS:
        raise ValueError(f"arm_tokens is {asked.arm_tokens}; it lies in 0 .. {MAX_ARM_TOKENS}")


def _read(
    network: Network,
    token_ids: Sequence[int],
    context: object,
    see: Callable[[LayerCall], None],
    stack: Sequence[nn.Module] | None,
) -> None:
    """One forward of a whole text; ``see`` is told every call of a layer."""
    ids = torch.tensor(list(token_ids), dtype=torch.int64, device=network.device)
    positions = torch.arange(len(ids), device=network.device)
    lengths = torch.full_like(positions, len(ids))
    with sequence_lengths(lengths[None]), Watch(see).on(stack or ()):
        output = network.body(
            input_ids=ids[None],
            position_ids=positions[None] + network.plan.position_offset,
            **{NAME: context},
            **network.arguments,
        )
    if not all_finite(output[0]):
        raise NonFiniteOutput(0, "hidden states")


def _told(
    network: Network,
    token_ids: Sequence[int],
    asked: Asked,
    found: list[LayerFigures],
    residuals: list[float] | None,
) -> Diagnosis:
    errors = mean_errors([layer.errors for layer in found])
    regime, measured = regime_of(errors, asked.tolerance), pooled(found)
    spec, reason = recommend(regime, measured, [each.kept_mass for each in measured], asked)
    return Diagnosis(
        tokens=len(token_ids),
        rows=tuple(sample_positions(len(token_ids), asked.rows, asked.seed).tolist()),
        layers=tuple(found),
        rank_collapse=_collapse(network, token_ids[: asked.arm_tokens], residuals),
        errors=errors,
        regime=regime,
        recommended=spec,
        reason=reason,
    )


def _collapse(network: Network, first: Sequence[int], residuals: list[float] | None) -> RankCollapse:
    arms, no_arms, paths, no_paths = _arms(network, first)
    return RankCollapse(
        residuals=None if residuals is None else tuple(residuals),
        residual_floor=torch.finfo(network.body.dtype).eps,
        arm_tokens=len(first),
        arms=arms,
        arms_reason=no_arms,
        paths=paths,
        paths_reason=no_paths,
    )


def _arms(
    network: Network, first: Sequence[int]
) -> tuple[tuple[Arm, ...] | None, str | None, Paths | None, str | None]:
    """Arms and paths, each with why there are none."""
    if not first:
        return None, "arm_tokens is 0", None, "arm_tokens is 0"
    try:
        apart = _take_apart(network, first)
        arms = apart.arms()
    except NotTakenApart as error:
        return None, str(error), None, str(error)
    plans, width = network.plan.layers, network.sizes.hidden_size
    reason = refusal(len(plans), plans[0].num_heads, len(first), width)
    if reason is not None:
        return arms, None, None, reason
    try:
        return arms, None, paths_of(apart), None
    except NotTakenApart as error:
        return arms, None, None, str(error)


def _take_apart(network: Network, token_ids: Sequence[int]) -> Apart:
    plans = network.plan.layers
    stack = stack_of(network.body, len(plans))
    if stack is None:
        raise NotTakenApart(f"{type(network.body).__name__} has no list of as many layers as it attends in")
    parts = tuple(parts_of(layer) for layer in stack)
    calls: list[LayerCall] = []
    _read(network, token_ids, OnlyExact(plans), calls.append, stack)
    return Apart(plans, parts, tuple(calls))


def _residual(x: Tensor) -> float:
    return rank_one_residual(x[0]).item()
