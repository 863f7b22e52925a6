"""Scatterbrain's figure: error of sparse, low-rank and both together against the softmax's temperature.

    python -m kernels.temperature --json t.json --markdown t.md --plot t.png          a minute

At high temperature (small beta) weights are spread and random features are right; at low temperature few keys
hold the mass and hashes find them; scatterbrain is for what lies between. Chen et al., "Scatterbrain" (arXiv
2110.15343), at the equal memory of their code; what is run and compared stands in
``kernels.temperature_methods``. Clusters of unit vectors, as made here, are no text.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from kernels.temperature_methods import (
    CLUSTER_SIZE,
    HEAD_DIM,
    NUM_CLUSTERS,
    NUM_TOKENS,
    Point,
    draw_sample,
    measure,
)
from kernels.temperature_plot import plot
from kernels.temperature_told import markdown, runs, series

BETAS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
BUDGETS = (64, 128)
SPREADS = (0.05, 0.3)
NUM_DRAWS = 8
_MAX_BUDGET = 8 * CLUSTER_SIZE


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    asked = _asked(arguments)
    command = shlex.join(["python", "-m", "kernels.temperature", *arguments])
    points = figure(asked.betas, asked.budgets, asked.spreads, asked.draws)
    told = markdown(points, command, asked.draws)
    print(told)
    if asked.json:
        asked.json.write_text(_json(points, command, asked.draws), encoding="utf-8")
    if asked.markdown:
        asked.markdown.write_text(told, encoding="utf-8")
    if asked.plot:
        plot(points, asked.plot)
    return 0


def figure(
    betas: Sequence[float], budgets: Sequence[int], spreads: Sequence[float], num_draws: int
) -> list[Point]:
    """Every point, each over the same draws."""
    points = []
    for spread in spreads:
        samples = [draw_sample(spread, seed) for seed in range(num_draws)]
        for budget in budgets:
            for beta in betas:
                point = Point(budget, spread, beta)
                for sample in samples:
                    measure(point, sample)
                points.append(point)
    return points


def _json(points: Sequence[Point], command: str, num_draws: int) -> str:
    told: dict[str, Any] = {
        "command": command,
        "torch": torch.__version__,
        "num_tokens": NUM_TOKENS,
        "head_dim": HEAD_DIM,
        "num_clusters": NUM_CLUSTERS,
        "num_draws": num_draws,
        "points": [asdict(point) | {"best": point.best, "told_apart": point.told_apart} for point in points],
        "bands": [
            {"spread": some[0].spread, "budget": some[0].budget, "runs": [asdict(run) for run in runs(some)]}
            for some in series(points)
        ],
    }
    return json.dumps(told, indent=1) + "\n"


def _asked(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.temperature", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--betas", type=_positive, nargs="+", default=BETAS, help="inverse temperatures")
    add("--budgets", type=_budget, nargs="+", default=BUDGETS, help="keys, or two per feature")
    add("--spreads", type=_positive, nargs="+", default=SPREADS, help="noise around a cluster's centre")
    add("--draws", type=_count, default=NUM_DRAWS, metavar="COUNT", help=f"default {NUM_DRAWS}")
    add("--json", type=_writable, metavar="FILE", help="every number of every draw")
    add("--markdown", type=_writable, metavar="FILE", help="what is printed")
    add("--plot", type=_writable, metavar="FILE.png", help="the figure (needs matplotlib)")
    asked = parser.parse_args(argv)
    if asked.plot and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed: pip install 'matplotlib>=3.10'")
    asked.betas = sorted(set(asked.betas))
    return asked


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and up to 100, got {text!r}")
    return value


def _budget(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= _MAX_BUDGET or int(text) % CLUSTER_SIZE:
        raise argparse.ArgumentTypeError(
            f"expected a multiple of {CLUSTER_SIZE} (keys per hash round) up to {_MAX_BUDGET}, got {text!r}"
        )
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _writable(text: str) -> Path:
    path = Path(text)
    if not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {path.resolve().parent}")
    return path


if __name__ == "__main__":
    sys.exit(main())
