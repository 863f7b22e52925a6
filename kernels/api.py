"""The front door of ``kernels``: one call for one attention, one for many sequences packed side by side.

Letters as in ``kernels.contract``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from functools import cache, partial
from itertools import pairwise
from reprlib import Repr
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from kernels.contract import (
    AttentionResult,
    Backend,
    Call,
    Capabilities,
    Execute,
    Impl,
    PackedResult,
    Params,
    Segment,
    Stats,
    Unsupported,
)
from kernels.parallel import run_spread
from kernels.registry import BACKENDS, load

MAX_SEED = 2**63 - 1
GRAPH_TOKENS = 1024
MAX_ECHO = 200
"""Characters of what was given that a refusal repeats."""
MAX_PROBLEMS = 5
"""Problems that a refusal tells; how many more there are is counted."""
_NOT_RUN = Stats(0, 0, 0, 0.0, 0.0, "")
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class InvalidParams(ValueError):
    """A backend's params were refused; ``problems`` holds (field, what is wrong) pairs, "" for the whole."""

    def __init__(self, backend: str, problems: Sequence[tuple[str, str]]) -> None:
        self.backend = backend
        self.problems = tuple(problems)
        told = "; ".join(f"{field}: {text}" if field else text for field, text in problems[:MAX_PROBLEMS])
        if len(problems) > MAX_PROBLEMS:
            told += f"; and {len(problems) - MAX_PROBLEMS} more"
        super().__init__(f"params of attention backend {backend!r} are invalid: {told}")


def backend_names() -> tuple[str, ...]:
    """The names of all backends, in registry order. Imports none of them."""
    return tuple(BACKENDS)


def describe(name: str, *, graph: bool = True) -> dict[str, Any]:
    """Backend ``name`` as plain JSON values: summary, paper, conditions, params schema, defaults,
    capabilities, and ``graph``: what ``kernels.conditions`` finds at the defaults and GRAPH_TOKENS tokens in
    each direction, null where the backend has none; null as a whole where the backend has no mask
    (``kernels.conditions.why_no_mask``). That is computed once, on first use, in about a tenth of a second
    per direction; ``graph`` False leaves it out.

    Raises UnknownBackend, which lists the known names.
    """
    backend = load(name)
    capabilities = asdict(backend.capabilities)
    capabilities["impls"] = list(backend.impls)
    told = {
        "name": backend.name,
        "summary": backend.summary,
        "paper": backend.paper,
        "conditions": backend.conditions,
        "params_schema": backend.params.model_json_schema(),
        "defaults": backend.params().model_dump(mode="json"),
        "capabilities": capabilities,
    }
    return told | {"graph": deepcopy(_graph(name))} if graph else told


@cache
def _graph(name: str) -> dict[str, Any] | None:
    from kernels.conditions import conditions, directions, why_no_mask

    if why_no_mask(name) is not None:
        return None
    defaults = load(name).params()
    found = {
        direction: conditions(name, defaults, num_tokens=GRAPH_TOKENS, causal=causal).as_json()
        for direction, causal in directions(name, defaults).items()
    }
    return {"num_tokens": GRAPH_TOKENS, "bidirectional": None, "causal": None} | found


def parse_params(backend: str, params: Mapping[str, Any] | Params | None = None) -> Params:
    """``params`` of a backend, checked: None gives the defaults, a mapping is validated, an instance passes.

    Raises InvalidParams naming every field and its bound; UnknownBackend for a name that is not registered.
    """
    return _parse(load(backend), params)


def too_many(fields: Collection[str], given: Mapping[Any, Any]) -> str | None:
    """Why a mapping of params is refused unread: it holds so many that most cannot be known; else None."""
    if len(given) <= len(fields) + MAX_PROBLEMS:
        return None
    return f"{len(given):,} parameters were given, but there are only {len(fields)}: {_known(fields)}"


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    backend: str,
    params: Mapping[str, Any] | Params | None = None,
    causal: bool,
    scale: float,
    seed: int = 0,
    layer: int = 0,
    start: int | None = None,
    impl: Impl = "auto",
    learned: object | None = None,
) -> AttentionResult:
    """Attention of queries at positions ``start .. start+N-1`` over keys at ``0 .. M-1``.

    q [B, H, N, D], k [B, Hk, M, D], v [B, Hk, M, Dv] -> out [B, H, N, Dv] in q's dtype, lse [B, H, N] fp32
    (None where the backend approximates). ``start`` defaults to M - N. ``learned``: the layer's own
    parameters for a backend that needs them. Accumulates in fp32 (fp64 for fp64 inputs).

    Raises UnknownBackend, InvalidParams, ValueError (shapes and ranges) and Unsupported (capabilities).
    """
    method = load(backend)
    knobs = _parse(method, params)
    start = k.shape[-2] - q.shape[-2] if start is None else start
    _check_tensors(q, k, v, start)
    chosen = chosen_impl(method, q, v, impl)
    call = Call(causal, scale, seed, layer, start, learned=learned, impl=chosen)
    _check_call(call)
    execute = _executable(method, knobs, call, q, v)
    with torch.no_grad():
        return execute(_rows_dense(q), _rows_dense(k), _rows_dense(v), knobs, call)


