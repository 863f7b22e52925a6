"""Markdown of what was measured."""

from __future__ import annotations

from kernels.benchmarks.decode import DecodeRow
from kernels.benchmarks.edges import EdgeGrowth, EdgeRow
from kernels.benchmarks.growth import DENSE, Growth
from kernels.benchmarks.record import LeftOut
from kernels.benchmarks.rows import NOT_ASKED_FOR, Row

_COLUMNS = (
    "backend",
    "impl",
    "params",
    "shape",
    "causal",
    "N",
    "time_ms",
    "selection_ms",
    "GFLOP/s",
    "of sgemm",
    "dense_ms",
    "x dense",
    "x Flex",
    "density",
    "computed",
    "dense share",
    "peak MB",
    "max error",
)
_GROWTH_COLUMNS = (
    "backend",
    "impl",
    "params",
    "shape",
    "causal",
    "fitted on",
    "time",
    "work",
    "documented",
    "crossover N",
)
_DECODE_COLUMNS = (
    "backend",
    "params",
    "shape",
    "M",
    "time_us",
    "selection_us",
    "dense_us",
    "x dense",
    "read",
)
_EDGE_COLUMNS = (
    "backend",
    "params",
    "shape",
    "causal",
    "N",
    "density",
    "edges",
    "time_ms",
    "selection_ms",
    "dense_ms",
    "x dense",
)


def header(inputs: str) -> str:
    """Of the rows; the error against exact attention is one of these inputs alone."""
    return _head((*_COLUMNS, f"error to exact ({inputs} inputs)"), num_words=5)


def line(r: Row) -> str:
    return _line(
        r.backend,
        r.impl,
        r.params,
        r.shape,
        _yes(r.causal),
        str(r.length),
        f"{r.time_ms:.1f}",
        f"{r.selection_ms:.1f}",
        f"{r.gflops:.0f}",
        f"{r.share_of_sgemm:.2f}",
        f"{'~' if r.dense_extrapolated else ''}{r.dense_ms:.0f}{' (1 call)' if r.dense_rounds == 1 else ''}",
        f"{r.ratio_to_dense:.2f}",
        _flex(r),
        f"{r.density:.4f}",
        f"{r.density_computed:.4f}",
        f"{r.dense_share:.2f}",
        "-" if r.peak_bytes is None else f"{r.peak_bytes / 1e6:.0f}",
        "-" if r.max_abs_error is None else f"{r.max_abs_error:.1e}",
        f"{r.error_to_exact:.1e}",
    )


def _flex(r: Row) -> str:
    if r.ratio_to_flex is not None:
        return f"{r.ratio_to_flex:.2f}"
    return "-" if r.flex_note == NOT_ASKED_FOR else f"- ({r.flex_note})"


def growth_table(growths: list[Growth]) -> str:
    lines = [_growth_line(growth) for growth in growths]
    return "\n".join(
        [
            "Exponents of growth from N = 4,096 on, and where each passes dense SDPA by more than 5 % at the "
            "longest length",
            "(work: floating-point operations counted; ~: with a dense time that was extrapolated)",
            "",
            _growth_head(),
            *lines,
        ]
    )


def decode_header() -> str:
    return _head(_DECODE_COLUMNS, num_words=3)


def decode_line(r: DecodeRow) -> str:
    return _line(
        r.backend,
        r.params,
        r.shape,
        str(r.num_keys),
        f"{r.time_us:.0f}",
        f"{r.selection_us:.0f}",
        f"{r.dense_us:.0f}",
        f"{r.ratio_to_dense:.2f}",
        f"{r.read_share:.4f}",
    )


def edge_header() -> str:
    return _head(_EDGE_COLUMNS, num_words=4)


def edge_line(r: EdgeRow) -> str:
    return _line(
        r.backend,
        r.params,
        r.shape,
        _yes(r.causal),
        str(r.length),
        f"{r.density:.4f}",
        str(r.num_edges),
        f"{r.time_ms:.1f}",
        f"{r.selection_ms:.1f}",
        f"{r.dense_ms:.0f}",
        f"{r.ratio_to_dense:.2f}",
    )


def edge_growth_list(growths: list[EdgeGrowth]) -> str:
    """One line per fit."""
    lines = [
        f"- {g.backend} ({g.params}) {g.shape} N = {g.length}, {'causal' if g.causal else 'bidirectional'}: "
        f"{_exponent(g.exponent)}, beyond the time without edges {_exponent(g.exponent_beyond)}"
        for g in growths
    ]
    return "\n".join(["Exponents of growth with the edges (1: linear):", "", *lines])


def _growth_head() -> str:
    return _head(_GROWTH_COLUMNS, num_words=6)


def _growth_line(g: Growth) -> str:
    crossing = g.crossover_note if g.crossover_length is None else f"{g.crossover_length:.0f}"
    of_dense = g.backend == DENSE
    about = "~" if g.dense_extrapolated else ""
    return _line(
        g.backend,
        g.impl or "-",
        g.params or "-",
        g.shape,
        _yes(g.causal),
        _fitted(g.fitted_lengths),
        ("" if g.time_exponent is None or not of_dense else about) + _exponent(g.time_exponent),
        _exponent(g.work_exponent),
        f"{g.documented_exponent:g}",
        crossing if of_dense else about + crossing,
    )


def _fitted(lengths: tuple[int, ...]) -> str:
    """As in "4k-16k (3)"; a fit needs two lengths."""
    if len(lengths) < 2:
        return "-"
    return f"{_thousands(lengths[0])}-{_thousands(lengths[-1])} ({len(lengths)})"


def _thousands(length: int) -> str:
    return str(length) if length % 1024 else f"{length // 1024}k"


def _exponent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _head(columns: tuple[str, ...], num_words: int) -> str:
    return f"{_line(*columns)}\n|{'---|' * num_words}{'--:|' * (len(columns) - num_words)}"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def left_out_list(cases: list[LeftOut]) -> str:
    """One line per reason, with the backends and lengths it concerns."""
    lines = []
    for reason in dict.fromkeys(case.reason for case in cases):
        some = [case for case in cases if case.reason == reason]
        names = ", ".join(dict.fromkeys(case.backend for case in some))
        lengths = ", ".join(str(N) for N in sorted({case.length for case in some}))
        lines.append(f"- {names} at N = {lengths}: {reason}")
    return "\n".join(["Not run:", "", *lines])
