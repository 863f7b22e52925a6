"""Linear attention over random features: bidirectional, chunked causal, and one row of a decode step.

    out_i = sum_j L_ij v_j / sum_j L_ij,   lse_i = log sum_j L_ij,   L_ij = sum_r e^(a_ir + e_jr)

The formulas of ``kernels.math.linear_attention``; how states and rows are computed stands in ``linear_sums``,
``linear_rows`` and ``linear_step``. Directions are rounded to the keys' dtype, alike for keys and queries:
that is another map, as close to the drawn one as the keys are to unrounded keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels._triton.launch import Launch, Work
from kernels._triton.linear_landmarks import landmark_examples
from kernels._triton.linear_rows import ROWS_SIZES, feature_rows, mend_rows
from kernels._triton.linear_step import MERGE_SIZES, STEP_SIZES, feature_step, merge_steps
from kernels._triton.linear_sums import STATES_SIZES, TOTALS_SIZES, chunk_states, stretch_totals
from kernels._triton.targets import Target, target_of
from kernels.contract import Call
from kernels.math.features import FeatureMap, rounded_directions
from kernels.math.linear_attention import FeatureSums, KeptSums
from kernels.math.merge import merge_into

STEP_KEYS = 16
"""More keys than these are new to a step's state: they are summed by chunks first."""
STEP_FEATURES = 16
MEND_COLUMNS = 32
MAX_STRETCHES = 32
STATE_BYTES = 1 << 28
"""What the states before the chunks of one launch may take: longer calls go piece by piece."""
FAINT = {torch.float16: 1e-2}
"""A sum relative to the largest weight of its chunk that rounding may have eaten."""
_FAINT = 1e-20
_LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Tiles:
    """``rows`` of a tile of queries, the heads of a group among them; ``row_features`` and ``sum_features``
    at once, where rows are computed and where keys are summed; ``values``: columns of a state and
    ``columns`` of queries, keys and directions at once; ``chunk``: rows that share the state before them."""

    rows: int
    row_features: int
    sum_features: int
    values: int
    row_warps: int
    sum_warps: int
    columns: int = 256
    chunk: int = 64
    row_stages: int = 1
    sum_stages: int = 1


def tiles_of(target: Target, itemsize: int, head_dim: int) -> Tiles:
    """What fits registers and shared memory without spilling."""
    older = target.capability < 90
    if itemsize == 4 and older and head_dim > 64:
        return Tiles(32, 16, 64, 32, 8, 8, columns=16, chunk=32)
    if itemsize == 4:
        return Tiles(64, 16, 64, 32, 8, 8, columns=32, chunk=32)
    return Tiles(64, 16 if older else 32, 64, 64, 4, 8 if older and head_dim <= 64 else 4)


def mend_warps(target: Target, itemsize: int, head_dim: int) -> int:
    """Where the assembler keeps everything in registers: 4 warps, and 8 in 16 bits here and there, spill."""
    few = {80: head_dim > 64, 90: head_dim <= 64}.get(target.capability, False)
    return 2 if itemsize == 2 and few else 8


