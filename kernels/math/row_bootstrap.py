"""An approximate upper 95 % limit of the root of a ratio of totals, from an unequal-probability sample.

    X = sum w_i x_i,  Y = sum w_i y_i,  R = X / Y,       w_i = 1 / pi_i
    V = sum (1 - pi_i) w_i^2 (x_i - R y_i)^2 / Y^2       variance of R
    replicate:  X*, Y* with w_i (1 + sqrt(1 - pi_i) (k_i - 1)),  V* with k_i w_i^2,  k_i ~ Poisson(1)
    T* = (sqrt R* - sqrt R) 2 sqrt R* / sqrt V*,         limit = sqrt R - q sqrt V / (2 sqrt R)

with q the 5 % quantile of T*: Efron's bootstrap-t ("Better bootstrap confidence intervals", JASA 1987). V is
the linearised variance of a ratio under Poisson sampling (Särndal, Swensson, Wretman, "Model assisted survey
sampling", 1992, ch. 5.6). The replicates' weights have mean 1 and variance 1 - pi_i, as those of the sample
have (Beaumont and Patak, "On the generalized bootstrap for sample surveys", Int. Stat. Rev. 2012).

It is approximate: an error that sits in few rows, none of which was drawn, is in no replicate.

n rows with pi_i < 1 (the others add to the totals and vary in no replicate), B = 399 replicates.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

REPLICATES = 399
LEVEL = 0.95
_ROWS_AT_ONCE = 4096

Floats = npt.NDArray[np.float64]


def upper_limit(x: Floats, y: Floats, probability: Floats, seed: int) -> float | None:
    """The limit of sqrt(R) from x, y, probability [rows drawn]. The same numbers give the same limit. None
    where none can be given: fewer than two drawn rows have pi < 1, or X or Y is 0 or not finite."""
    w = 1.0 / probability
    X, Y = float(w @ x), float(w @ y)
    varies = probability < 1.0
    if varies.sum() < 2 or not 0.0 < X < math.inf or not 0.0 < Y < math.inf:
        return None
    terms = _terms(x[varies], y[varies], probability[varies])
    spread = math.sqrt(_variance(terms[:, 2:].sum(0), X / Y)) / Y
    sums = _weighted_sums(terms, seed)
    moved = sums[:, :2] - terms[:, :2].sum(0)
    X_, Y_ = X + moved[:, 0], Y + moved[:, 1]
    return _limit(X / Y, spread, X_ / Y_, np.sqrt(_variance(sums[:, 2:].T, X_ / Y_)) / Y_)


def _limit(R: float, spread: float, replicates: Floats, spreads: Floats) -> float:
    """spread: of R; spreads [B]: of each replicate of it."""
    root, roots = math.sqrt(R), np.sqrt(replicates)
    varied = spreads > 0.0
    T = (roots - root)[varied] * 2.0 * roots[varied] / spreads[varied]
    q = float(np.quantile(T, 1.0 - LEVEL)) if len(T) else 0.0
    return root + max(-q, 0.0) * spread / (2.0 * root)


def _terms(x: Floats, y: Floats, probability: Floats) -> Floats:
    """What replicates add up with k_i before each term [n, 5]: the moving parts of X and Y, and x^2, xy, y^2
    as V weighs them."""
    w = 1.0 / probability
    moving, h = np.sqrt(1.0 - probability) * w, (1.0 - probability) * w * w
    return np.stack([moving * x, moving * y, h * x * x, h * x * y, h * y * y], axis=1)


def _variance(squares: Floats, R: Floats | float) -> Floats:
    """sum (1 - pi) w^2 (x - R y)^2 from its three sums [3, ...]; below 0 by rounding alone."""
    variance: Floats = np.maximum(squares[0] - 2.0 * R * squares[1] + R * R * squares[2], 0.0)
    return variance


def _weighted_sums(terms: Floats, seed: int) -> Floats:
    """sum_i k_i terms_i for B draws of k [B, 5]."""
    generator = np.random.PCG64(seed & (1 << 64) - 1)
    sums = np.zeros((REPLICATES, terms.shape[1]))
    for a in range(0, len(terms), _ROWS_AT_ONCE):
        some = terms[a : a + _ROWS_AT_ONCE]
        sums += _poisson(generator, REPLICATES * len(some)).reshape(REPLICATES, -1) @ some
    return sums


def _poisson(generator: np.random.PCG64, count: int) -> Floats:
    """Poisson(1) by inversion of 16 random bits each, a stream that numpy keeps from release to release."""
    raw = np.asarray(generator.random_raw(-(-count // 4)), dtype="<u8")
    drawn: Floats = _POISSON[raw.view("<u2")[:count]]
    return drawn


def _poisson_table() -> Floats:
    """The value for each of 2^16 equal steps of the distribution function: mean, variance 1 within 3e-4."""
    upto = np.cumsum([math.exp(-1.0) / math.factorial(k) for k in range(9)])
    return np.searchsorted(upto, (np.arange(1 << 16) + 0.5) / (1 << 16)).astype(np.float64)


_POISSON = _poisson_table()
