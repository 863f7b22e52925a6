"""Compiles every Triton kernel ahead of time for NVIDIA's chips, without a GPU, and tells what came of it.

    python -m kernels.compile_report                              every kernel, chip, dtype and head_dim
    python -m kernels.compile_report --kernel block_sparse --targets 90 --head-dims 64,128
    python -m kernels.compile_report --head-dims 64,128 --json docs/kernels-compiled.json \\
        --markdown docs/kernels-compiled.md                                       what the documents record

A row is one launch of one kernel at its default tiles (``kernels._triton.registry``): registers, spilled
bytes, shared memory, matrix instructions, and estimates, named so, of occupancy and of the best time that the
chip's rates allow. What was compiled stays in ~/.cache/longreach/triton (or TRITON_CACHE_DIR), so that only
what changed is compiled again. Exits with 1 where a kernel does not compile, with 2 where nothing can be.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import multiprocessing
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kernels.compile_tables import NOTE, Row, header, line, page

TARGETS = (80, 90, 100)
DTYPES = ("fp16", "bf16", "fp32")
HEAD_DIMS = (32, 64, 96, 128, 256)
MAX_HEAD_DIM = 256
SOURCES = Path(__file__).parent / "_triton"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    asked = _parser().parse_args(arguments)
    reason = _why_not()
    if reason is not None:
        print(f"python -m kernels.compile_report: {reason}", file=sys.stderr)
        return 2
    to_stdout = asked.json == "-"
    rows = list(_shown(_compiled(asked), quiet=to_stdout))
    record = _record(arguments, asked.kernel or _kernels(), rows)
    _write(record, asked)
    return _told(rows)


def sources_hash(folder: Path = SOURCES) -> str:
    """Of the kernels' code. Comments, docstrings and layout do not change it, nor does the report's code."""
    told = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        if not file.name.startswith("compile_"):
            told.update(f"{file.name}\n{_code(file)}\n".encode())
    return told.hexdigest()


def _code(file: Path) -> str:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [each for each in body if not _is_text(each)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _why_not() -> str | None:
    if find_spec("triton") is None:
        return "the package triton is not installed: pip install 'longreach[gpu]'"
    from kernels._triton.targets import interpreting

    if interpreting():
        return "TRITON_INTERPRET=1 makes Triton interpret kernels instead of compiling them: set it to 0"
    return None


def _compiled(asked: argparse.Namespace) -> Iterator[Row]:
    """Row by row, in the order asked for."""
    from kernels._triton.compile_rows import Job, rows_of

    jobs = [
        Job(kernel, target, dtype, head_dim)
        for kernel in asked.kernel or _kernels()
        for target in asked.targets
        for dtype in asked.dtypes
        for head_dim in asked.head_dims
    ]
    if asked.jobs == 1:
        for job in jobs:
            yield from rows_of(job)
        return
    with multiprocessing.get_context("spawn").Pool(asked.jobs) as pool:
        for rows in pool.imap(rows_of, jobs):
            yield from rows


def _shown(rows: Iterable[Row], *, quiet: bool) -> Iterator[Row]:
    if not quiet:
        print(header())
    for row in rows:
        if not quiet:
            print(line(row), flush=True)
        yield row
    if not quiet:
        print(f"\n{NOTE}")


def _record(arguments: Sequence[str], modules: Sequence[str], rows: Sequence[Row]) -> dict[str, Any]:
    import triton

    return {
        "command": shlex.join(["python", "-m", "kernels.compile_report", *arguments]),
        "triton": triton.__version__,
        "assemblers": _assemblers(),
        "sources": sources_hash(),
        "modules": list(modules),
        "rows": [row for row in rows if "error" not in row],
    }


def _assemblers() -> str:
    """Which assembler Triton picks for which chips."""
    from triton.backends.nvidia.compiler import get_ptxas

    versions: dict[str, list[str]] = {}
    for target in TARGETS:
        versions.setdefault(get_ptxas(target).version, []).append(f"sm_{target}")
    return "; ".join(f"ptxas {version} for {', '.join(chips)}" for version, chips in versions.items())


def _write(record: dict[str, Any], asked: argparse.Namespace) -> None:
    if asked.json is not None:
        head = json.dumps({key: value for key, value in record.items() if key != "rows"})
        rows = ",\n".join(json.dumps(row) for row in record["rows"])
        text = f'{head[:-1]}, "rows": [\n{rows}\n]}}\n'
        if asked.json == "-":
            sys.stdout.write(text)
        else:
            Path(asked.json).write_text(text, encoding="utf-8")
    if asked.markdown is not None:
        asked.markdown.write_text(page(record), encoding="utf-8")


def _told(rows: Sequence[Row]) -> int:
    failed = [row for row in rows if "error" in row]
    for row in failed:
        print(f"{line(row)}\n{row['error']}", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.compile_report", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add(
        "--json", type=_json, nargs="?", const="-", metavar="FILE", help="alone: to stdout, without the table"
    )
    add("--markdown", type=_writable, metavar="FILE")
    add("--kernel", type=_kernel, action="append", metavar="NAME", help=f"of {', '.join(_kernels())}")
    add("--targets", type=_targets, default=TARGETS, metavar="80,90,100", help="compute capabilities")
    add("--dtypes", type=_dtypes, default=DTYPES, metavar=",".join(DTYPES))
    add("--head-dims", type=_head_dims, default=HEAD_DIMS, metavar=",".join(map(str, HEAD_DIMS)))
    add("--jobs", type=_positive, default=1, metavar="N", help="processes, of about 1 GB each; default 1")
    return parser


def _kernels() -> list[str]:
    from kernels._triton.registry import KERNELS

    return list(KERNELS)


def _kernel(text: str) -> str:
    return _one_of(text, _kernels(), "kernel")


def _targets(text: str) -> tuple[int, ...]:
    return tuple(int(_one_of(part, [str(t) for t in TARGETS], "target")) for part in text.split(","))


def _dtypes(text: str) -> tuple[str, ...]:
    return tuple(_one_of(part, DTYPES, "dtype") for part in text.split(","))


def _head_dims(text: str) -> tuple[int, ...]:
    found = tuple(_positive(part) for part in text.split(","))
    if max(found) > MAX_HEAD_DIM:
        raise argparse.ArgumentTypeError(f"kernels take a head_dim of at most {MAX_HEAD_DIM}, got {text!r}")
    return found


def _one_of(text: str, names: Sequence[str], what: str) -> str:
    if text not in names:
        raise argparse.ArgumentTypeError(f"no {what} is named {text!r}: there are {', '.join(names)}")
    return text


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _json(text: str) -> str:
    return text if text == "-" else str(_writable(text))


def _writable(text: str) -> Path:
    file = Path(text)
    if not file.parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"there is no folder {str(file.parent)!r} to write {file.name!r} into"
        )
    return file


if __name__ == "__main__":
    sys.exit(main())
