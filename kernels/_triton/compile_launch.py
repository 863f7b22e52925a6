"""One launch compiled for a chip that is not there, and what the assembler says of it.

Triton compiles down to machine code with the assembler that it picks for the chip; the assembler's log tells
registers and spills, the PTX tells matrix instructions. Triton keeps on disk what it compiled; the log is put
beside it, so that a second report compiles nothing.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from triton import compile as compile_source
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager

from kernels._triton.launch import Launch
from kernels._triton.targets import Target

WARP_THREADS = 32
_LOG = "assembler.json"
_MATRIX = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill (?:stores|loads)")


@dataclass(frozen=True)
class CompiledLaunch:
    """``spills``: bytes, stores and loads, of one thread. ``tensor_memory_columns``: of the 512 that an SM
    has from sm_100 on. ``instruction``: names of the matrix instructions counted, "" where there is none."""

    registers: int
    spills: int
    shared_bytes: int
    tensor_memory_columns: int
    matrix_instructions: int
    instruction: str
    num_warps: int
    compile_seconds: float


def compile_launch(launch: Launch, target: Target) -> CompiledLaunch:
    """Compile it ahead of time. Whatever Triton raises where it cannot is passed on."""
    source = _source(launch)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    chip = GPUTarget("cuda", target.capability, WARP_THREADS)
    compiled, log, seconds = _compile(source, chip, options)
    matrix = Counter(_MATRIX.findall(compiled.asm["ptx"]))
    return CompiledLaunch(
        registers=max(map(int, _REGISTERS.findall(log))),
        spills=sum(map(int, _SPILLS.findall(log))),
        shared_bytes=compiled.metadata.shared,
        tensor_memory_columns=getattr(compiled.metadata, "tmem_size", 0) or 0,
        matrix_instructions=matrix.total(),
        instruction=" + ".join(sorted(matrix)),
        num_warps=compiled.metadata.num_warps,
        compile_seconds=seconds,
    )


def _source(launch: Launch) -> Any:
    signature = launch.signature()
    names = list(signature)
    ones = {name: 1 for name in launch.args if signature[name] == "constexpr"}
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible()}
    return ASTSource(launch.fn, signature, {**launch.constants, **ones}, divisible)


def _compile(source: Any, chip: Any, options: dict[str, int]) -> tuple[Any, str, float]:
    """What was compiled, the assembler's log of it, and the seconds that took when it was done."""
    compiled, told, seconds = _timed(source, chip, options)
    beside = get_cache_manager(compiled.hash)
    if not _REGISTERS.search(told):
        kept = beside.get_file(_LOG)
        if kept is not None:
            with open(kept, encoding="utf-8") as file:
                found = json.load(file)
            return compiled, found["log"], found["seconds"]
        with _anew():
            compiled, told, seconds = _timed(source, chip, options)
    beside.put(json.dumps({"log": told, "seconds": seconds}), _LOG, binary=False)
    return compiled, told, seconds


def _timed(source: Any, chip: Any, options: dict[str, int]) -> tuple[Any, str, float]:
    told, began = io.StringIO(), perf_counter()
    with _log_shown(), redirect_stdout(told):
        compiled = compile_source(source, target=chip, options=options)
    return compiled, told.getvalue(), perf_counter() - began


@contextmanager
def _log_shown() -> Iterator[None]:
    with knobs.nvidia.scope():
        knobs.nvidia.dump_ptxas_log = True
        yield


@contextmanager
def _anew() -> Iterator[None]:
    with knobs.compilation.scope():
        knobs.compilation.always_compile = True
        yield
