"""Forwards that can be left in the middle and gone on with later.

A forward runs in a greenlet of the thread that calls ``advance``. At its yield points (``offer_to_pause``:
before an attention call, between stretches of one, before a matrix product of the body, between rows of the
head) it asks ``pause`` and, where that is true, switches back to its caller; its stack and its tensors wait.
What runs outside such a forward meets the same yield points and goes on after one comparison.

A greenlet has a stack and context variables of its own, but torch's modes are its thread's. Therefore no mode
is entered in a greenlet around a yield point: ``advance`` enters inference mode on its caller's side, every
time, and leaves it as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from contextvars import copy_context
from functools import partial

import torch
from greenlet import getcurrent, greenlet

from models.contract import StepResult


class _GivenUp(BaseException):
    """Unwinds a forward that nobody wants any more; no handler of ordinary errors catches it."""


def _never() -> bool:
    return False


class _Run(greenlet):
    """The greenlet of one forward, the ``pause`` of the ``advance`` that runs it, and whether it was ever
    left."""

    pause: Callable[[], bool] = staticmethod(_never)
    left = False


def offer_to_pause(*_: object) -> None:
    """A yield point: leave the forward that is running if its caller says so. Also a hook of modules."""
    current = getcurrent()
    if type(current) is _Run and current.pause():
        assert current.parent is not None
        current.left = True
        current.parent.switch(None)


def can_be_left() -> bool:
    """Whether what is running now is a forward that may stop at a yield point."""
    return type(getcurrent()) is _Run


def was_left() -> bool:
    """Whether the forward that is running now has been left before."""
    current = getcurrent()
    return type(current) is _Run and current.left


class Ownership:
    """The sequences that belong to forwards which have begun and are not over."""

    def __init__(self) -> None:
        self._ids: set[int] = set()

    def take(self, sequences: Collection[object]) -> Callable[[], None]:
        """They belong to one forward until what this gives is called. It keeps them alive meanwhile."""
        held = list(sequences)
        self._ids.update(map(id, held))

        def give_back() -> None:
            self._ids.difference_update(map(id, held))
            held.clear()

        return give_back

    def __contains__(self, sequence: object) -> bool:
        return id(sequence) in self._ids


class LeavableForward:
    """``models.contract.Forward``: ``run``, which does a whole step, in pieces. ``resume`` is called before
    every piece, ``over`` once, when it has ended in whatever way.

    Nothing in the greenlet refers to this object: one that is forgotten is freed, and its greenlet with it.
    """

    def __init__(
        self,
        run: Callable[[], StepResult],
        over: Callable[[], None],
        resume: Callable[[], None] = lambda: None,
    ) -> None:
        self._work: Callable[[], StepResult] | None = run
        self._over, self._resume = over, resume
        self._run: _Run | None = None
        self._thread = 0
        self._is_over = self._is_running = False

    def advance(self, pause: Callable[[], bool]) -> StepResult | None:
        """Run on until ``pause`` is true at a yield point (None), or to the end. Raises what the step raises;
        then it is over. RuntimeError where it was over already."""
        if self._is_over or self._is_running:
            state = "running" if self._is_running else "over"
            raise RuntimeError(f"this forward is {state}: it cannot be gone on with")
        run = self._run or self._start()
        self._resume()
        self._is_running = True
        try:
            result = _switch(run, pause)
        finally:
            self._is_running = False
            if run.dead:
                self._end()
        return result

    def close(self) -> None:
        """Give up: its stack is unwound, what it holds is freed. Idempotent."""
        if self._is_running:
            raise RuntimeError("this forward is running: it cannot be closed from within")
        if self._run is not None:
            _unwind(self._run)
        self._end()

    def __del__(self) -> None:
        """Given up where it is forgotten; on another thread, greenlet unwinds it when its own comes round."""
        if self._run is not None and self._thread == threading.get_ident():
            _unwind(self._run)
        self._end()

    def _start(self) -> _Run:
        assert self._work is not None
        self._run = run = _Run(partial(_until_given_up, self._work))
        run.gr_context = copy_context()
        self._thread = threading.get_ident()
        return run

    def _end(self) -> None:
        self._run = self._work = None
        if not self._is_over:
            self._is_over = True
            self._over()


def _until_given_up(work: Callable[[], StepResult]) -> StepResult | None:
    try:
        return work()
    except _GivenUp:
        return None


def _switch(run: _Run, pause: Callable[[], bool]) -> StepResult | None:
    run.parent, run.pause = getcurrent(), pause
    try:
        with torch.inference_mode():
            result: StepResult | None = run.switch()
    finally:
        del run.pause
    return result


def _unwind(run: _Run) -> None:
    """Nothing to do where it never started or is dead."""
    if run:
        run.parent = getcurrent()
        with torch.inference_mode():
            run.throw(_GivenUp)
