"""What the bench runs: one backend, its params and impl, at one head shape, length and direction."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kernels.api import backend_names, parse_params
from kernels.contract import Call, Params
from kernels.math.sbm import random_clusters
from kernels.registry import load

REFERENCE_MAX_LENGTH = 1024
"""Impl ``reference`` builds dense masks, O(N^2) memory: it is there to check, its time is told once."""

_MAX_LENGTH = {"topk": 8192}
"""Backends that compute every logit to choose: never fast, so not worth minutes at the longest lengths."""

NUM_CLUSTERS = 32
DENSITY = 0.02
"""Of the random clusters that a learned backend is given: mean probability of an edge between normal rows."""

_ROW_BY_ROW = ("scatterbrain", "sbm")
"""Backends whose reference visits rows one after another in Python."""

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """One pattern at one shape: H query heads over Hk key heads of width D, N positions."""

    backend: str
    params: dict[str, Any]
    H: int
    Hk: int
    D: int
    N: int
    causal: bool
    impl: str = "torch"
    density: float | None = None
    """Of a learned backend's random clusters; None: ``DENSITY``."""

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.D)

    @property
    def shape(self) -> str:
        return f"{self.H}x{self.Hk}x{self.D}"

    @property
    def told_params(self) -> str:
        return ", ".join(f"{name}={json.dumps(value)}" for name, value in self.params.items()) or "default"

    @property
    def parsed(self) -> Params:
        return parse_params(self.backend, self.params)

    @property
    def call(self) -> Call:
        """The whole prefill."""
        return Call(causal=self.causal, scale=self.scale, seed=0, layer=0, start=0, learned=self.learned)

    @property
    def learned(self) -> object | None:
        """What a model would carry for a learned backend: random clusters, the same for the same case."""
        if not load(self.backend).capabilities.learned:
            return None
        return random_clusters(self.H, self.D, NUM_CLUSTERS, seed=0, density=self.density or DENSITY)

    def __str__(self) -> str:
        direction = "causal" if self.causal else "bidirectional"
        return f"{self.backend} ({self.told_params}, {self.impl}) {self.shape} N={self.N} {direction}"


def groups(
    backends: Sequence[str],
    params: Sequence[dict[str, Any]],
    impls: Sequence[str],
    shapes: Sequence[Shape],
    lengths: Sequence[int],
) -> Iterator[list[Case]]:
    """Cases that take turns: those of one length, shape and direction, runnable or not (``why_not``)."""
    for N in lengths:
        for H, Hk, D in shapes:
            for causal in (True, False):
                yield [
                    Case(name, knobs, H, Hk, D, N, causal, impl)
                    for name in backends
                    for knobs in params
                    for impl in impls
                ]


def why_not(case: Case) -> str | None:
    """Why the bench leaves the case out; None where it runs."""
    backend = load(case.backend)
    able = backend.capabilities
    if not (able.causal if case.causal else able.bidirectional):
        return f"it has no {'causal' if case.causal else 'bidirectional'} form"
    if case.impl not in backend.impls:
        return f"it has no impl {case.impl!r}"
    reasons = backend.unsupported(case.parsed, case.causal)
    if reasons:
        return "; ".join(reasons)
    if case.impl == "reference" and chooses_by_tile(case):
        return (
            "its reference chooses in Python loops, as slow as they are obvious: it checks and is not timed"
        )
    if case.impl == "reference" and case.backend in _ROW_BY_ROW:
        return "its reference goes row by row in Python: it checks and is not timed"
    if case.impl == "reference" and case.N > REFERENCE_MAX_LENGTH:
        return f"impl reference builds dense masks: up to N = {REFERENCE_MAX_LENGTH}"
    longest = _MAX_LENGTH.get(case.backend, case.N)
    return f"it computes every logit: up to N = {longest}" if longest < case.N else None


def chooses_by_tile(case: Case) -> bool:
    """Whether rows choose together, tile by tile, with these params."""
    return load(case.backend).capabilities.selection == "tile" and case.parsed.chunk_multiple() > 1


def cpu_impls() -> list[str]:
    """Every impl that some backend has, but those that need a GPU: the bench's tensors are on the CPU."""
    found = {impl: None for name in backend_names() for impl in load(name).impls if impl != "triton"}
    return sorted(found, reverse=True)
