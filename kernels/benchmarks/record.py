"""The JSON file: everything that was measured, where, when and by which command."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kernels.benchmarks.decode import DecodeRow
from kernels.benchmarks.edges import EdgeRow, edge_growths
from kernels.benchmarks.growth import growths
from kernels.benchmarks.machine import Machine
from kernels.benchmarks.rows import Row


@dataclass(frozen=True)
class LeftOut:
    """A case that is not run, and why."""

    backend: str
    impl: str
    params: str
    shape: str
    length: int
    causal: bool
    reason: str


@dataclass
class Record:
    """Filled while the bench runs. ``failures``: cases that raised, with what they said."""

    machine: Machine
    inputs: str
    rows: list[Row] = field(default_factory=list)
    decode: list[DecodeRow] = field(default_factory=list)
    edges: list[EdgeRow] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    complete: bool = False

    def write(self, path: Path) -> None:
        """Whole or not at all: a run that is stopped leaves the last complete file."""
        told = {
            **asdict(self.machine),
            "inputs": self.inputs,
            "complete": self.complete,
            "rows": [asdict(row) for row in self.rows],
            "growth": [asdict(growth) for growth in growths(self.rows)],
            "decode": [asdict(row) for row in self.decode],
            "edges": [asdict(row) for row in self.edges],
            "edge_growth": [asdict(growth) for growth in edge_growths(self.edges)],
            "left_out": [asdict(case) for case in self.left_out],
            "failures": self.failures,
        }
        beside = path.with_name(path.name + ".part")
        beside.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        beside.replace(path)