def attend_packed(
    q: Tensor,
    segments: Sequence[Segment],
    *,
    backend: str,
    params: Mapping[str, Any] | Params | None = None,
    causal: bool,
    scale: float,
    layer: int = 0,
    impl: Impl = "auto",
    learned: object | None = None,
) -> PackedResult:
    """Many sequences of unequal length in one call, each over its own keys: q [1, H, T, D] -> out [1, H, T,
    Dv].

    Every row of T must belong to exactly one segment. Each segment's rows equal ``attend`` on it alone.
    Raises what ``attend`` raises; a ValueError names the segment.
    """
    method = load(backend)
    knobs = _parse(method, params)
    bounds = _check_segments(q, segments)
    chosen = chosen_impl(method, q, segments[0].v, impl)
    call = Call(causal, scale, 0, layer, 0, learned=learned, impl=chosen)
    _check_call(call)
    execute = _executable(method, knobs, call, q, segments[0].v)
    work = _Packed(_rows_dense(q), [_dense_segment(segment) for segment in segments], bounds, call)
    alone: Sequence[int] = range(len(segments))
    with torch.no_grad():
        if method.decode is not None and causal and call.impl != "reference":
            alone = work.decode(partial(method.decode, params=knobs, call=call))
        if method.prefill is not None and call.impl == "triton":
            alone = work.prefill(alone, partial(method.prefill, params=knobs, call=call))
        for number in alone:
            work.run(number, partial(execute, params=knobs))
    return PackedResult(work.out, tuple(work.stats), tuple(work.dropped))


class _Packed:
    """A packed call while it is worked off: what has been written, and what each segment's call said.

    The rows of ``out`` lie head by head next to each other in memory, which is how networks go on with
    them."""

    def __init__(
        self, q: Tensor, segments: Sequence[Segment], bounds: Sequence[tuple[int, int]], call: Call
    ) -> None:
        self.q, self.segments, self.bounds, self.call = q, segments, bounds, call
        _, num_heads, num_rows, _ = q.shape
        self.out = q.new_empty(1, num_rows, num_heads, segments[0].v.shape[-1]).transpose(1, 2)
        self.stats: list[Stats] = [_NOT_RUN] * len(segments)
        self.dropped: list[Tensor | None] = [None] * len(segments)

    def run(self, number: int, execute: Callable[..., AttentionResult]) -> None:
        """One segment, by a call of its own."""
        segment, rows = self.segments[number], slice(*self.bounds[number])
        result = execute(self.q[:, :, rows], segment.k, segment.v, call=_own_call(self.call, segment))
        self.out[:, :, rows] = result.out
        self.stats[number], self.dropped[number] = result.stats, result.dropped

    def decode(self, execute: Callable[[Tensor, Sequence[Segment]], PackedResult | None]) -> Sequence[int]:
        """All segments of one row together, where that can be; the numbers of those that are left."""
        numbers = [n for n, (first, stop) in enumerate(self.bounds) if stop == first + 1]
        own = [self.segments[n] for n in numbers]
        everything = range(len(self.segments))
        if not own or any(segment.k.shape[1] != own[0].k.shape[1] for segment in own):
            return everything
        rows = self._rows([self.bounds[n][0] for n in numbers])
        result = execute(self.q[:, :, rows], own)
        if result is None:
            return everything
        if len(numbers) == self.q.shape[2] and isinstance(rows, slice):
            self.out = result.out
        else:
            self.out[:, :, rows] = result.out
        for n, stats, dropped in zip(numbers, result.stats, result.dropped, strict=True):
            self.stats[n], self.dropped[n] = stats, dropped
        decoded = set(numbers)
        return [n for n in everything if n not in decoded]

    def prefill(
        self, numbers: Sequence[int], execute: Callable[[Tensor, Sequence[Segment]], PackedResult | None]
    ) -> Sequence[int]:
        """Those segments in one launch, where that can be; the numbers of those that are left."""
        if len(numbers) < 2:
            return numbers
        own = [replace(self.segments[n], rows=slice(*self.bounds[n])) for n in numbers]
        result = execute(self.q, own)
        if result is None:
            return numbers
        if len(numbers) == len(self.segments):
            self.out = result.out
        else:
            for n in numbers:
                rows = slice(*self.bounds[n])
                self.out[:, :, rows] = result.out[:, :, rows]
        for n, stats, dropped in zip(numbers, result.stats, result.dropped, strict=True):
            self.stats[n], self.dropped[n] = stats, dropped
        return []

    def _rows(self, places: Sequence[int]) -> slice | Tensor:
        """A slice where the rows follow each other."""
        first, last = places[0], places[-1]
        if list(places) == list(range(first, last + 1)):
            return slice(first, last + 1)
        return torch.tensor(places).to(self.q.device, non_blocking=True)


