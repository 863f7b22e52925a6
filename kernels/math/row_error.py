"""The measured error of a layer's attention, from rows that were computed twice.

    o_i exact attention's output of row i, o^_i the one used, of the same q, k, v;  W the output projection
    x_i = |(o^_i - o_i) W|^2        y_i = |o_i W|^2
    error     = sqrt(X / Y)         X, Y: sums of x_i, y_i over all rows
    estimate  = sqrt(X^ / Y^)       X^ = sum x_i / pi_i,  Y^ = sum y_i / pi_i over the rows drawn
    row bound = max of sqrt(x_i / y_i) over an even draw of n >= 59 rows:    0.95^59 = 0.049

Both totals are expanded from the same rows (Horvitz and Thompson, JASA 1952): where errors are about as
large as outputs, x_i and y_i rise and fall together and the chance of the draw cancels in the ratio. The sum
of |o^_i W|^2, known of all rows, does worse as a denominator: alone it is off where o^ is far from o (an
estimate of 7 where the true error is 0.98), corrected by the rows drawn it can fall below 0. The bound is
Wilks' (Ann. Math. Stat. 1941) and assumes nothing about the errors. The upper limit is a bootstrap-t
(``kernels.math.row_bootstrap``).

Which rows are drawn: ``kernels.math.row_sampling``; their exact outputs: ``kernels.math.row_exact``. Letters
as in ``kernels.contract``; R rows drawn, E model width. Errors are local to a layer: what they do to the
answer is another question.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.contract import Impl
from kernels.math.row_bootstrap import upper_limit
from kernels.math.row_exact import exact_rows, runs_triton
from kernels.math.row_sampling import DecodeSampler, DrawnRows, Rows, RowSampler

__all__ = ["DecodeSampler", "DrawnRows", "ErrorFigures", "RowErrors", "RowSampler", "Rows", "exact_rows"]

BOUND_SHARE = 0.95
BOUND_CONFIDENCE = 0.95
ROWS_AT_ONCE = 64
"""Every head's part of so many rows, [H, R, E], exists at once."""


@dataclass(frozen=True)
class ErrorFigures:
    """What is known of one layer.

    ``estimate`` of sqrt(X / Y); inf where every output drawn is 0 and some error is not.
    ``approx_upper_95``: an approximate upper 95 % limit of it; None where the rows cannot say (no error found
    in any, or fewer than two drawn by chance). Equal to ``estimate`` where every row was looked at.
    ``row_bound``: with 95 % confidence (over the draw) at least 95 % of the rows that the layer computed err
    by at most this, |(o^ - o) W| <= row_bound |o W|, whatever the distribution of errors. It is the largest
    ratio of the even draw, or with 93 rows and more in it the highest order statistic that still has this
    confidence; where every row was looked at, the true 95 % quantile. None below 59 evenly drawn rows: no
    statement of this kind holds.
    ``rows`` looked at, of ``rows_total``. ``head_shares`` [H]: sum of |(o^_h - o_h) W_h|^2 expanded over all
    rows, divided by its sum over heads (so they add up to 1, or are all 0; what heads cancel among each other
    is not in them). ``of_residual``: sqrt(X^ / sum |residual stream|^2); None where that sum is not known.

    Outputs that are not finite give figures that are not.
    """

    estimate: float
    approx_upper_95: float | None
    row_bound: float | None
    rows: int
    rows_total: int
    head_shares: tuple[float, ...]
    of_residual: float | None


@dataclass(frozen=True, eq=False)
class _Looked:
    """Rows of one ``add`` or of several, on the CPU: x, y, probability float64 [R], uniform bool [R]; heads
    float64 [H], sums over the rows of the heads' own squares / pi."""

    x: Tensor
    y: Tensor
    probability: Tensor
    uniform: Tensor
    heads: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def then(self, other: _Looked) -> _Looked:
        return _Looked(
            torch.cat([self.x, other.x]),
            torch.cat([self.y, other.y]),
            torch.cat([self.probability, other.probability]),
            torch.cat([self.uniform, other.uniform]),
            self.heads + other.heads,
        )


