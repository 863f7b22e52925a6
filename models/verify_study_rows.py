"""The true error of every row of a layer, and rows of three numbers that stand for whole ones.

    x_i = |(o^_i - o_i) W_O|^2      y_i = |o_i W_O|^2      u_i = |o^_i W_O|^2
    error of the layer = sqrt( sum x / sum y )

o exact's output of a row, o^ the backend's from the same q, k, v, W_O the output projection. A sample of rows
is judged by x, y and u alone, so a row can be replaced by any pair of vectors with the same three: a triangle
with sides sqrt(y), sqrt(u) and sqrt(x). That lets thousands of samples run through the served code without
any attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.api import attend
from kernels.contract import AttentionResult
from models.quality_contenders import Contender, contender
from models.quality_ladders import EXACT
from models.quality_record import LayerRecord, chunks


@dataclass(frozen=True)
class RowLosses:
    """One backend in one layer: x, y, u [N] float64 of every row; ``fault`` [N] the part of x that was
    planted and is perpendicular to all else; ``dropped`` [N] fp32, each row's own estimate of the mass left
    out, None where the backend has none."""

    layer: int
    x: Tensor
    y: Tensor
    u: Tensor
    fault: Tensor
    dropped: Tensor | None

    @property
    def total(self) -> int:
        return self.x.numel()

    @property
    def error(self) -> float:
        return float((self.x.sum() / self.y.sum()).sqrt())

    @property
    def ratios(self) -> Tensor:
        """|(o^ - o) W_O| / |o W_O| of every row [N]."""
        return torch.where(self.x > 0, (self.x / self.y).sqrt(), 0.0)

    def last(self, count: int) -> RowLosses:
        """The last ``count`` rows alone."""
        x, y, u, fault = (each[-count:] for each in (self.x, self.y, self.u, self.fault))
        return RowLosses(self.layer, x, y, u, fault, None if self.dropped is None else self.dropped[-count:])

    def with_fault(self, broken: Tensor) -> RowLosses:
        """These rows with an error of 1.0 added to those of ``broken`` (bool [N]): a wrong vector as long as
        the exact output and perpendicular to it. ``dropped`` knows nothing of it."""
        added = self.y * broken
        return replace(self, x=self.x + added, u=self.u + added, fault=self.fault + added)


def triangles(losses: RowLosses, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Exact and used rows [1, 1, R, 3] float32 at ``positions`` [R] with the same x, y and u, to be projected
    by the unit matrix. The third number is the planted fault."""
    x, y, u, fault = (each[positions] for each in (losses.x, losses.y, losses.u, losses.fault))
    x, u, side = x - fault, u - fault, y.sqrt()
    along = torch.where(y > 0, (u + y - x) / (2 * side.clamp_min(1e-150)), u.sqrt())
    across = (u - along.square()).clamp_min(0).sqrt()
    none = torch.zeros_like(side)
    exact = torch.stack([side, none, none], -1)
    used = torch.stack([along, across, fault.sqrt()], -1)
    return exact.float()[None, None], used.float()[None, None]


@torch.inference_mode()
def row_losses(
    record: LayerRecord, contenders: Sequence[Contender], chunk_tokens: int, seed: int
) -> list[RowLosses]:
    """Every row of a recorded layer under each contender, in chunks as a server reads them."""
    projection = record.w_o.t().float()
    exact, _ = _rows(record, contender(EXACT, {}), chunk_tokens, seed, projection)
    found = []
    for each in contenders:
        used, dropped = _rows(record, each, chunk_tokens, seed, projection)
        x, y, u = (_squares(rows) for rows in (used - exact, exact, used))
        found.append(RowLosses(record.plan.ordinal, x, y, u, torch.zeros_like(x), dropped))
    return found


def _rows(
    record: LayerRecord, its: Contender, chunk_tokens: int, seed: int, projection: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Outputs through W_O [N, E], and ``dropped`` [N], mean over heads."""
    outs: list[Tensor] = []
    dropped: list[Tensor] = []
    for rows in chunks(record.q.shape[2], chunk_tokens):
        result = _attend(record, its, rows, seed)
        outs.append(result.out[0].float().transpose(0, 1).flatten(1) @ projection)
        if result.dropped is not None:
            dropped.append(result.dropped[0].mean(0))
    return torch.cat(outs), torch.cat(dropped) if dropped else None


def _squares(rows: Tensor) -> Tensor:
    return rows.double().square().sum(-1)


def _attend(record: LayerRecord, its: Contender, rows: slice, seed: int) -> AttentionResult:
    return attend(
        record.q[:, :, rows],
        record.k[:, :, : rows.stop],
        record.v[:, :, : rows.stop],
        backend=its.backend,
        params=its.choice(seed).params,
        causal=record.plan.causal,
        scale=record.scale,
        seed=seed,
        layer=record.plan.ordinal,
        start=rows.start,
        learned=record.learned.get(its.backend),
    )
