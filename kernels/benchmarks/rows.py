"""One line of the table: what a case took, beside dense SDPA and FlexAttention in the same turns."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.benchmarks.cases import Case
from kernels.benchmarks.dense import Dense
from kernels.benchmarks.errors import OwnError
from kernels.benchmarks.measure import Contender
from kernels.contract import Stats
from kernels.math.dense import computed_elements

NOT_ASKED_FOR = "not asked for"


@dataclass(frozen=True)
class Row:
    """Ratios are dense or FlexAttention time over ours: above 1 we are faster. None: not measured.

    ``selection_ms`` is the median of the timed calls, ``first_selection_ms`` the first call's (fixed patterns
    keep their plans; random ones draw anew in every call, and pairs are the first call's).
    ``dense_extrapolated``: timed on the last rows and extrapolated. ``dense_rounds``: calls behind
    ``dense_ms``. ``gflops`` and ``dense_gflops`` count score elements computed, ours also ``other_flops``
    (``kernels.contract.Stats``); ``flops`` also the logits scored to choose. ``flex_difference``:
    largest difference between FlexAttention's answer and ours; ``flex_note``: why there is no time.
    ``peak_bytes``: of one call beyond its inputs, its answer included. ``max_abs_error`` and
    ``error_to_exact``: see ``kernels.benchmarks.errors``.
    """

    backend: str
    impl: str
    params: str
    shape: str
    length: int
    causal: bool
    rounds: int
    time_ms: float
    selection_ms: float
    first_selection_ms: float
    gflops: float
    share_of_sgemm: float
    dense_ms: float
    dense_extrapolated: bool
    dense_rounds: int
    dense_gflops: float
    ratio_to_dense: float
    flex_ms: float | None
    ratio_to_flex: float | None
    flex_note: str
    flex_difference: float | None
    pairs_computed: int
    other_flops: int
    flops: int
    density: float
    density_computed: float
    dense_share: float
    dropped_mass: float | None
    peak_bytes: int | None
    max_abs_error: float | None
    error_rows: int
    error_to_exact: float


@dataclass(frozen=True)
class Flex:
    """FlexAttention on the case's mask: its time and difference from ours, or why there is none."""

    note: str
    contender: Contender | None = None
    difference: float | None = None


@dataclass(frozen=True)
class Measured:
    """All there is to know of one case after its rounds."""

    case: Case
    contender: Contender
    first: Stats
    own_error: OwnError
    error_to_exact: float
    flex: Flex


def row(measured: Measured, dense: Dense, sgemm_gflops: float, peak_bytes: int | None) -> Row:
    """The line of a case whose rounds are over."""
    case, ours, first, flex = measured.case, measured.contender, measured.first, measured.flex
    flex_ms = flex.contender.time_ms if flex.contender else None
    dense_pairs = case.H * computed_elements(case.N, case.N, case.causal)
    gflops = (4 * case.D * first.pairs_computed + first.other_flops) / ours.time_ms / 1e6
    return Row(
        backend=case.backend,
        impl=case.impl,
        params=case.told_params,
        shape=case.shape,
        length=case.N,
        causal=case.causal,
        rounds=len(ours.times_ms),
        time_ms=ours.time_ms,
        selection_ms=ours.selection_ms,
        first_selection_ms=first.selection_ms,
        gflops=gflops,
        share_of_sgemm=gflops / sgemm_gflops,
        dense_ms=dense.time_ms,
        dense_extrapolated=dense.parts > 1,
        dense_rounds=dense.rounds,
        dense_gflops=4 * case.D * dense_pairs / dense.time_ms / 1e6,
        ratio_to_dense=dense.time_ms / ours.time_ms,
        flex_ms=flex_ms,
        ratio_to_flex=None if flex_ms is None else flex_ms / ours.time_ms,
        flex_note=flex.note,
        flex_difference=flex.difference,
        pairs_computed=first.pairs_computed,
        other_flops=first.other_flops,
        flops=2 * case.D * (2 * first.pairs_computed + first.pairs_scored) + first.other_flops,
        density=first.density,
        density_computed=first.density_computed,
        dense_share=first.dense_share,
        dropped_mass=first.dropped_mass,
        peak_bytes=peak_bytes,
        max_abs_error=measured.own_error.max_abs,
        error_rows=measured.own_error.num_rows,
        error_to_exact=measured.error_to_exact,
    )