class RowErrors:
    """Errors of the drawn rows of one layer, gathered step by step. Picklable; ``copy`` shares what was
    gathered, and neither sees what the other gathers then. R rows from any number of steps take O(R) bytes
    in O(log R) pieces: 25 bytes a row, beside what a piece takes."""

    def __init__(self) -> None:
        self._looked: tuple[_Looked, ...] = ()
        self._rows_total = 0
        self._residual_squares: float | None = 0.0

    @property
    def rows(self) -> int:
        """Looked at so far."""
        return sum(map(len, self._looked))

    @property
    def rows_total(self) -> int:
        """Of all steps so far, looked at or not (``add_totals``)."""
        return self._rows_total

    def copy(self) -> RowErrors:
        other = RowErrors()
        other.merge(self)
        return other

    def merge(self, other: RowErrors) -> None:
        """Add what another gathered about other rows of the same layer."""
        for each in other._looked:
            self._looked = _gathered(self._looked, each)
        self.add_totals(other._rows_total, other._residual_squares)

    def add(self, drawn: DrawnRows, exact: Tensor, used: Tensor, w_o: Tensor, *, impl: Impl = "auto") -> None:
        """exact and used [1, H, R, Dv] of the rows ``drawn``, w_o [E, H Dv] (head h: columns h Dv ..
        (h + 1) Dv), all of any float dtype. O(R E H Dv) time, memory for 64 rows [H, 64, E] (impl triton:
        squares alone). ``impl`` as for ``exact_rows``. ValueError where shapes do not fit or impl triton
        cannot compute them."""
        _check(drawn, exact, used, w_o)
        if len(drawn):
            look = _look_by_triton if runs_triton(exact, exact, impl) else _look
            self._looked = _gathered(self._looked, look(drawn, exact[0], used[0], w_o))

    def add_totals(self, rows: int, residual_squares: float | None) -> None:
        """Of all rows of a step, drawn or not: how many, and the sum of squares of the residual stream they
        add to (None: not known)."""
        self._rows_total += rows
        if residual_squares is None or self._residual_squares is None:
            self._residual_squares = None
        else:
            self._residual_squares += residual_squares

    def figures(self, seed: int) -> ErrorFigures:
        """``seed`` draws the bootstrap's replicates: the same rows and seed give the same figures. ValueError
        where no row was looked at."""
        if not self._looked:
            raise ValueError("no row was looked at: there is nothing to estimate from")
        x, y, pi = (self._joined(name) for name in ("x", "y", "probability"))
        X, rows_total = float((x / pi).sum()), max(self._rows_total, len(x))
        estimate = math.sqrt(_ratio(X, float((y / pi).sum())))
        every_row = len(x) == rows_total
        return ErrorFigures(
            estimate=estimate,
            approx_upper_95=estimate if every_row else upper_limit(x.numpy(), y.numpy(), pi.numpy(), seed),
            row_bound=_row_bound(_ratios(x, y), self._joined("uniform"), every_row),
            rows=len(x),
            rows_total=rows_total,
            head_shares=self._head_shares(),
            of_residual=math.sqrt(X / self._residual_squares) if self._residual_squares else None,
        )

    def _joined(self, name: str) -> Tensor:
        return torch.cat([getattr(each, name) for each in self._looked])

    def _head_shares(self) -> tuple[float, ...]:
        heads = torch.stack([each.heads for each in self._looked]).sum(0)
        total = heads.sum()
        return tuple((heads / torch.where(total == 0, 1.0, total)).tolist())


def _gathered(before: tuple[_Looked, ...], new: _Looked) -> tuple[_Looked, ...]:
    """In order; pieces double from the last to the first, so that a row is moved O(log R) times. One piece a
    row would take kilobytes, and a long decode has tens of thousands."""
    while before and len(before[-1]) <= len(new):
        before, new = before[:-1], before[-1].then(new)
    return (*before, new)


