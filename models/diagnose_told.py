"""What a diagnosis says, as plain numbers, and what it is asked.

Means are over the sampled rows unless said otherwise. Layers are numbered as in ``ModelInfo.applied_layers``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from models.contract import Choice

Regime = Literal["sparse", "low-rank", "both", "neither"]
Spec = dict[str, Any]
"""An attention as requests name it: ``{"backend": .., "params": {..}}``."""

MAX_TOKENS = 4096
"""A longer text would hold the logits of its sampled rows for too long."""
MAX_ARM_TOKENS = 512
MAX_PATH_HEADS = 1024
"""Paths are summed only where layers times heads are no more: the work grows with the square of layers."""
MAX_PATH_VALUES = 1 << 25
"""Numbers of all path sums at once: (layers + 1) x tokens x width."""
MASS_SHARES = (0.5, 0.9, 0.95)
RANK_ENERGY = 0.99
BOTTLENECK_RATIO = 0.9


@dataclass(frozen=True)
class Asked:
    """``support``: its kept mass is told beside that of the other candidates. ``budget``: keys per row that a
    sparse method may keep. ``tolerance``: share of a row's mass that may be misplaced. ``rows``: sampled rows
    of a layer. ``arm_tokens``: tokens of the text that the four arms and the paths read (0: neither)."""

    layers: tuple[int, ...]
    support: Choice
    budget: int = 256
    tolerance: float = 0.1
    rows: int = 64
    arm_tokens: int = 128
    seed: int = 0


@dataclass(frozen=True)
class Candidate:
    """A choice that really ran on a layer's queries and keys. ``kept_mass`` over all rows and heads, None
    where the backend approximates what it does not keep; ``output_error`` |ô - o| / |o| of all rows and
    heads (before the output projection); ``density`` of the pairs that exact computes."""

    spec: Spec
    kept_mass: float | None
    kept_mass_per_head: tuple[float, ...] | None
    output_error: float
    density: float


@dataclass(frozen=True)
class BudgetFigures:
    """Total variation at equal memory, means over the sampled rows that see more keys than the budget."""

    sparse: float
    low_rank: float
    both: float


@dataclass(frozen=True)
class HeadFigures:
    head: int
    entropy: float
    relative_entropy: float | None
    kept_mass: float | None
    """Of the support asked for, over all rows."""
    keys_for_mass: dict[str, float]
    effective_rank: int
    rank_ratio: float
    low_rank_bottleneck: bool
    errors: BudgetFigures | None
    regime: Regime | None
    recommended: Spec


@dataclass(frozen=True)
class LayerFigures:
    layer: int
    heads: tuple[HeadFigures, ...]
    candidates: tuple[Candidate, ...]
    errors: BudgetFigures | None
    regime: Regime | None
    recommended: Spec
    reason: str


@dataclass(frozen=True)
class Arm:
    """|X - 1 x^T| / |X| of what each layer reads, and of what the last one gives: layers + 1 numbers."""

    name: Literal["attention", "attention+skip", "attention+mlp", "full"]
    residuals: tuple[float, ...]


@dataclass(frozen=True)
class PathLength:
    """All paths of one length together: how many there are (beyond what integers of 64 bits
    hold), their sum's share of the output's Frobenius norm
    (shares need not sum to 1), and its rank-1 residual."""

    length: int
    num_paths: float
    norm_share: float
    residual: float


@dataclass(frozen=True)
class Paths:
    """Of the network with attention and skips alone. ``sum_error``: largest |sum of paths - output| over the
    largest |output|."""

    lengths: tuple[PathLength, ...]
    bias_norm_share: float
    sum_error: float


@dataclass(frozen=True)
class RankCollapse:
    """``residuals`` over all tokens in the run itself; ``residual_floor`` is what rounding leaves of a matrix
    of equal rows, in the model's dtype. Arms and paths are None for the ``reason``."""

    residuals: tuple[float, ...] | None
    residual_floor: float
    arm_tokens: int
    arms: tuple[Arm, ...] | None
    arms_reason: str | None
    paths: Paths | None
    paths_reason: str | None


@dataclass(frozen=True)
class Diagnosis:
    tokens: int
    rows: tuple[int, ...]
    """Positions of the sampled rows."""
    layers: tuple[LayerFigures, ...]
    rank_collapse: RankCollapse
    errors: BudgetFigures | None
    regime: Regime | None
    recommended: Spec
    reason: str
