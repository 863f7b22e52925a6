"""Figures of one layer's heads, from its queries, keys and values while the model reads.

The attention that the layer goes on with is computed here too, in stretches of rows with a yield point before
each: exact, or the layer's own window.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kernels.api import attend, parse_params
from kernels.contract import Backend, Params
from kernels.math import diagnostics as rows_of
from kernels.math.diagnostics_budget import BudgetErrors, budget_errors, budget_maps
from kernels.math.diagnostics_rank import effective_rank, logit_singular_values
from kernels.registry import load
from models.contract import Choice
from models.diagnose_regime import recommend, regime_of, spec_of
from models.diagnose_told import (
    BOTTLENECK_RATIO,
    MASS_SHARES,
    RANK_ENERGY,
    Asked,
    BudgetFigures,
    Candidate,
    HeadFigures,
    LayerFigures,
)
from models.forward import offer_to_pause
from models.seam import LayerPlan, window_params
from models.stretches import permits

STRETCH_ROWS = 256


@dataclass(frozen=True)
class Heads:
    """One layer's attention call: q [1, H, N, D], k [1, Hk, N, D], v [1, Hk, N, Dv], and its number."""

    number: int
    plan: LayerPlan
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    learned: dict[str, object]

    @property
    def num_tokens(self) -> int:
        return self.q.shape[2]

    @cached_property
    def exact(self) -> Attended:
        """As the layer itself attends."""
        if self.plan.window is not None:
            return self.under("window", window_params(self.plan.window))
        return self.under("exact", parse_params("exact"))

    def under(self, name: str, params: Params, seed: int = 0) -> Attended:
        """All rows under one attention, in stretches where that changes nothing."""
        parts = [self._rows(load(name), params, seed, part) for part in self._stretches(load(name), params)]
        kept, every = sum(p.kept for p in parts), sum(p.every for p in parts)
        lse = None if parts[0].lse is None else torch.cat([p.lse for p in parts if p.lse is not None], -1)
        return Attended(torch.cat([p.out for p in parts], 2), lse, kept, every)

    def _stretches(self, backend: Backend, params: Params) -> list[slice]:
        n, tile = self.num_tokens, params.chunk_multiple()
        height = -(-STRETCH_ROWS // tile) * tile if permits(backend, params, False) else n
        return [slice(begin, min(begin + height, n)) for begin in range(0, n, height)]

    def _rows(self, backend: Backend, params: Params, seed: int, rows: slice) -> Attended:
        offer_to_pause()
        stop = rows.stop if self.plan.causal else self.num_tokens
        found = attend(
            self.q[:, :, rows],
            self.k[:, :, :stop],
            self.v[:, :, :stop],
            backend=backend.name,
            params=params,
            causal=self.plan.causal,
            scale=self.scale,
            seed=seed,
            layer=self.plan.ordinal,
            start=rows.start,
            learned=self.learned.get(backend.name),
        )
        return Attended(found.out, found.lse, found.stats.pairs_kept, found.stats.pairs_exact)


@dataclass(frozen=True)
class Attended:
    """``out`` [1, H, N, Dv], ``lse`` [1, H, N] or None, and pairs kept of those that exact computes."""

    out: Tensor
    lse: Tensor | None
    kept: int
    every: int


@dataclass(frozen=True)
class _HeadRows:
    """What the sampled rows of one head say, and its ranks."""

    entropy: float
    relative_entropy: float | None
    keys: dict[str, float]
    rank: int
    errors: BudgetFigures | None


def figures_of(heads: Heads, asked: Asked, choices: list[Choice]) -> LayerFigures:
    """Everything about one layer. Yields between its parts."""
    positions = rows_of.sample_positions(heads.num_tokens, asked.rows, asked.seed)
    measured = [_measure(heads, choice) for choice in choices]
    found = [row for group in range(heads.k.shape[1]) for row in _of_group(heads, group, positions, asked)]
    told = tuple(_head(h, row, measured, asked, heads) for h, row in enumerate(found))
    errors = mean_errors([row.errors for row in found])
    regime = regime_of(errors, asked.tolerance)
    spec, reason = recommend(regime, measured, [each.kept_mass for each in measured], asked)
    return LayerFigures(heads.number, told, tuple(measured), errors, regime, spec, reason)


def mean_errors(errors: list[BudgetFigures | None]) -> BudgetFigures | None:
    """Means over those that have figures."""
    known = [each for each in errors if each is not None]
    if not known:
        return None
    sums = ((sum(getattr(each, name) for each in known)) for name in ("sparse", "low_rank", "both"))
    return BudgetFigures(*(total / len(known) for total in sums))


def _measure(heads: Heads, choice: Choice) -> Candidate:
    """Run a candidate on the layer, and hold it against exact."""
    got, exact = heads.under(choice.backend, choice.params, choice.seed), heads.exact
    assert exact.lse is not None
    norm = exact.out.double().norm().item()
    off = (got.out.double() - exact.out.double()).norm().item() / norm if norm else 0.0
    per_head = None
    if got.lse is not None:
        per_head = tuple(rows_of.kept_mass(got.lse, exact.lse)[0].mean(-1).tolist())
    mean = None if per_head is None else sum(per_head) / len(per_head)
    return Candidate(spec_of(choice), mean, per_head, off, got.kept / got.every if got.every else 1.0)


def _of_group(heads: Heads, group: int, positions: Tensor, asked: Asked) -> list[_HeadRows]:
    """The query heads of one key head."""
    size = heads.plan.num_heads // heads.k.shape[1]
    q, k = heads.q[0, group * size : (group + 1) * size], heads.k[0, group]
    offer_to_pause()
    ranks = effective_rank(logit_singular_values(q, k.expand(size, -1, -1)), RANK_ENERGY)
    offer_to_pause()
    rows = q[:, positions.to(q.device)]
    logits = rows_of.row_logits(rows, k, positions, heads.scale, heads.plan.causal)
    probabilities = logits.softmax(-1)
    in_sight = rows_of.keys_in_sight(positions, len(k), heads.plan.causal).to(q.device)
    nats = rows_of.entropy(probabilities)
    relative = rows_of.relative_entropy(nats, in_sight)
    cumulated = rows_of.sorted_mass(probabilities)
    offer_to_pause()
    errors = _errors(heads, group, rows, logits, in_sight > asked.budget, asked)
    return [
        _HeadRows(
            entropy=nats[h].mean().item(),
            relative_entropy=_mean_or_none(relative[h]),
            keys={
                f"{share:g}": rows_of.keys_for_mass(cumulated[h], share).double().mean().item()
                for share in MASS_SHARES
            },
            rank=int(ranks[h]),
            errors=None if errors is None else _figures(errors, h),
        )
        for h in range(size)
    ]


def _errors(
    heads: Heads, group: int, rows: Tensor, logits: Tensor, wide: Tensor, asked: Asked
) -> BudgetErrors | None:
    if not wide.any():
        return None
    shape = heads.plan.shape
    maps = budget_maps(
        asked.budget,
        shape.num_kv_heads,
        shape.key_dim,
        heads.scale,
        asked.seed,
        heads.plan.ordinal,
        rows.device,
    )
    return budget_errors(rows[:, wide], heads.k[0, group], logits[:, wide], asked.budget, maps.of_head(group))


def _figures(errors: BudgetErrors, head: int) -> BudgetFigures:
    each = (errors.sparse, errors.low_rank, errors.both)
    return BudgetFigures(*(tensor[head].mean().item() for tensor in each))


def _head(head: int, row: _HeadRows, measured: list[Candidate], asked: Asked, heads: Heads) -> HeadFigures:
    kept = [None if c.kept_mass_per_head is None else c.kept_mass_per_head[head] for c in measured]
    regime = regime_of(row.errors, asked.tolerance)
    ratio = row.rank / heads.plan.shape.key_dim
    return HeadFigures(
        head=head,
        entropy=row.entropy,
        relative_entropy=row.relative_entropy,
        kept_mass=kept[0],
        keys_for_mass=row.keys,
        effective_rank=row.rank,
        rank_ratio=ratio,
        low_rank_bottleneck=ratio >= BOTTLENECK_RATIO,
        errors=row.errors,
        regime=regime,
        recommended=recommend(regime, measured, kept, asked)[0],
    )


def _mean_or_none(values: Tensor) -> float | None:
    known = values[~values.isnan()]
    return known.mean().item() if len(known) else None


def pooled(layers: list[LayerFigures]) -> list[Candidate]:
    """Each candidate over all layers: means."""
    return [
        reduce_candidates([layer.candidates[i] for layer in layers]) for i in range(len(layers[0].candidates))
    ]


def reduce_candidates(same: list[Candidate]) -> Candidate:
    num = len(same)
    masses = [c.kept_mass for c in same if c.kept_mass is not None]
    return Candidate(
        spec=same[0].spec,
        kept_mass=sum(masses) / num if len(masses) == num else None,
        kept_mass_per_head=None,
        output_error=sum(c.output_error for c in same) / num,
        density=sum(c.density for c in same) / num,
    )
