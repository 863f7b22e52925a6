"""The figure in words: a table per spread and budget, and where each method wins, read off the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from kernels.temperature_methods import ORACLES, REALISABLE, SCATTERBRAIN, Point

EARLIER_BAND = (0.78, 0.90)
"""Entropies over log n between which scatterbrain was the best of the three in a simulation of this figure in
numpy, before any of these backends was written: spread 0.05, the same budgets."""
EARLIER_SPREAD = 0.05


@dataclass(frozen=True)
class Run:
    """Neighbouring betas at which one method is best. ``entropy_low`` and ``entropy_high`` reach to where its
    error crosses the neighbouring winner's, taken as linear in the entropy between two betas, or to the last
    beta that was tried (``open_low``, ``open_high``)."""

    method: str
    betas: tuple[float, ...]
    entropy_low: float
    entropy_high: float
    open_low: bool
    open_high: bool


def series(points: Sequence[Point]) -> list[list[Point]]:
    """The points of each spread and budget, by ascending beta."""
    keys = dict.fromkeys((point.spread, point.budget) for point in points)
    return [sorted((p for p in points if (p.spread, p.budget) == key), key=lambda p: p.beta) for key in keys]


def runs(points: Sequence[Point]) -> list[Run]:
    """Of one spread and budget, by ascending beta: the higher it is, the lower the entropy."""
    blocks = [list(block) for _, block in groupby(points, key=lambda point: point.best)]
    borders = [_crossing(left[-1], right[0]) for left, right in pairwise(blocks)]
    found = []
    for number, block in enumerate(blocks):
        first, last = number == 0, number == len(blocks) - 1
        found.append(
            Run(
                block[0].best,
                tuple(point.beta for point in block),
                block[-1].entropy if last else borders[number],
                block[0].entropy if first else borders[number - 1],
                last,
                first,
            )
        )
    return found


def _crossing(left: Point, right: Point) -> float:
    """The entropy at which the two winners' errors meet."""
    before = left.error(right.best) - left.error(left.best)
    after = right.error(left.best) - right.error(right.best)
    share = before / (before + after) if before + after > 0 else 0.5
    return left.entropy + share * (right.entropy - left.entropy)


def markdown(points: Sequence[Point], command: str, num_draws: int) -> str:
    parts = [_head(command, num_draws)]
    for some in series(points):
        parts.append(_table(some))
    parts.append(" ".join(_sentence(some) for some in series(points)) + " " + comparison(points))
    return "\n\n".join(parts) + "\n"


def _head(command: str, num_draws: int) -> str:
    return f"""# Error against temperature at equal memory

`{command}`

512 queries and keys in 32 clusters of 16 unit vectors (spread: the norm of the noise around a centre),
head_dim 32, bidirectional, P = softmax(beta q k^T). Error: mean over rows of the sum of |P^ - P|, between 0
and 2, mean of {num_draws} draws. Bold: the smallest error of the three that can be had; ~ where it leads
the next by no more than two standard errors of the paired difference. The oracles know P and are there for
orientation. Mass: mean share of P on what the hashes found. Budgets count keys, or two per feature. Keys a
row are exact pairs, with a window of one key on each side that `lsh` always keeps. `sparse` and
scatterbrain's support are `lsh`, variant smyrf; `low-rank` is `performer`; none of them centres keys."""


def _table(points: Sequence[Point]) -> str:
    one = points[0]
    columns = ("beta", "entropy / ln n", *REALISABLE, *ORACLES, "support mass", "sparse mass")
    keys = ", ".join(f"{name} {count:.1f}" for name, count in one.keys_per_row.items() if count)
    lines = [f"| {' | '.join(columns)} |", "|" + "--:|" * len(columns)]
    lines += [_line(point) for point in points]
    return f"Spread {one.spread:g}, budget {one.budget} (keys a row: {keys})\n\n" + "\n".join(lines)


def _line(point: Point) -> str:
    cells = [f"{point.beta:g}", f"{point.entropy:.3f}"]
    for name in REALISABLE:
        told = f"{point.error(name):.3f}"
        cells.append(told if name != point.best else f"**{told}**{'' if point.told_apart else ' ~'}")
    cells += [f"{point.error(name):.3f}" for name in ORACLES]
    cells += [f"{point.support_recall:.2f}", f"{point.sparse_recall:.2f}"]
    return f"| {' | '.join(cells)} |"


def _sentence(points: Sequence[Point]) -> str:
    """Where each of the three is best, from high entropy to low."""
    told = ", ".join(f"{run.method} {_where(run)}" for run in runs(points))
    never = [name for name in REALISABLE if all(point.best != name for point in points)]
    lost = f"; {' and '.join(never)} nowhere" if never else ""
    return f"At spread {points[0].spread:g} and budget {points[0].budget}, least wrong are: {told}{lost}."


def _where(run: Run) -> str:
    if run.open_low and run.open_high:
        return "everywhere"
    if run.open_high:
        return f"at entropies above {run.entropy_low:.2f} ln n"
    if run.open_low:
        return f"below {run.entropy_high:.2f} ln n"
    return f"between {run.entropy_low:.2f} and {run.entropy_high:.2f} ln n"


def comparison(points: Sequence[Point]) -> str:
    """Scatterbrain's bands beside an independent simulation in numpy's: the last sentence."""
    bands = [(some[0], run) for some in series(points) for run in runs(some) if run.method == SCATTERBRAIN]
    low, high = EARLIER_BAND
    earlier = (
        f"an independent simulation in numpy at spread {EARLIER_SPREAD:g} had it between "
        f"{low:.2f} and {high:.2f}"
    )
    if not bands:
        return f"Scatterbrain is nowhere the best of the three; {earlier}."
    told = ", ".join(
        f"{run.entropy_low:.2f} to {run.entropy_high:.2f} (spread {point.spread:g}, budget {point.budget}, "
        f"beta {', '.join(f'{beta:g}' for beta in run.betas)})"
        for point, run in bands
    )
    same = [run for point, run in bands if point.spread == EARLIER_SPREAD]
    return (
        f"Scatterbrain is the best of the three at entropies over ln n of {told}; {earlier}{_agrees(same)}."
    )


def _agrees(bands: Sequence[Run]) -> str:
    if not bands:
        return ""
    low, high = EARLIER_BAND
    meeting = [run for run in bands if run.entropy_low < high and run.entropy_high > low]
    if not meeting:
        return ", which this run does not confirm"
    whole = any(run.entropy_low <= low and run.entropy_high >= high for run in meeting)
    return ", which a band found here contains" if whole else ", which overlaps in part"