def _look(drawn: DrawnRows, exact: Tensor, used: Tensor, w_o: Tensor) -> _Looked:
    """exact, used [H, R, Dv]."""
    dtype = torch.promote_types(exact.dtype, torch.float32)
    w = w_o.to(dtype)
    parts = [
        _look_at(drawn.probability[rows], exact[:, rows].to(dtype), used[:, rows].to(dtype), w)
        for rows in (slice(a, a + ROWS_AT_ONCE) for a in range(0, len(drawn), ROWS_AT_ONCE))
    ]
    x, y = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    heads = torch.stack([part[2] for part in parts]).sum(0)
    return _Looked(x, y, drawn.probability, drawn.uniform, heads)


def _look_by_triton(drawn: DrawnRows, exact: Tensor, used: Tensor, w_o: Tensor) -> _Looked:
    """exact, used [H, R, Dv]. Read back once."""
    from kernels._triton.row_error import row_squares

    exact, used, w_o = (x if x.stride(-1) == 1 else x.contiguous() for x in (exact.float(), used, w_o))
    squares = torch.cat(row_squares(exact, used, w_o)).cpu().double()
    x, y = squares[-2], squares[-1]
    return _Looked(x, y, drawn.probability, drawn.uniform, (squares[:-2] / drawn.probability).sum(-1))


def _look_at(pi: Tensor, exact: Tensor, used: Tensor, w_o: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, y [R] and heads [H], on the CPU."""
    H, R, Dv = exact.shape
    of_heads = torch.bmm(used - exact, torch.unflatten(w_o, 1, (H, Dv)).permute(1, 2, 0))  # [H, R, E]
    output = exact.transpose(0, 1).reshape(R, H * Dv) @ w_o.mT
    norms = [torch.linalg.vector_norm(rows, dim=-1) for rows in (of_heads, of_heads.sum(0), output)]
    squares = torch.cat([norms[0], *(each[None] for each in norms[1:])]).cpu().double().square()
    return squares[H], squares[H + 1], (squares[:H] / pi).sum(-1)


def _ratio(X: float, Y: float) -> float:
    if Y:
        return X / Y
    return math.inf if X else 0.0


def _ratios(x: Tensor, y: Tensor) -> Tensor:
    """sqrt(x / y): 0 for an output of 0 that was met exactly, inf for one that was not."""
    return torch.where(x == 0, 0.0, x / y).sqrt()


def _row_bound(ratios: Tensor, uniform: Tensor, every_row: bool) -> float | None:
    if every_row:
        above = len(ratios) - math.ceil(BOUND_SHARE * len(ratios))
    else:
        ratios = ratios[uniform]
        above = _rows_above(len(ratios))
    return float(ratios.sort(descending=True).values[above]) if above >= 0 else None


def _rows_above(n: int) -> int:
    """How many of n evenly drawn rows may lie above the bound: the largest a with P(Binomial(n, 0.05) <= a)
    <= 0.05; -1 below 59 rows, where even a = 0 has none. Draws without replacement are safer still."""
    a = torch.arange(math.ceil((1.0 - BOUND_SHARE) * n) + 1, dtype=torch.float64)
    ways = math.lgamma(n + 1) - torch.lgamma(a + 1) - torch.lgamma(n - a + 1)
    chance = torch.exp(ways + a * math.log(1.0 - BOUND_SHARE) + (n - a) * math.log(BOUND_SHARE)).cumsum(0)
    return int((chance <= 1.0 - BOUND_CONFIDENCE).sum()) - 1


def _check(drawn: DrawnRows, exact: Tensor, used: Tensor, w_o: Tensor) -> None:
    if exact.dim() != 4 or exact.shape != used.shape or exact.shape[0] != 1 or exact.shape[2] != len(drawn):
        raise ValueError(
            f"exact {tuple(exact.shape)} and used {tuple(used.shape)} must both be [1, H, R, Dv] of the R = "
            f"{len(drawn)} rows drawn"
        )
    if w_o.dim() != 2 or w_o.shape[1] != exact.shape[1] * exact.shape[3]:
        raise ValueError(
            f"w_o has shape {tuple(w_o.shape)}: [E, {exact.shape[1] * exact.shape[3]}] is needed"
        )
