"""What is known of every backend on every device, from recorded results alone.

    python -m kernels.benchmarks.status docs

measured       a bench ran it on such a device: ``kernels-cpu.json``, ``kernels-gpu*.json``
interpreted    its kernels give torch's numbers in Triton's interpreter (``kernels-interpreted.json``), and
               all of them compile for the chip (``kernels-compiled.json``)
compiled only  they compile for the chip, and no record says that their numbers are right
–              none of these
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.registry import BACKENDS, load

CHIPS = {"sm_80": "A100 (sm_80)", "sm_90": "H100 (sm_90)", "sm_100": "B200 (sm_100)"}
NOTHING = "–"


@dataclass(frozen=True)
class Records:
    """The files' contents; {} where there is none."""

    cpu: Mapping[str, Any]
    gpus: tuple[Mapping[str, Any], ...]
    interpreted: Mapping[str, Any]
    compiled: Mapping[str, Any]


def read(folder: Path) -> Records:
    gpus = tuple(_json(file) for file in sorted(folder.glob("kernels-gpu*.json")))
    return Records(
        _json(folder / "kernels-cpu.json"),
        gpus,
        _json(folder / "kernels-interpreted.json"),
        _json(folder / "kernels-compiled.json"),
    )


def _json(file: Path) -> Mapping[str, Any]:
    if not file.exists():
        return {}
    found: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def markdown(records: Records) -> str:
    """The README's table of devices."""
    head = ["backend", "CPU", *CHIPS.values(), "kernels"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in BACKENDS:
        chips = [on_chip(records, name, target) for target in CHIPS]
        kernels = ", ".join(f"`{kernel}`" for kernel in kernels_of(records, name)) or NOTHING
        lines.append(f"| `{name}` | " + " | ".join([on_cpu(records, name), *chips, kernels]) + " |")
    return "\n".join(lines)


def on_cpu(records: Records, name: str) -> str:
    measured = any(row["backend"] == name and row["impl"] == "torch" for row in records.cpu.get("rows", ()))
    return "measured" if measured else NOTHING


def on_chip(records: Records, name: str, target: str) -> str:
    """In a word or two."""
    capability = int(target.removeprefix("sm_"))
    for gpu in records.gpus:
        if gpu["capability"] == capability and any(row["backend"] == name for row in gpu["rows"]):
            return "measured"
    used = kernels_of(records, name)
    if "triton" not in load(name).impls:
        return NOTHING
    if used and all(_compiles(records, kernel, target) for kernel in used):
        return "interpreted"
    return "compiled only" if not used and _every_kernel_compiles(records, target) else NOTHING


def kernels_of(records: Records, name: str) -> tuple[str, ...]:
    """Those that it launched in the interpreter, where its numbers were right."""
    for row in records.interpreted.get("rows", ()):
        if row["backend"] == name and row["agrees"]:
            return tuple(row["kernels"])
    return ()


def _compiles(records: Records, kernel: str, target: str) -> bool:
    rows = records.compiled.get("rows", ())
    return any(row["kernel"] == kernel and row["target"] == target for row in rows)


def _every_kernel_compiles(records: Records, target: str) -> bool:
    rows = records.compiled.get("rows", ())
    named = {row["kernel"] for row in rows}
    return bool(named) and all(_compiles(records, kernel, target) for kernel in named)


if __name__ == "__main__":
    print(markdown(read(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))))