@dataclass(frozen=True, eq=False)
class Operands:
    """q [B, Hk, G, N, D], k [B, Hk, M, D], v [B, Hk, M, Dv]; ``directions`` [Hk, F, D] in their dtype;
    ``centre`` fp32 [B, Hk, D] or None. ``out`` [B, Hk, G, N, Dv] of any strides, ``lse`` fp32 [B, Hk, G, N],
    dense."""

    q: Tensor
    k: Tensor
    v: Tensor
    directions: Tensor
    centre: Tensor | None
    scale: float
    out: Tensor
    lse: Tensor
    target: Target

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Z, G, N, F, Dv."""
        B, Hk, G, N, _ = self.q.shape
        return B * Hk, G, N, self.directions.shape[1], self.v.shape[3]

    @property
    def tiles(self) -> Tiles:
        return tiles_of(self.target, self.q.element_size(), max(self.q.shape[-1], self.v.shape[-1]))

    @property
    def dims(self) -> dict[str, int | bool | str | float]:
        return {"D": self.q.shape[-1], "DV": self.v.shape[-1], "PADDED_D": _padded(self.q.shape[-1])}

    @property
    def factors(self) -> dict[str, Tensor | int | float]:
        """What <w, k>, <w, q> and |x|^2 are multiplied by, in powers of 2."""
        root = math.sqrt(abs(self.scale)) * _LOG2E
        return {
            "factor": root,
            "query_factor": math.copysign(root, self.scale),
            "half": abs(self.scale) / 2 * _LOG2E,
        }

    @property
    def key_strides(self) -> dict[str, int]:
        names = ("k_b", "k_h", "k_n", "v_b", "v_h", "v_n")
        return dict(zip(names, (*self.k.stride()[:3], *self.v.stride()[:3]), strict=True))

    @property
    def align(self) -> int:
        """Elements that every row of q, k and v begins at a multiple of."""
        elements = 16 // self.q.element_size()
        strides = (*self.q.stride()[:4], *self.k.stride()[:3], *self.v.stride()[:3])
        return elements if all(stride % elements == 0 for stride in strides) else 1

    @property
    def precision(self) -> str:
        return "tf32x3" if self.q.dtype == torch.float32 else "ieee"

    def some(self, a: int, b: int) -> Operands:
        """Rows a .. b - 1."""
        lse = self.lse.new_empty(*self.lse.shape[:3], b - a)
        return replace(self, q=self.q[:, :, :, a:b], out=self.out[:, :, :, a:b], lse=lse)


@dataclass(frozen=True)
class Plan:
    """Which chunks of keys a launch sums: ``lo`` .. ``end`` - 1, in ``num_stretches`` of ``per_stretch``
    chunks from ``first_chunk`` on; states before chunks ``first_kept`` .. ``last_chunk`` are written."""

    lo: int
    end: int
    first_chunk: int
    last_chunk: int
    first_kept: int
    per_stretch: int
    num_stretches: int

    @property
    def first_stretch(self) -> int:
        """Whose program writes the first state."""
        if self.first_kept >= self.last_chunk:
            return self.num_stretches
        return (self.first_kept - self.first_chunk) // self.per_stretch

    @property
    def num_writers(self) -> int:
        return max(1, self.num_stretches - self.first_stretch)

    @property
    def num_totals(self) -> int:
        """Stretches that a writer adds up before its own."""
        return self.first_stretch + self.num_writers - 1

    @property
    def num_states(self) -> int:
        return self.last_chunk - self.first_kept + 1

    @property
    def args(self) -> dict[str, int]:
        return {
            "lo": self.lo,
            "end": self.end,
            "first_chunk": self.first_chunk,
            "last_chunk": self.last_chunk,
            "chunks_per_stretch": self.per_stretch,
            "num_stretches": self.num_stretches,
        }


def plan_of(one: Operands, lo: int, end: int, first_row: int | None) -> Plan:
    """``first_row``: position of the first row whose chunk needs the state before it; None: only the state
    after all keys is wanted."""
    Z, _, _, F, width = one.sizes
    tiles = one.tiles
    first, last = lo // tiles.chunk, -(-max(end, lo) // tiles.chunk)
    kept = last if first_row is None else min(max(first_row // tiles.chunk, first), last)
    programs = Z * -(-F // tiles.sum_features) * -(-width // tiles.values)
    most = min(max(1, 4 * one.target.num_sms // programs), MAX_STRETCHES)
    per_stretch = max(2, -(-(last - first) // most))
    return Plan(lo, end, first, last, kept, per_stretch, -(-(last - first) // per_stretch))


@dataclass(frozen=True, eq=False)
class States:
    """``logs`` fp32 [Z, X, F] and ``means`` [Z, X, F, Dv] of a plan's chunks, ``after``: the state after all
    keys, where it is wanted."""

    logs: Tensor
    means: Tensor
    after: FeatureSums | None


def sum_launches(one: Operands, plan: Plan, known: FeatureSums, keep: bool) -> tuple[list[Launch], States]:
    """The launches that sum the keys of a plan, and what they fill."""
    Z, _, _, F, width = one.sizes
    new, tiles = one.k.new_empty, one.tiles
    shape = Z, plan.num_stretches, F
    tops, counts = (new(shape, dtype=torch.float32) for _ in range(2))
    totals = {"tops": tops, "counts": counts, "sums": new((*shape, width), dtype=torch.float32)}
    states = States(
        new((Z, plan.num_states, F), dtype=torch.float32),
        new((Z, plan.num_states, F, width)),
        _new_sums(one, known.first, plan.end) if keep else None,
    )
    common = one.key_strides | {"num_key_heads": one.k.shape[1], "num_features": F} | plan.args
    block_v = min(tiles.values, _padded(width))
    constants: dict[str, int | bool | str | float] = one.dims | {
        "ALIGN": one.align,
        "BLOCK_D": min(tiles.columns, _padded(one.q.shape[-1])),
        "BLOCK_F": tiles.sum_features,
        "BLOCK_V": block_v,
        "CHUNK": tiles.chunk,
        "CENTRED": one.centre is not None,
        "PRECISION": one.precision,
        "STAGES": tiles.sum_stages,
    }
    blocks = -(-F // tiles.sum_features) * -(-width // block_v)
    inputs: dict[str, Tensor | int | float] = {
        "k": one.k,
        "v": one.v,
        "w": one.directions,
        "centre": _or_any(one.centre, one.lse),
    }
    last = states.after or known
    scale = {name: one.factors[name] for name in ("factor", "half")}
    launches = []
    if plan.num_totals:
        launches.append(
            Launch(
                "stretch_totals",
                stretch_totals,
                (plan.num_totals, blocks, Z),
                inputs | totals | common | scale,
                constants,
                num_warps=tiles.sum_warps,
                sizes=frozenset(TOTALS_SIZES),
            )
        )
    beside: dict[str, Tensor | int | float] = {
        "known_top": _or_any(known.top, tops),
        "known_sums": _or_any(known.sums, tops),
        "logs": states.logs,
        "means": states.means,
        "last_top": _or_any(last.top, tops),
        "last_sums": _or_any(last.sums, tops),
    }
    own = {"first_stretch": plan.first_stretch, "first_kept": plan.first_kept}
    launches.append(
        Launch(
            "chunk_states",
            chunk_states,
            (plan.num_writers, blocks, Z),
            inputs | totals | beside | common | own | scale,
            constants | {"KNOWN": known.top is not None, "KEEP": keep},
            num_warps=tiles.sum_warps,
            sizes=frozenset(STATES_SIZES),
        )
    )
    return launches, states


def row_launches(one: Operands, plan: Plan, states: States, position: int, causal: bool) -> list[Launch]:
    """The launches that compute rows over a plan's states, row n at ``position`` + n."""
    (Z, G, N, F, width), tiles = one.sizes, one.tiles
    group = min(max(_power(G), tiles.rows // tiles.chunk), tiles.rows)  # a tile lies in one chunk
    tokens = tiles.rows // group
    first_tile = position // tokens
    num_tiles = -(-(position + N) // tokens) - first_tile
    grid = num_tiles, Z, -(-G // group)
    parts = tiles.rows // 16
    args: dict[str, Tensor | int | float] = (
        {"q": one.q, "k": one.k, "v": one.v, "w": one.directions, "centre": _or_any(one.centre, one.lse)}
        | {"logs": states.logs, "means": states.means, "out": one.out, "lse": one.lse}
        | {"lost": one.k.new_empty((*grid[::-1], parts), dtype=torch.int8)}
        | dict(zip(("q_b", "q_h", "q_g", "q_n"), one.q.stride(), strict=False))
        | one.key_strides
        | dict(zip(("o_b", "o_h", "o_g", "o_n"), one.out.stride(), strict=False))
        | {"num_key_heads": one.k.shape[1], "num_features": F, "N": N, "G": G, "lo": plan.lo, "end": plan.end}
        | {"position": position, "first_tile": first_tile}
        | {"first_kept": plan.first_kept, "last_chunk": plan.last_chunk}
        | one.factors
        | {"log_features": math.log2(F)}
    )
    constants: dict[str, int | bool | str | float] = one.dims | {
        "ALIGN": one.align,
        "BLOCK_D": min(tiles.columns, _padded(one.q.shape[-1])),
        "PADDED_V": _padded(width),
        "GROUP": group,
        "CHUNK": tiles.chunk,
        "CENTRED": one.centre is not None,
        "PRECISION": one.precision,
    }
    own = {"BLOCK_M": tiles.rows, "BLOCK_F": tiles.row_features, "CAUSAL": causal, "STAGES": tiles.row_stages}
    faint: dict[str, Tensor | int | float] = {"faint": FAINT.get(one.q.dtype, _FAINT)}
    sizes = frozenset(ROWS_SIZES)
    rows = Launch(
        "feature_rows",
        feature_rows,
        grid,
        args | faint,
        constants | own,
        num_warps=tiles.row_warps,
        sizes=sizes,
        notes={"causal": causal, "group": group},
    )
    if not causal:
        return [rows]
    mend = Launch(
        "mend_rows",
        mend_rows,
        (num_tiles * parts, *grid[1:]),
        args,
        constants | {"PARTS": parts, "BLOCK_D": min(MEND_COLUMNS, _padded(one.q.shape[-1]))},
        num_warps=mend_warps(one.target, one.q.element_size(), max(one.q.shape[-1], width)),
        sizes=sizes,
    )
    return [rows, mend]


def step_launches(one: Operands, known: FeatureSums, lo: int, end: int) -> tuple[list[Launch], FeatureSums]:
    """The launches of one row over the state ``known`` and the keys lo .. end - 1, and the state after
    them."""
    Z, G, _, F, width = one.sizes
    blocks, after = -(-F // STEP_FEATURES), _new_sums(one, known.first, end)
    assert after.top is not None and after.sums is not None
    parts = one.lse.new_empty(Z, G, blocks, width + 1)
    tops = one.lse.new_empty(Z, G, blocks)
    q_strides = dict(zip(("q_b", "q_h", "q_g"), one.q.stride(), strict=False))
    padded: dict[str, int | bool | str | float] = {"PADDED_V": _padded(width)}
    step = Launch(
        "feature_step",
        feature_step,
        (blocks, Z),
        {"q": one.q, "k": one.k, "v": one.v, "w": one.directions, "centre": _or_any(one.centre, one.lse)}
        | {"known_top": _or_any(known.top, after.top), "known_sums": _or_any(known.sums, after.sums)}
        | {"last_top": after.top, "last_sums": after.sums, "parts": parts, "part_tops": tops}
        | q_strides
        | one.key_strides
        | {"num_key_heads": one.k.shape[1], "num_features": F, "G": G, "lo": lo, "end": end}
        | one.factors,
        one.dims
        | padded
        | {"BLOCK_F": STEP_FEATURES, "CENTRED": one.centre is not None, "KNOWN": known.top is not None},
        sizes=frozenset(STEP_SIZES),
        multiplies=False,
    )
    merge = Launch(
        "merge_steps",
        merge_steps,
        (G, Z),
        {"q": one.q, "parts": parts, "part_tops": tops, "out": one.out, "lse": one.lse}
        | q_strides
        | dict(zip(("o_b", "o_h", "o_g"), one.out.stride(), strict=False))
        | {"num_key_heads": one.k.shape[1], "G": G, "num_parts": blocks}
        | {"half": one.factors["half"], "log_features": math.log2(F)},
        one.dims | padded,
        num_warps=1,
        sizes=frozenset(MERGE_SIZES),
        multiplies=False,
    )
    return [step, merge], after


def attend_features(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fmap: FeatureMap,
    call: Call,
    *,
    first: int,
    shift: int,
    centre: Tensor | None,
    out: Tensor,
) -> Tensor:
    """Normalised rows over the keys that ``kernels.math.linear_attention.feature_part`` tells, into ``out``
    [B, Hk, G, N, Dv] of any float dtype; their log-sum-exp [B, Hk, G, N] fp32, -inf where a row sees none."""
    one = _operands(q, k, v, fmap, centre, out)
    if call.causal:
        _causal(one, fmap, call, first, shift)
    elif shift == 0:
        _all(one, first)
    else:
        _both_sides(one, call, first, shift)
    return one.lse


def _operands(
    q: Tensor, k: Tensor, v: Tensor, fmap: FeatureMap, centre: Tensor | None, out: Tensor
) -> Operands:
    wide = None if centre is None else centre.float().contiguous()
    lse = torch.empty(q.shape[:4], dtype=torch.float32, device=q.device)
    directions = rounded_directions(fmap, k.dtype)
    return Operands(q, k, v, directions, wide, fmap.scale, out, lse, target_of(q.device))


def _causal(one: Operands, fmap: FeatureMap, call: Call, first: int, shift: int) -> None:
    """From the kept state where there is one."""
    position, is_step = call.start - shift, one.q.shape[3] == 1
    if call.kept is None:
        _causal_from(one, FeatureSums(first), position, keep=False)
        return
    (Z, _, _, F, width), k = one.sizes, one.k
    key = ("features on the device", fmap.key, first, shift, (Z, F, k.shape[3], width), k.dtype, k.device)
    kept = call.kept.get(key, lambda: KeptSums(first, fmap.basis_keys))
    known = kept.sums
    if known.length > position + is_step:
        known = FeatureSums(first)
    if is_step and position >= first:
        kept.keep([_step(one, known, position)])
        return
    after = _causal_from(one, known, position, keep=True)
    if after is not None:
        kept.keep([after])


def _step(one: Operands, known: FeatureSums, position: int) -> FeatureSums:
    end = position + 1
    if end - known.length > STEP_KEYS:
        launches, states = sum_launches(one, plan_of(one, known.length, end, None), known, True)
        _run(launches)
        assert states.after is not None
        known = states.after
    launches, after = step_launches(one, known, known.length, end)
    _run(launches)
    return after


def _causal_from(one: Operands, known: FeatureSums, position: int, *, keep: bool) -> FeatureSums | None:
    """Row n over the keys known.first .. position + n, those before known.length from the state. The state
    after the last row, where it is wanted and there is one."""
    N, M = one.q.shape[3], one.k.shape[2]
    borders = _pieces(one, N)
    for a, b in zip(borders, borders[1:], strict=False):
        end = min(position + b, M)
        piece = one if len(borders) == 2 else one.some(a, b)
        more = keep or b < N
        if end <= known.length and known.top is None:
            piece.out.zero_()
            piece.lse.fill_(-math.inf)
        else:
            plan = plan_of(piece, known.length, end, position + a)
            launches, states = sum_launches(piece, plan, known, more)
            _run([*launches, *row_launches(piece, plan, states, position + a, True)])
            known = states.after or known
        if piece is not one:
            one.lse[..., a:b] = piece.lse
    return None if known.top is None else known


def _pieces(one: Operands, num_rows: int) -> list[int]:
    """Rows at which a call is cut so that its states fit."""
    Z, _, _, F, width = one.sizes
    chunks = max(1, STATE_BYTES // (Z * F * (width * one.k.element_size() + 4)))
    return [*range(0, num_rows, chunks * one.tiles.chunk), num_rows]


def _all(one: Operands, first: int) -> None:
    """Every row over all keys from ``first`` on."""
    M = one.k.shape[2]
    if first >= M:
        one.out.zero_()
        one.lse.fill_(-math.inf)
        return
    plan = plan_of(one, first, M, None)
    launches, states = sum_launches(one, plan, FeatureSums(first), False)
    _run([*launches, *row_launches(one, plan, states, 0, False)])


def _both_sides(one: Operands, call: Call, first: int, shift: int) -> None:
    """Keys at least ``shift`` before a row, and keys as far behind it: a causal sum of the reversed text."""
    (N, M), lse = (one.q.shape[3], one.k.shape[2]), torch.empty_like(one.lse)
    _causal_from(one, FeatureSums(first), call.start - shift, keep=False)
    if first >= M:
        return
    behind = replace(
        one,
        q=one.q.flip(3),
        k=one.k[:, :, first:].flip(2),
        v=one.v[:, :, first:].flip(2),
        out=torch.empty(one.out.shape, dtype=torch.float32, device=one.out.device),
        lse=lse,
    )
    _causal_from(behind, FeatureSums(0), M - N - call.start - shift, keep=False)
    wide = one.out.float()
    merge_into(wide, one.lse, behind.out.flip(3), lse.flip(3))
    one.out.copy_(wide)


def _run(launches: list[Launch]) -> None:
    for launch in launches:
        launch.run()


def _new_sums(one: Operands, first: int, length: int) -> FeatureSums:
    Z, _, _, F, width = one.sizes
    sums = one.k.new_empty((Z, F, width + 1), dtype=torch.float64)
    return FeatureSums(first, length, one.k.new_empty((Z, 1, F), dtype=torch.float32), sums)


def _or_any(tensor: Tensor | None, any_other: Tensor) -> Tensor:
    """A tensor to hand over where a kernel reads none."""
    return any_other if tensor is None else tensor


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _padded(n: int) -> int:
    return max(16, _power(n))


def examples(target: Target, dtype: torch.dtype, head_dim: int) -> Iterator[Launch]:
    """Prefill of 16,384 tokens, causal and not, and a decode step, with 256 features; landmarks of as
    many."""
    one = _example(target, dtype, head_dim, 16384)
    yield from _with_work(one, *_example_prefill(one, True))
    bidirectional, plan = _example_prefill(one, False)
    others = [launch for launch in bidirectional if launch.kernel != "stretch_totals"]  # the causal one's
    yield from _with_work(one, others, plan)
    step = _example(target, dtype, head_dim, 1)
    yield from _with_work(step, step_launches(step, _new_sums(step, 0, 16383), 16383, 16384)[0], None)
    yield from landmark_examples(target, dtype, head_dim)


def _example(target: Target, dtype: torch.dtype, head_dim: int, num_rows: int) -> Operands:
    def new(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    B, Hk, G, M, F = 1, 8, 4, 16384, 256
    return Operands(
        new(B, Hk, G, num_rows, head_dim),
        new(B, Hk, M, head_dim),
        new(B, Hk, M, head_dim),
        new(Hk, F, head_dim),
        None,
        head_dim**-0.5,
        new(B, Hk, G, num_rows, head_dim),
        new(B, Hk, G, num_rows, kind=torch.float32),
        target,
    )


def _example_prefill(one: Operands, causal: bool) -> tuple[list[Launch], Plan]:
    plan = plan_of(one, 0, one.k.shape[2], 0 if causal else None)
    known = _new_sums(one, 0, 0)
    launches, states = sum_launches(one, plan, known, causal)
    return [*launches, *row_launches(one, plan, states, 0, causal)], plan


def _with_work(one: Operands, launches: list[Launch], plan: Plan | None) -> Iterator[Launch]:
    for launch in launches:
        yield replace(launch, work=_work(one, launch, plan))


def _work(one: Operands, launch: Launch, plan: Plan | None) -> Work:
    """``mend_rows`` is counted as if nothing were lost."""
    (Z, G, N, F, width), D, size = one.sizes, one.q.shape[-1], one.q.element_size()
    M, state = one.k.shape[2], Z * F * width
    keys, rows = Z * M * (D + width) * size, Z * G * N * (D + width) * size
    if launch.kernel == "stretch_totals":
        assert plan is not None
        return Work(2.0 * Z * M * F * (D + width), Z * M * F, keys + 4.0 * state * plan.num_stretches)
    if launch.kernel == "chunk_states":
        assert plan is not None
        share = plan.num_writers * plan.per_stretch * one.tiles.chunk / M if plan.num_states > 1 else 0.0
        written = state * (4.0 * plan.num_stretches + size * plan.num_states)
        return Work(2.0 * share * Z * M * F * (D + width), share * Z * M * F, share * keys + written)
    if launch.kernel == "feature_rows":
        assert plan is not None
        within = one.tiles.chunk * 2.0 * (F + width) if launch.notes["causal"] else 0.0
        exps = Z * G * N * F * (2.0 if launch.notes["causal"] else 1.0)
        flops = Z * G * N * (2.0 * F * (D + width) + within)
        return Work(flops, exps, rows + keys * bool(within) + state * plan.num_states * size)
    if launch.kernel == "feature_step":
        return Work(2.0 * Z * F * (G + 1) * (D + width), Z * F * (G + 2), 16.0 * state)
    return Work(0.0, 0.0, float(Z * G * N))
