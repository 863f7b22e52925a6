"""The compile report's rows: a module's example launches, compiled for one chip, dtype and head_dim."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from triton import knobs

from kernels._triton.compile_estimates import occupancy, roofline
from kernels._triton.compile_launch import compile_launch
from kernels._triton.launch import Launch
from kernels._triton.registry import KERNELS
from kernels._triton.targets import TARGETS, Target

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

MISSING = "missing"
"""The row's ``instruction`` where a kernel multiplies matrices without matrix instructions; "none" where a
kernel multiplies none."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What one process compiles at a time. ``module``: a name in ``KERNELS``."""

    module: str
    capability: int
    dtype: str
    head_dim: int

    def __str__(self) -> str:
        return f"{self.module} sm_{self.capability} {self.dtype} head_dim {self.head_dim}"


def rows_of(job: Job) -> list[Row]:
    """Compiled one after another; what cannot be compiled is a row with ``error`` and what names it."""
    _keep_in_own_folder()
    target = TARGETS[job.capability]
    module = import_module(KERNELS[job.module])
    return list(_rows(module.examples(target, DTYPES[job.dtype], job.head_dim), job, target))


def _rows(launches: Iterator[Launch], job: Job, target: Target) -> Iterator[Row]:
    for launch in launches:
        name = {
            "kernel": launch.kernel,
            "variant": ", ".join(f"{key}={value}" for key, value in launch.notes.items()),
            "target": target.name,
            "dtype": job.dtype,
            "head_dim": job.head_dim,
        }
        try:
            yield name | _measured(launch, job, target)
        except Exception as error:  # the other kernels are still worth knowing
            yield name | {"error": f"{type(error).__name__}: {error}"}


def _measured(launch: Launch, job: Job, target: Target) -> Row:
    compiled = compile_launch(launch, target)
    fastest = None if launch.work is None else roofline(launch.work, target, DTYPES[job.dtype])
    return {
        "registers": compiled.registers,
        "spills": compiled.spills,
        "shared_bytes": compiled.shared_bytes,
        "matrix_instructions": compiled.matrix_instructions,
        "instruction": compiled.instruction or (MISSING if launch.multiplies else "none"),
        "num_warps": compiled.num_warps,
        "num_stages": launch.num_stages,
        "compile_seconds": round(compiled.compile_seconds, 2),
        "estimated_occupancy": round(occupancy(compiled, target), 4),
        "estimated_bound": None if fastest is None else fastest.bound,
        "estimated_ms": None if fastest is None else float(f"{fastest.ms:.4g}"),
    }


def _keep_in_own_folder() -> None:
    """Kernels for chips that are not there stay out of the cache of those that run, unless the environment
    names a cache."""
    if "TRITON_CACHE_DIR" not in os.environ:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        knobs.cache.dir = str(base / "longreach" / "triton")
