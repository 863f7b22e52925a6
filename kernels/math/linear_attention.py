"""Attention through random features: sums over keys that no query has to visit one by one.

    sum_j L_ij v_j,   L_ij = sum_r e^(a_ir + e_jr) ~ e^(t <q_i, k_j>)       a, e: ``kernels.math.features``
    state over keys:  mu_r = max_j e_jr,   S_r = sum_j e^(e_jr - mu_r) [v_j, 1]
    row over a state: sum_r p_ir S_r,      p_ir = e^(a_ir + mu_r - c_i),   c_i = log sum_r e^(a_ir + mu_r)

Choromanski et al., "Rethinking attention with Performers" (arXiv 2009.14794); the causal form is chunked:
state of the keys before the chunk, and the masked product of features within it. Every sum is direct, none is
a difference of two. p_i sums to 1 and each S_r holds a weight of 1, so the denominator of a row over a state
is at least 1: it cannot underflow, whatever keys come later. Within a chunk mu also knows the chunk's later
keys; a row that they outweigh beyond 1e-20, and rows of a chunk with a key or value that is not finite, are
computed again from log L_ij.

Cost O((M + N) F (D + Dv + CHUNK)) time, O(F Dv) memory per key head beyond the output.
Letters as in ``kernels.contract``; Z = B Hk, rows of the G heads that share keys stand below each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from kernels.contract import Call, CallShape, Workspace
from kernels.math.features import FeatureMap
from kernels.math.masked import weighted
from kernels.math.signed import Part
from kernels.parallel import side_by_side

CHUNK = 64
"""Rows of a causal chunk, at absolute multiples."""
BLOCK = 256
"""Keys at once where nothing is masked, at absolute multiples."""
PANEL_ELEMENTS = 1 << 18
"""Weights p_ir that exist at once: what a core's cache holds."""
UNITS = 2
"""Key heads that run as one batch."""
MIN_FLOPS = 1 << 26
"""Below so many operations a call stays on its thread."""
MEND_ELEMENTS = 1 << 18
"""Exponents a_ir + e_jr that exist at once where a row is computed again: not in ``feature_workspace``."""
_FAINT = 1e-20
_FP32 = 4


def feature_part(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fmap: FeatureMap,
    call: Call,
    *,
    first: int = 0,
    shift: int = 0,
    centre: Tensor | None = None,
) -> Part:
    """sum_j L_ij v_j and sum_j L_ij of every row, over some keys j >= ``first``:

        causal         first <= j <= i - shift          (shift 0: all that row i sees)
        bidirectional  |i - j| >= shift, first <= j     (shift 0: all)

    q [B, Hk, G, N, D] in the map's dtype, k [B, Hk, M, D], v [B, Hk, M, Dv] of any float dtype; ``centre``
    [B, Hk, 1, D] is taken off every key as it is read (None: k is centred already). A long-lived cache is
    best handed over raw, with its centre: a decode step then reads only the keys that are new to it.

    Returns a part [B, Hk, G, N, (Dv)] that estimates sum_j e^(t <q_i, k_j - centre>) v_j, to be added to
    a softmax over the same centred keys. A row without such a key has log_scale -inf and zeros.
    Causal sums are kept in ``call.kept`` (constant size), under a key that holds the map, first and shift.
    Under impl ``triton`` q may be of a narrow dtype; the part is fp32.
    """
    if by_triton(q, call):
        return _part_by_triton(q, k, v, fmap, call, first, shift, centre)
    keys = _keys(k, v, centre, fmap)
    rows = _rows(q, fmap, v.shape[-1], scaled=True)
    if call.causal:
        _causal(rows, keys, call, first, shift)
    elif shift == 0:
        _all(rows, keys, first)
    else:
        return _both_sides(q, keys, call, first, shift)
    return rows.part(q)


