"""What the drivers of impl ``triton`` do with a device, seen without one: nothing is mixed with tensors of
the CPU, and nothing is read back before the last kernel has been launched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from kernels.registry import BACKENDS, load

ROOT = Path(__file__).resolve().parents[3]
ON_DEVICE = [name for name in BACKENDS if "triton" in load(name).impls]


@cache
def told() -> dict[str, list[dict[str, Any]]]:
    """Of all backends, from one process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton.fake_device", *ON_DEVICE],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("backend", ON_DEVICE)
def test_no_operation_mixes_devices(backend: str) -> None:
    for call in told()[backend]:
        assert not call["error"], f"{call['where']}: {call['error']}"
        assert call["launched"] and not call["elsewhere"], call


@pytest.mark.parametrize("backend", ON_DEVICE)
def test_the_host_reads_nothing_before_everything_is_launched(backend: str) -> None:
    for call in told()[backend]:
        early = [where for before, where in call["reads"] if before < len(call["launched"])]
        assert not early, f"{call['where']}: read at {early}"