def _own_call(call: Call, segment: Segment) -> Call:
    return Call(
        causal=call.causal,
        scale=call.scale,
        seed=segment.seed,
        layer=call.layer,
        start=segment.start,
        summaries=segment.summaries,
        kept=segment.kept,
        learned=call.learned,
        impl=call.impl,
    )


def _parse(backend: Backend, params: Mapping[str, Any] | Params | None) -> Params:
    if isinstance(params, backend.params):
        return params
    if isinstance(params, Params):
        raise InvalidParams(
            backend.name, [("", f"expected {backend.params.__name__}, got {type(params).__name__}")]
        )
    if params is not None and not isinstance(params, Mapping):
        raise InvalidParams(backend.name, [("", f"expected a mapping, got {type(params).__name__}")])
    refusal = too_many(backend.params.model_fields, params or {})
    if refusal is not None:
        raise InvalidParams(backend.name, [("", refusal)])
    try:
        return backend.params.model_validate(dict(params or {}))
    except ValidationError as error:
        raise InvalidParams(backend.name, [_problem(backend, e) for e in error.errors()]) from None


def _problem(backend: Backend, error: Any) -> tuple[str, str]:
    field = _cut(".".join(str(part) for part in error["loc"]))
    if error["type"] == "extra_forbidden":
        return field, no_such(backend.params.model_fields)
    if error["type"] in ("value_error", "assertion_error"):  # a rule over several, which names them
        return field, str(error["ctx"]["error"])
    whole = not field or isinstance(error["input"], Mapping)
    got = "" if error["type"] == "missing" or whole else f" (got {_told(error['input'])})"
    return field, error["msg"] + got


def no_such(fields: Collection[str]) -> str:
    """What is said of a name that is not among the params."""
    return f"no such parameter; there are: {_known(fields)}"


def _known(fields: Collection[str]) -> str:
    return ", ".join(fields) or "none"


def _told(value: Any) -> str:
    """What was given, in a few words, whatever its size or depth."""
    short = Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlong = 3, 80, 80, 40
    try:
        return _cut(short.repr(value))
    except (ValueError, RecursionError):  # an integer of too many digits
        return f"a value of type {type(value).__name__}"


def _cut(text: str) -> str:
    return text if len(text) <= MAX_ECHO else f"{text[:MAX_ECHO]} ..."


def chosen_impl(backend: Backend, q: Tensor, v: Tensor, impl: Impl) -> str:
    """The impl that a call of these tensors gets: what was asked for, or under ``auto`` triton on a CUDA
    device where its kernels can run the call, else torch."""
    if impl != "auto":
        return impl
    return "triton" if q.is_cuda and not _why_no_triton(backend, q, v) else "torch"