def feature_attention(
    q: Tensor, k: Tensor, v: Tensor, fmap: FeatureMap, call: Call, *, centre: Tensor | None, out: Tensor
) -> None:
    """sum_j L_ij v_j / sum_j L_ij over all keys that row i sees, into ``out`` [B, Hk, G, N, Dv] of q's dtype.
    The other arguments as in ``feature_part``; under impl ``triton`` ``out`` may be of any float dtype."""
    if by_triton(q, call):
        from kernels._triton.linear import attend_features

        attend_features(q, k, v, fmap, call, first=0, shift=0, centre=centre, out=out)
        return
    keys, rows = _keys(k, v, centre, fmap), _rows(q, fmap, v.shape[-1], scaled=False)
    rows = replace(rows, out=out.view(-1, *out.shape[2:]))
    if call.causal:
        _causal(rows, keys, call, 0, 0)
    else:
        _all(rows, keys, 0)


def by_triton(q: Tensor, call: Call) -> bool:
    """Whether GPU kernels compute these rows; sums asked for in fp64 stay with torch."""
    return call.impl == "triton" and q.dtype != torch.float64


def _part_by_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fmap: FeatureMap,
    call: Call,
    first: int,
    shift: int,
    centre: Tensor | None,
) -> Part:
    from kernels._triton.linear import attend_features

    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=torch.float32)
    lse = attend_features(q, k, v, fmap, call, first=first, shift=shift, centre=centre, out=out)
    return Part(out, (lse != -math.inf).float(), lse)


class FeatureSums:
    """The state over keys ``first`` .. ``length`` - 1 of Z key heads: ``top`` [Z, 1, F] and ``sums`` [Z, F,
    Dv + 1], whose last column sums the weights alone; None before the first key. Tensors are replaced, never
    written."""

    def __init__(
        self, first: int, length: int | None = None, top: Tensor | None = None, sums: Tensor | None = None
    ) -> None:
        self.first, self.length = first, first if length is None else length
        self.top, self.sums = top, sums

    @property
    def nbytes(self) -> int:
        return 0 if self.top is None or self.sums is None else self.top.nbytes + self.sums.nbytes

    def units(self, units: slice, dtype: torch.dtype) -> FeatureSums:
        """Those of some of the heads, ``sums`` in another dtype."""
        if self.top is None or self.sums is None:
            return FeatureSums(self.first, self.length)
        return FeatureSums(self.first, self.length, self.top[units], self.sums[units].to(dtype))

    def raised(self, top: Tensor) -> Tensor | None:
        """``sums`` relative to another ``top``: a new tensor."""
        if self.top is None or self.sums is None:
            return None
        return self.sums * torch.exp(self.top - top).mT.to(self.sums.dtype)

    def add(self, logs: Tensor, values: Tensor) -> None:
        """The next keys: their exponents e [Z, n, F], which are overwritten, and values [Z, n, Dv + 1]."""
        top = logs.amax(1, keepdim=True)
        if self.top is not None:
            top = torch.maximum(top, self.top)
        raised, weights = self.raised(top), logs.sub_(top).exp_().mT
        if raised is None:
            self.sums = torch.bmm(weights, values)
        else:
            self.sums = raised.baddbmm_(weights.to(raised.dtype), values.to(raised.dtype))
        self.top = top
        self.length += logs.shape[1]

    def merge(self, later: FeatureSums) -> None:
        """The state over the keys that follow."""
        assert self.top is not None and later.top is not None
        top = torch.maximum(self.top, later.top)
        mine, theirs = self.raised(top), later.raised(top)
        assert mine is not None and theirs is not None
        self.top, self.sums, self.length = top, mine + theirs, later.length


class KeptSums:
    """The state of one sequence, beside its cache, in fp64: a million decode steps add up. The centre, and so
    every sum, depends on the first ``basis_keys`` keys."""

    def __init__(self, first: int, basis_keys: int) -> None:
        self.sums = FeatureSums(first)
        self._basis_keys = basis_keys

    @property
    def nbytes(self) -> int:
        return self.sums.nbytes

    def truncate(self, length: int) -> None:
        if length < max(self.sums.length, self._basis_keys):
            self.sums = FeatureSums(self.sums.first)

    def keep(self, parts: Sequence[FeatureSums]) -> None:
        """The states of all heads in order, unless a longer one is kept."""
        one = parts[0]
        if one.length < self.sums.length or one.top is None:
            return
        if len(parts) == 1 and one.sums is not None:
            self.sums = FeatureSums(one.first, one.length, one.top, one.sums.double())
            return
        tops = torch.cat([part.top for part in parts if part.top is not None])
        sums = torch.cat([part.sums for part in parts if part.sums is not None])
        self.sums = FeatureSums(one.first, one.length, tops, sums.double())


