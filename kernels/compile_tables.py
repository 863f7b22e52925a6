"""The compile report as text: a table for the terminal, a page for the documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

Row = dict[str, Any]

_COLUMNS = (
    ("kernel", "kernel", "<34"),
    ("target", "target", "<6"),
    ("dtype", "dtype", "<5"),
    ("head_dim", "D", ">3"),
    ("registers", "regs", ">4"),
    ("spills", "spills", ">6"),
    ("shared_bytes", "shared", ">6"),
    ("matrix_instructions", "matrix", ">6"),
    ("instruction", "instruction", "<15"),
    ("num_warps", "warps", ">5"),
    ("num_stages", "stages", ">6"),
    ("compile_seconds", "s", ">5"),
    ("estimated_occupancy", "~occ", ">5"),
    ("estimated_bound", "~bound", "<6"),
    ("estimated_ms", "~ms", ">7"),
)
_PAGE_COLUMNS = (
    "kernel",
    "dtype",
    "D",
    "regs",
    "spills",
    "shared",
    "matrix",
    "instruction",
    "warps",
    "~occ",
    "~bound",
    "~ms",
)
NOTE = (
    "regs: registers a thread. spills: bytes a thread, stores and loads. shared: bytes a block. matrix: "
    "matrix instructions in the PTX. Columns with ~ are estimates: resident warps over the chip's; a "
    "roofline's bound and time for the example's sizes."
)


def header() -> str:
    return " ".join(f"{title:{form}}" for _, title, form in _COLUMNS).rstrip()


def line(row: Row) -> str:
    if "error" in row:
        first = row["error"].strip().split("\n")[0]
        return (
            f"{_named(row):34} {row['target']:6} {row['dtype']:5} {row['head_dim']:3} NOT COMPILED: {first}"
        )
    return " ".join(f"{_cell(row, key):{form}}" for key, _, form in _COLUMNS).rstrip()


def page(record: dict[str, Any]) -> str:
    """A Markdown page of everything in the record: where it comes from, what breaks a limit, the rows."""
    rows = record["rows"]
    return "\n\n".join([*_head(record), *_worst(rows), *_tables(rows)]) + "\n"


def _head(record: dict[str, Any]) -> list[str]:
    return [
        "# Kernels compiled ahead of time",
        f"`{record['command']}`, Triton {record['triton']}; assemblers: {record['assemblers']}. Sources "
        f"`{record['sources'][:16]}`. No GPU took part: these are the assembler's numbers, not times.",
        NOTE,
    ]


def _worst(rows: Sequence[Row]) -> list[str]:
    """What a reader looks for first: what spills, does not fit or does not use the matrix units."""
    found = [f"- {_place(row)}: {why}" for row in rows for why in broken_limits(row)]
    if not found:
        return [
            "No kernel spills, each fits its chip's shared memory, and all that multiply use matrix units."
        ]
    return ["Beyond a limit:", "\n".join(found)]


def broken_limits(row: Row) -> list[str]:
    """Which of the limits this row breaks: no spills, shared memory within the chip's, matrix instructions in
    every kernel that multiplies matrices."""
    from kernels._triton.targets import TARGETS

    most, reasons = TARGETS[_capability(row)].shared_bytes, []
    if row["spills"]:
        reasons.append(f"spills {row['spills']} bytes")
    if row["shared_bytes"] > most:
        reasons.append(f"needs {row['shared_bytes']} bytes of shared memory, the chip has {most}")
    if row["instruction"] == "missing":
        reasons.append("multiplies without matrix instructions")
    return reasons


def _tables(rows: Sequence[Row]) -> Iterable[str]:
    for target, of_target in groupby(sorted(rows, key=_order), key=lambda row: str(row["target"])):
        yield f"## {target}"
        lines = [f"| {' | '.join(_PAGE_COLUMNS)} |", "|" + " --- |" * len(_PAGE_COLUMNS)]
        keys = {title: key for key, title, _ in _COLUMNS}
        for row in of_target:
            lines.append("| " + " | ".join(_cell(row, keys[title]) for title in _PAGE_COLUMNS) + " |")
        yield "\n".join(lines)


def _order(row: Row) -> tuple[int, str, str, str, int]:
    return (
        int(row["target"].removeprefix("sm_")),
        row["kernel"],
        row["variant"],
        row["dtype"],
        row["head_dim"],
    )


def _capability(row: Row) -> int:
    return int(row["target"].removeprefix("sm_"))


def _place(row: Row) -> str:
    return f"{_named(row)}, {row['target']}, {row['dtype']}, head_dim {row['head_dim']}"


def _named(row: Row) -> str:
    return f"{row['kernel']} ({row['variant']})" if row["variant"] else str(row["kernel"])


def _cell(row: Row, key: str) -> str:
    value = _named(row) if key == "kernel" else row[key]
    if key == "estimated_occupancy":
        return f"{100 * value:.0f} %"
    return "-" if value is None or value == "" else str(value)