def why_no_impl(name: str, impl: Impl, device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Reasons why a backend cannot run by this impl on tensors of a device and dtype; [] where it can.
    ``head_dim`` is the widest of keys and values. Raises UnknownBackend."""
    backend = load(name)
    if impl == "triton" and impl in backend.impls:
        from kernels._triton.available import why_not_there

        return why_not_there(device, dtype, head_dim)
    return [] if impl == "auto" or impl in backend.impls else [_no_impl(backend, impl)]


def _why_no_triton(backend: Backend, q: Tensor, v: Tensor) -> list[str]:
    return why_no_impl(backend.name, "triton", q.device, q.dtype, max(q.shape[-1], v.shape[-1]))


def _no_impl(backend: Backend, impl: str) -> str:
    return f"it has no impl {impl!r}, only {', '.join(backend.impls)}"


def _executable(backend: Backend, params: Params, call: Call, q: Tensor, v: Tensor) -> Execute:
    """The impl that will run, or Unsupported with every reason."""
    reasons: list[str] = []
    able, causal, chosen = backend.capabilities, call.causal, call.impl
    if causal and not able.causal:
        reasons.append("it has no causal form")
    if not causal and not able.bidirectional:
        reasons.append("it has no bidirectional form")
    if chosen == "triton":
        reasons += _why_no_triton(backend, q, v)
    elif chosen not in backend.impls:
        reasons.append(_no_impl(backend, chosen))
    if able.learned and call.learned is None:
        reasons.append("it needs parameters that a model must carry for it, and none were given")
    reasons += backend.unsupported(params, causal)
    if reasons:
        raise Unsupported(backend.name, reasons)
    execute = backend.impls[chosen]
    return partial(run_spread, execute) if chosen == "torch" and _spreads(able) else execute


def _spreads(able: Capabilities) -> bool:
    """Whether stretches of rows may go side by side: a tile's choice and its products ask for it. What sums
    over all keys before a row would do so again in every stretch."""
    return able.selection == "tile" and not able.approximates


def _check_call(call: Call) -> None:
    if not math.isfinite(call.scale):
        raise ValueError(f"scale must be finite, got {call.scale}")
    if not 0 <= call.seed <= MAX_SEED:
        raise ValueError(f"seed must lie in 0 .. 2**63 - 1, got {call.seed}")
    if call.layer < 0:
        raise ValueError(f"layer must be 0 or more, got {call.layer}")


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, start: int) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions [batch, heads, positions, dim], got {_shape(tensor)}"
            )
        if 0 in tensor.shape:
            raise ValueError(f"{name} has an empty dimension: {_shape(tensor)}")
    B, H, N, D = q.shape
    Hk, M = k.shape[1], k.shape[2]
    if k.shape[:3] != v.shape[:3] or k.shape[0] != B:
        raise ValueError(
            f"k and v must agree on batch, heads and positions: {_shape(q)}, {_shape(k)}, {_shape(v)}"
        )
    if k.shape[3] != D:
        raise ValueError(f"q and k must have the same head_dim, got {D} and {k.shape[3]}")
    if H % Hk:
        raise ValueError(f"the query heads ({H}) must be a multiple of the key heads ({Hk})")
    if not 0 <= start <= M - N:
        raise ValueError(f"start must lie in 0 .. M - N = {M - N} ({N} queries, {M} keys), got {start}")
    if q.dtype not in _FLOATS or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k, v must share one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if k.device != q.device or v.device != q.device:
        raise ValueError(f"q, k, v must be on one device, got {q.device}, {k.device}, {v.device}")


def _check_segments(q: Tensor, segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """Each segment's first row and the row after its last, in the order given."""
    if q.dim() != 4 or q.shape[0] != 1:
        raise ValueError(f"packed q must be [1, heads, rows, dim], got {_shape(q)}")
    if not segments:
        raise ValueError("a packed call needs at least one segment")
    width, num_rows = segments[0].v.shape[-1], q.shape[2]
    bounds = [segment.rows.indices(num_rows) for segment in segments]
    covered = 0
    order = (
        range(len(segments)) if _ascending(bounds) else sorted(range(len(segments)), key=bounds.__getitem__)
    )
    for number in order:
        segment, (first, stop, step) = segments[number], bounds[number]
        if step != 1 or first != covered or stop <= first:
            raise ValueError(
                f"segment {number} has rows {first}..{stop}, expected them to begin at {covered}"
            )
        if not 0 <= segment.seed <= MAX_SEED:
            raise ValueError(f"segment {number}: seed must lie in 0 .. 2**63 - 1, got {segment.seed}")
        if segment.v.shape[-1] != width:
            raise ValueError(f"segment {number} has value dim {segment.v.shape[-1]}, the first has {width}")
        if not _fits(q, segment, stop - first):
            try:
                _check_tensors(q[:, :, first:stop], segment.k, segment.v, segment.start)
            except ValueError as error:
                raise ValueError(f"segment {number}: {error}") from None
        covered = stop
    if covered != num_rows:
        raise ValueError(f"the segments cover {covered} rows of {num_rows}")
    return [(first, stop) for first, stop, _ in bounds]


def _ascending(bounds: Sequence[tuple[int, int, int]]) -> bool:
    return all(one[0] <= other[0] for one, other in pairwise(bounds))


def _fits(q: Tensor, segment: Segment, num_rows: int) -> bool:
    """Whether ``_check_tensors`` has nothing to say, found out in a few microseconds: a decode step asks for
    every sequence in every layer."""
    k, v = segment.k, segment.v
    if k.dim() != 4 or v.dim() != 4:
        return False
    (_, H, _, D), (one, Hk, M, key_dim), (v_one, v_heads, v_keys, Dv) = q.shape, k.shape, v.shape
    return (
        one == v_one == 1
        and Hk == v_heads > 0
        and v_keys == M
        and key_dim == D > 0
        and Dv > 0
        and H > 0
        and H % Hk == 0
        and 0 <= segment.start <= M - num_rows
        and k.dtype == v.dtype == q.dtype
        and q.dtype in _FLOATS
        and k.device == v.device == q.device
    )


def _dense_segment(segment: Segment) -> Segment:
    """The segment with keys and values as ``_rows_dense`` has them."""
    if segment.k.stride(-1) == 1 and segment.v.stride(-1) == 1:
        return segment
    return replace(segment, k=_rows_dense(segment.k), v=_rows_dense(segment.v))


def _rows_dense(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous, which the kernels need; a view wherever possible."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