@dataclass(frozen=True, eq=False)
class _Keys:
    """Keys [Z, M, D] and values [Z, M, Dv] of a call, read in blocks; ``centre`` [Z, 1, D];
    ``directions`` [Z, F, D]."""

    k: Tensor
    v: Tensor
    centre: Tensor | None
    directions: Tensor
    fmap: FeatureMap

    @property
    def count(self) -> int:
        return self.k.shape[1]

    def block(self, a: int, b: int) -> tuple[Tensor, Tensor]:
        """Exponents e [Z, b - a, F] and values beside a column of ones [Z, b - a, Dv + 1] of some keys."""
        keys = self.k[:, a:b].to(self.directions.dtype)
        if self.centre is not None:
            keys = keys - self.centre
        values = keys.new_ones(*keys.shape[:2], self.v.shape[-1] + 1)
        values[..., :-1] = self.v[:, a:b]
        norms = self.fmap.half_norms(keys).neg_().unsqueeze(-1)
        return torch.baddbmm(norms, keys, self.directions.mT, alpha=self.fmap.key_root), values

    def units(self, units: slice) -> _Keys:
        centre = None if self.centre is None else self.centre[units]
        return replace(
            self, k=self.k[units], v=self.v[units], centre=centre, directions=self.directions[units]
        )

    def reversed(self, first: int) -> _Keys:
        """Those from ``first`` on, the last of them first."""
        return replace(self, k=self.k[:, first:].flip(1), v=self.v[:, first:].flip(1))


