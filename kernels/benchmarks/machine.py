"""Where and when something was measured."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Machine:
    """Facts for a table's head and its JSON file."""

    date: str
    command: str
    cpu: str
    num_cpus: int
    threads: int
    torch: str
    python: str
    sgemm_gflops: float

    def head(self) -> str:
        return (
            f"`{self.command}`, {self.date}\n"
            f"{self.cpu}, {self.num_cpus} CPUs, {self.threads} threads, torch {self.torch}, "
            f"Python {self.python}, fp32, sgemm {self.sgemm_gflops:.0f} GFLOP/s\n"
        )


def machine(arguments: Sequence[str], sgemm_gflops: float) -> Machine:
    return Machine(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=shlex.join(["python", "-m", "kernels.bench", *arguments]),
        cpu=_cpu_model(),
        num_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
        sgemm_gflops=sgemm_gflops,
    )


def _cpu_model() -> str:
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
