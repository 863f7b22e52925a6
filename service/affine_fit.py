"""A line through what is measured, following the machine:

    y = overhead * count + rate * work,   overhead >= 0, rate >= 0

fitted by weighted least squares on relative errors, so that a decoded token and a chunk of a prompt count
alike. Observations are kept as sums by size of ``work`` (factors of four), each fading with the next of its
own size: long stretches of one size forget nothing about the others. What the data leave open (all of one
size) stays where it was: each fit is pulled towards the last (proximal point). One observation moves a fit
by a few per cent however large it is; three in a row that agree are believed."""

from __future__ import annotations

import math
from dataclasses import dataclass

KEEP = 0.94
"""What is left of an observation's weight after the next of its size."""
PULL = 0.02
"""Weight of the pull towards the last line, of that of all observations."""
SURPRISE = 1.6
"""A ratio of measured to expected beyond this, either way, is taken for a hiccup unless it lasts."""
BELIEVED_AFTER = 3
DOUBTED = 0.1
"""What is left of the weight of a size's older observations once those that contradict them are believed."""
ENOUGH = 3
"""Observations after which a fit is calibrated."""
NEAR = 1.5
"""A value's error is relative to what was predicted, within such a factor of the value."""
LEAST_DETERMINANT = 1e-9


@dataclass(slots=True)
class _Size:
    """Weighted sums over observations of about one size; c count, w work, y measured."""

    seen: int = 0
    streak: int = 0
    cc: float = 0.0
    cw: float = 0.0
    ww: float = 0.0
    cy: float = 0.0
    wy: float = 0.0
    c: float = 0.0
    w: float = 0.0
    y: float = 0.0
    n: float = 0.0

    def fade(self, keep: float) -> None:
        for name in ("cc", "cw", "ww", "cy", "wy", "c", "w", "y", "n"):
            setattr(self, name, getattr(self, name) * keep)

    def add(self, c: float, w: float, y: float) -> None:
        self.cc, self.cw, self.ww = self.cc + c * c, self.cw + c * w, self.ww + w * w
        self.cy, self.wy = self.cy + c * y, self.wy + w * y
        self.c, self.w, self.y, self.n = self.c + c, self.w + w, self.y + y, self.n + 1


class AffineFit:
    """``overhead`` and ``rate`` start at what is assumed before anything is measured."""

    def __init__(self, overhead: float, rate: float) -> None:
        self.line = overhead, rate
        self.seen = 0
        self._least_rate = rate * 1e-3
        self._sizes: dict[int, _Size] = {}

    @property
    def overhead(self) -> float:
        return self.line[0]

    @property
    def rate(self) -> float:
        return self.line[1]

    @property
    def calibrated(self) -> bool:
        return self.seen >= ENOUGH

    def predict(self, count: float, work: float) -> float:
        overhead, rate = self.line
        return overhead * count + rate * work

    def observe(self, count: float, work: float, measured: float) -> None:
        """``measured`` > 0 for ``count`` > 0 pieces with ``work`` >= 0 in all."""
        size = self._sizes.setdefault(_size_of(work), _Size())
        value, scale = self._believable(size, count, work, measured)
        size.fade(KEEP)
        size.add(count / scale, work / scale, value / scale)
        size.seen += 1
        self.seen += 1
        self.line = self._solve()

    def _believable(self, size: _Size, count: float, work: float, measured: float) -> tuple[float, float]:
        """``measured`` or the nearest value that one observation is believed with, and the scale of its
        error: what was expected, so that a low outlier does not count more than a high one."""
        predicted = self.predict(count, work)
        near = min(max(predicted, measured / NEAR), measured * NEAR)
        if not self.calibrated or predicted <= 0:
            return measured, near
        expected = predicted * self._misfit(size)
        if expected / SURPRISE <= measured <= expected * SURPRISE:
            size.streak = 0
            return measured, expected
        way = 1 if measured > expected else -1
        size.streak = size.streak + way if size.streak * way > 0 else way
        if abs(size.streak) < BELIEVED_AFTER:
            return min(max(measured, expected / SURPRISE), expected * SURPRISE), expected
        size.streak = 0
        for other in self._sizes.values():
            other.fade(DOUBTED if other is size else math.sqrt(DOUBTED))
        return measured, near

    def _misfit(self, size: _Size) -> float:
        """How far the line is off for this size: a bend that stays is no hiccup."""
        predicted = self.predict(size.c, size.w)
        return size.y / predicted if predicted > 0 and size.seen >= ENOUGH else 1.0

    def _solve(self) -> tuple[float, float]:
        sizes = self._sizes.values()
        cc, cw, ww = sum(s.cc for s in sizes), sum(s.cw for s in sizes), sum(s.ww for s in sizes)
        cy, wy, n = sum(s.cy for s in sizes), sum(s.wy for s in sizes), sum(s.n for s in sizes)
        overhead, rate = self.line
        # Pulls are relative to the last line's own numbers; an overhead of 0 may still grow from a tenth of
        # what is typical.
        typical = math.sqrt(n / cc)
        pull_o, pull_r = PULL * n / max(overhead, typical / 10) ** 2, PULL * n / rate**2
        cc, ww = cc + pull_o, ww + pull_r
        cy, wy = cy + pull_o * overhead, wy + pull_r * rate
        overhead, rate = _solve(cc, cw, ww, cy, wy)
        if overhead < 0:
            overhead, rate = 0.0, wy / ww
        if rate < self._least_rate:
            rate = self._least_rate
            overhead = max((cy - cw * rate) / cc, 0.0)
        return (overhead, rate) if math.isfinite(overhead + rate) else self.line


def _solve(cc: float, cw: float, ww: float, cy: float, wy: float) -> tuple[float, float]:
    """Of [[cc, cw], [cw, ww]] x = [cy, wy], both columns scaled to length 1 first."""
    c, w = math.sqrt(cc), math.sqrt(ww)
    cosine = cw / (c * w)
    determinant = max(1 - cosine * cosine, LEAST_DETERMINANT)
    return (cy / c - cosine * wy / w) / determinant / c, (wy / w - cosine * cy / c) / determinant / w


def _size_of(work: float) -> int:
    return round(math.log(work, 4)) if work > 1e-9 else -100