def _keys(k: Tensor, v: Tensor, centre: Tensor | None, fmap: FeatureMap) -> _Keys:
    directions = fmap.directions if len(k) == 1 else fmap.directions.repeat(len(k), 1, 1)
    if centre is not None:
        centre = centre.to(directions.dtype).flatten(0, 1)
    return _Keys(k.flatten(0, 1), v.flatten(0, 1), centre, directions, fmap)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Queries q [Z, G, N, D] of a call and what they get. Unscaled, ``out`` [Z, G, N, Dv] is normalised;
    scaled, it holds numerators, beside ``weight`` and ``log_scale`` [Z, G, N]."""

    q: Tensor
    out: Tensor
    weight: Tensor | None
    log_scale: Tensor | None
    directions: Tensor
    fmap: FeatureMap

    @property
    def count(self) -> int:
        return self.q.shape[2]

    def some(self, units: slice, rows: slice) -> _Rows:
        """Some of the heads and rows, sharing memory."""
        weight, log_scale = (None if x is None else x[units, :, rows] for x in (self.weight, self.log_scale))
        return _Rows(
            self.q[units, :, rows],
            self.out[units, :, rows],
            weight,
            log_scale,
            self.directions[units],
            self.fmap,
        )

    def exponents(self, rows: slice, chunks: int) -> Tensor:
        """a_ir [Z, chunks, G c, F] of ``chunks`` c rows, without what is the same for all of a row."""
        q = torch.unflatten(self.q[:, :, rows], 2, (chunks, -1)).transpose(1, 2)
        Z, _, G, c, D = q.shape
        scaled = q.reshape(Z, -1, D) * self.fmap.query_root
        projected = torch.bmm(scaled, self.directions.mT)
        return projected.view(Z, chunks, G * c, -1)

    def put(self, rows: slice, total: Tensor, log_scale: Tensor | None) -> None:
        """total [Z, chunks, G c, Dv + 1], relative to ``log_scale`` [Z, chunks, G c] where it is wanted."""
        chunks, G = total.shape[1], self.q.shape[1]

        def places(x: Tensor) -> Tensor:
            return torch.unflatten(x[:, :, rows], 2, (chunks, -1))

        total = torch.unflatten(total, 2, (G, -1)).transpose(1, 2)
        if log_scale is None or self.weight is None or self.log_scale is None:
            torch.div(total[..., :-1], total[..., -1:], out=places(self.out))
            return
        places(self.out).copy_(total[..., :-1])
        places(self.weight).copy_(total[..., -1])
        places(self.log_scale).copy_(torch.unflatten(log_scale, 2, (G, -1)).transpose(1, 2))

    def put_nothing(self, rows: slice) -> None:
        self.out[:, :, rows] = 0.0
        if self.weight is not None and self.log_scale is not None:
            self.weight[:, :, rows] = 0.0
            self.log_scale[:, :, rows] = -math.inf

    def part(self, q: Tensor) -> Part:
        """With what ``exponents`` leaves out."""
        assert self.weight is not None and self.log_scale is not None
        self.log_scale.sub_(self.fmap.half_norms(self.q).add_(math.log(self.fmap.num_features)))
        out, weight, log_scale = (
            torch.unflatten(x, 0, q.shape[:2]) for x in (self.out, self.weight, self.log_scale)
        )
        return Part(out, weight, log_scale)


def _rows(q: Tensor, fmap: FeatureMap, width: int, *, scaled: bool) -> _Rows:
    directions = fmap.directions if len(q) == 1 else fmap.directions.repeat(len(q), 1, 1)
    flat = q.flatten(0, 1)
    weight, log_scale = (q.new_empty(flat.shape[:3]) if scaled else None for _ in range(2))
    out = q.new_empty(*flat.shape[:3], width if scaled else 0)
    return _Rows(flat, out, weight, log_scale, directions, fmap)


def _all(rows: _Rows, keys: _Keys, first: int) -> None:
    """Every row over all keys from ``first`` on: states of stretches of keys, then stretches of rows."""
    if first >= keys.count:
        rows.put_nothing(slice(0, rows.count))
        return
    units, pieces = _shares(rows, keys)
    borders = _borders(first, keys.count, pieces)
    jobs = [partial(_state, keys.units(some), a, b) for some in units for a, b in pairwise(borders)]
    parts = side_by_side(jobs, keys.k.device)
    states = [parts[at : at + len(borders) - 1] for at in range(0, len(parts), len(borders) - 1)]
    for one, *others in states:
        for other in others:
            one.merge(other)
    borders = _borders(0, rows.count, pieces)
    side_by_side(
        [
            partial(_query, rows.some(some, slice(a, b)), slice(0, b - a), stretches[0])
            for some, stretches in zip(units, states, strict=True)
            for a, b in pairwise(borders)
        ],
        keys.k.device,
    )


def _both_sides(q: Tensor, keys: _Keys, call: Call, first: int, shift: int) -> Part:
    """Keys at least ``shift`` before a row, and keys as far behind it: a causal sum of the reversed text."""
    width, num_rows = keys.v.shape[-1], q.shape[3]
    before = _rows(q, keys.fmap, width, scaled=True)
    _causal_shared(before, keys, FeatureSums(first), call.start - shift)
    behind = _rows(q.flip(3), keys.fmap, width, scaled=True)
    start = keys.count - num_rows - call.start - shift
    if first < keys.count:
        _causal_shared(behind, keys.reversed(first), FeatureSums(0), start)
    else:
        behind.put_nothing(slice(0, num_rows))
    a, b = before.part(q), behind.part(q)
    return _joined(a, Part(b.numerator.flip(3), b.denominator.flip(3), b.log_scale.flip(3)))


def _joined(a: Part, b: Part) -> Part:
    top = torch.maximum(a.log_scale, b.log_scale)
    safe = top.masked_fill(top == -math.inf, 0.0)
    left, right = torch.exp(a.log_scale - safe), torch.exp(b.log_scale - safe)
    numerator = a.numerator * left.unsqueeze(-1) + b.numerator * right.unsqueeze(-1)
    return Part(numerator, a.denominator * left + b.denominator * right, top)


def _causal(rows: _Rows, keys: _Keys, call: Call, first: int, shift: int) -> None:
    """Rows over the keys first <= j <= i - shift, from the kept state where there is one."""
    position, is_step = call.start - shift, rows.count == 1
    if call.kept is None:
        _causal_shared(rows, keys, FeatureSums(first), position)
        return
    sizes = (*keys.k.shape[::2], keys.v.shape[-1], keys.k.device)
    kept = call.kept.get(
        ("features", keys.fmap.key, first, shift, sizes), lambda: KeptSums(first, keys.fmap.basis_keys)
    )
    known = kept.sums
    if known.length > position + is_step:
        known = FeatureSums(first)
    if not is_step or position < first:
        kept.keep(_causal_shared(rows, keys, known, position))
        return
    state = known.units(slice(None), torch.float64)
    _advance(state, keys, position + 1)
    _query(rows, slice(0, 1), state)
    kept.keep([state])


def _causal_shared(rows: _Rows, keys: _Keys, known: FeatureSums, position: int) -> list[FeatureSums]:
    """Heads, and stretches of rows where there are fewer heads than threads, side by side. The states after
    the last row, of all heads in order."""
    units, pieces = _shares(rows, keys)
    borders = _borders(0, rows.count, pieces)
    dtype = keys.directions.dtype
    jobs = [
        partial(
            _causal_from,
            rows.some(some, slice(a, b)),
            keys.units(some),
            known.units(some, dtype),
            position + a,
        )
        for a, b in reversed(list(pairwise(borders)))
        for some in units
    ]
    return side_by_side(jobs, keys.k.device)[: len(units)]


def _shares(rows: _Rows, keys: _Keys) -> tuple[list[slice], int]:
    """The heads of each job, and into how many stretches to cut rows or keys."""
    Z, elements = len(rows.q), rows.q[..., 0].numel() * rows.directions.shape[1]
    if rows.q.device.type != "cpu" or elements <= PANEL_ELEMENTS:
        return [slice(0, Z)], 1
    threads = torch.get_num_threads() if 8 * elements * rows.q.shape[-1] >= MIN_FLOPS else 1
    size = max(1, min(UNITS, Z // threads))
    units = [slice(a, min(a + size, Z)) for a in range(0, Z, size)]
    even = len(units) % threads == 0 or len(units) >= 4 * threads
    return units, 1 if even else min(4, -(-2 * threads // len(units)))


def _borders(begin: int, end: int, pieces: int) -> list[int]:
    step = max(BLOCK, -(-(end - begin) // (pieces * BLOCK)) * BLOCK)
    return [begin, *range((begin // step + 1) * step, end, step), end]


def _causal_from(rows: _Rows, keys: _Keys, state: FeatureSums, position: int) -> FeatureSums:
    """Row r over the keys state.first .. position + r, those from state.length on added to the state. A row
    beyond the last key sees them all."""
    stop = position + rows.count
    at = min(max(position, state.first), stop)
    if at > position:
        rows.put_nothing(slice(0, at - position))
    _advance(state, keys, min(at // CHUNK * CHUNK, keys.count))
    per_chunk = len(rows.q) * rows.q.shape[1] * rows.directions.shape[1] * CHUNK
    most = max(1, PANEL_ELEMENTS // per_chunk)
    last = min(stop, keys.count)
    while at < last:
        chunks = min(most, (last - at) // CHUNK) if at % CHUNK == 0 and state.length == at else 0
        end = at + chunks * CHUNK if chunks else min((at // CHUNK + 1) * CHUNK, last)
        _chunks(rows, slice(at - position, end - position), max(chunks, 1), keys, state, at, end)
        at = end
    if at < stop:
        _advance(state, keys, keys.count)
        _query(rows, slice(at - position, rows.count), state)
    return state


def _state(keys: _Keys, begin: int, end: int) -> FeatureSums:
    state = FeatureSums(begin)
    _advance(state, keys, end)
    return state


def _advance(state: FeatureSums, keys: _Keys, length: int) -> None:
    """Add the keys up to ``length``, in blocks at absolute multiples."""
    while state.length < length:
        stop = min((state.length // BLOCK + 1) * BLOCK, length)
        state.add(*keys.block(state.length, stop))


def _query(rows: _Rows, some: slice, state: FeatureSums) -> None:
    """Rows over the whole state."""
    assert state.top is not None and state.sums is not None
    sums = state.sums if rows.count == 1 else state.sums.to(rows.q.dtype)
    Z, G = rows.q.shape[:2]
    step = max(16, PANEL_ELEMENTS // (Z * G * rows.directions.shape[1]))
    for a in range(some.start, some.stop, step):
        block = slice(a, min(a + step, some.stop))
        exponents = rows.exponents(block, 1).add_(state.top[:, None])
        weights, log_scale = _normalised(rows, exponents)
        rows.put(block, torch.bmm(weights[:, 0].to(sums.dtype), sums)[:, None], log_scale)


def _normalised(rows: _Rows, exponents: Tensor) -> tuple[Tensor, Tensor | None]:
    """p_ir, and c_i where it is wanted."""
    weights = torch.softmax(exponents, -1)
    if rows.log_scale is None:
        return weights, None
    return weights, exponents.amax(-1) - torch.log(weights.amax(-1))


def _chunks(
    rows: _Rows, some: slice, chunks: int, keys: _Keys, state: FeatureSums, at: int, end: int
) -> None:
    """Rows at positions at .. end - 1, in ``chunks`` chunks, over the state and, up to their own, the keys
    state.length .. end - 1, which are then added to the state."""
    ahead = at - state.length
    logs, values = (torch.unflatten(x, 1, (chunks, -1)) for x in keys.block(state.length, end))
    tops = logs.amax(2, keepdim=True)
    if state.top is not None:
        tops = torch.maximum(tops, state.top[:, None])
    if chunks > 1:
        tops = tops.cummax(1).values
    weights, log_scale = _normalised(rows, rows.exponents(some, chunks).add_(tops))
    of_keys = logs.sub_(tops).exp_()
    flat = [x.flatten(0, 1) for x in (weights, of_keys, values)]
    pairs = torch.bmm(flat[0], flat[1].mT)
    torch.unflatten(pairs, 1, (rows.q.shape[1], -1)).tril_(ahead)
    total = torch.bmm(pairs, flat[2])
    added = torch.unflatten(torch.bmm(flat[1].mT, flat[2]), 0, (-1, chunks))
    before, after = _prefixes(state, tops, added)
    if before is not None:
        total.baddbmm_(flat[0], before.flatten(0, 1))
    total = torch.unflatten(total, 0, (-1, chunks))
    if not (math.isfinite(float(total.sum())) and float(total[..., -1].min()) >= _FAINT):
        _mend(rows, some, keys, state, tops, before, added, ahead, total, log_scale)
    rows.put(some, total, log_scale)
    state.top, state.sums, state.length = tops[:, -1], after, end


def _prefixes(state: FeatureSums, tops: Tensor, added: Tensor) -> tuple[Tensor | None, Tensor]:
    """Sums of all keys before each chunk, relative to the chunk's top, [Z, chunks, F, Dv + 1] (None where
    there is one chunk and nothing before it); and the sums after the last. tops [Z, chunks, 1, F], added
    [Z, chunks, F, Dv + 1]: the chunks' own."""
    raised, chunks = state.raised(tops[:, 0]), tops.shape[1]
    if chunks == 1:
        if raised is None:
            return None, added[:, 0]
        return raised[:, None], raised + added[:, 0]
    before = torch.empty_like(added)
    before[:, 0] = 0.0 if raised is None else raised
    decay = torch.exp(tops[:, :-1] - tops[:, 1:]).mT
    carried = added[:, :-1] * decay
    for c in range(chunks - 1):
        torch.addcmul(carried[:, c], before[:, c], decay[:, c], out=before[:, c + 1])
    return before, before[:, -1] + added[:, -1]


def _mend(
    rows: _Rows,
    some: slice,
    keys: _Keys,
    state: FeatureSums,
    tops: Tensor,
    before: Tensor | None,
    added: Tensor,
    ahead: int,
    total: Tensor,
    log_scale: Tensor | None,
) -> None:
    """Rows that later keys of their chunk outweigh, or that share it with numbers that are not finite, again
    from the logarithms of their kernel values. Row n of a head sees keys 0 .. n + ahead of its chunk."""
    chunks = total.shape[1]
    num_rows = (some.stop - some.start) // chunks
    stop = state.length + ahead + some.stop - some.start
    logs, values = (torch.unflatten(x, 1, (chunks, -1)) for x in keys.block(state.length, stop))
    broken = ~(torch.isfinite(logs).flatten(2).all(-1) & torch.isfinite(values).flatten(2).all(-1))
    lost = (total[..., -1] < _FAINT) | broken[..., None]
    exponents = rows.exponents(some, chunks)
    at_once = max(1, MEND_ELEMENTS // logs[0, 0].numel())
    for z, c in lost.any(-1).nonzero().tolist():
        top, sums = state.top, state.sums
        earlier = None if top is None or sums is None else (top[z], sums[z])
        if c and before is not None:
            earlier = (tops[z, c - 1], before[z, c - 1] + added[z, c - 1])
        for index in torch.split(lost[z, c].nonzero()[:, 0], at_once):
            last = index % num_rows + ahead
            mended, scale = _row_by_row(exponents[z, c, index], logs[z, c], values[z, c], last, earlier)
            total[z, c, index] = mended
            if log_scale is not None:
                log_scale[z, c, index] = scale


def _row_by_row(
    rows: Tensor, logs: Tensor, values: Tensor, last: Tensor, earlier: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Rows a [n, F] over keys e [c, F] up to number ``last`` [n] with values [c, Dv + 1], and over the
    ``earlier`` keys' top [1, F] and sums [F, Dv + 1] -> totals [n, Dv + 1] relative to a log scale [n]."""
    seen = torch.arange(len(logs), device=logs.device) <= last[:, None]
    kernel = torch.logsumexp(rows[:, None] + logs, -1).masked_fill_(~seen, -math.inf)
    scale = kernel.amax(-1, keepdim=True)
    if earlier is None:
        kernel = torch.exp(kernel - scale).masked_fill_(~seen, 0.0)
        return weighted(kernel, values, seen), scale[:, 0]
    exponents = rows + earlier[0]
    of_earlier = torch.logsumexp(exponents, -1, keepdim=True)
    scale = torch.maximum(scale, of_earlier)
    kernel = torch.exp(kernel - scale).masked_fill_(~seen, 0.0)
    total = weighted(kernel, values, seen)
    total += torch.exp(of_earlier - scale) * (torch.softmax(exponents, -1) @ earlier[1])
    return total, scale[:, 0]


def feature_flops(
    num_rows: int, num_keys: int, num_heads: int, num_key_heads: int, dims: tuple[int, int, int], causal: bool
) -> int:
    """What ``Stats.other_flops`` counts of ``num_rows`` rows and of ``num_keys`` keys that no state held yet.
    dims: (F, D, Dv)."""
    F, D, Dv = dims
    both = 2 * F * (D + Dv + 1)
    within = CHUNK * 2 * (F + Dv + 1) if causal and num_rows > 1 else 0
    return num_rows * num_heads * (both + within) + num_keys * num_key_heads * both


def feature_workspace(shape: CallShape, num_features: int, *, scaled: bool) -> Workspace:
    """What ``feature_part`` (scaled) and ``feature_attention`` take, their output not included."""
    F, width, Hk = num_features, shape.value_dim + 1, shape.num_kv_heads
    group = shape.num_heads // Hk
    threads = torch.get_num_threads() if shape.on_cpu else 1
    small = shape.num_rows * shape.num_heads * F <= PANEL_ELEMENTS
    units = min(UNITS, Hk) if shape.on_cpu and not small else Hk
    own = max(CHUNK, PANEL_ELEMENTS // (units * group * F) // CHUNK * CHUNK)
    own = min(own, shape.num_rows)
    rows = units * group * own
    keys = units * (max(own, BLOCK) if shape.num_keys > shape.num_rows or not shape.causal else own)
    states = units * F * width * (3 * -(-own // CHUNK) if shape.causal else 2)
    panel = rows * (2 * F + 2 * shape.key_dim) + keys * (F + shape.key_dim + width)
    mixed = rows * (F + CHUNK + 2 * width) + keys * (F + width) + states
    jobs = min(threads, max(1, Hk // units))
    state = Hk * F * (width * (4 + 8) + 4)
    live = jobs * max(panel, mixed) * _FP32 + state
    if scaled:
        live += 2 * shape.num_rows * shape.num_heads * _FP32
    cache = Hk * F * (width * 8 + _FP32) if shape.causal else 0
    return Workspace(live, kept_bytes=Hk * F * shape.key_dim * _FP32, cache_bytes=cache)
