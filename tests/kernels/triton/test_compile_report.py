"""Every kernel compiled for chips that are not there: it spills nothing, fits, multiplies on matrix units."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from kernels import compile_report
from kernels._triton.registry import KERNELS
from kernels.compile_tables import broken_limits, page

ROOT = Path(__file__).resolve().parents[3]
RECORD = ROOT / "docs" / "kernels-compiled.json"
REGENERATE = (
    "python -m kernels.compile_report --json docs/kernels-compiled.json --markdown docs/kernels-compiled.md"
)
FIELDS = {
    "kernel", "target", "dtype", "head_dim", "registers", "spills", "shared_bytes", "matrix_instructions",
    "instruction", "variant", "num_warps", "num_stages", "compile_seconds", "estimated_occupancy",
    "estimated_bound", "estimated_ms",
}  # fmt: skip


def run(*arguments: str, interpret: str = "0", **environment: str) -> subprocess.CompletedProcess[str]:
    own = {**os.environ, "TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "kernels.compile_report", *arguments]
    return subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=False)


def importable() -> list[str]:
    return [name for name, module in KERNELS.items() if find_spec(module) is not None]


def rows_compiled(*arguments: str) -> list[dict[str, Any]]:
    done = run("--json", *arguments)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    return rows


def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def broken(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{row['kernel']} {row['target']} {row['dtype']} {row['head_dim']}: {broken_limits(row)}"
            for row in rows if broken_limits(row)]  # fmt: skip


@pytest.mark.parametrize("turn", range(3))
def test_every_kernel_compiles_within_its_chips_limits(turn: int) -> None:
    """A compilation takes seconds: each kernel is compiled for one chip, the record holds the rest."""
    target, dtype, head_dim = (("90", "fp16", "128"), ("80", "fp32", "128"), ("100", "fp16", "64"))[turn]
    names = importable()[turn::3]
    kernels = [text for name in names for text in ("--kernel", name)]
    rows = rows_compiled(*kernels, "--targets", target, "--dtypes", dtype, "--head-dims", head_dim)
    assert len(rows) >= len(names)
    assert not broken(rows)
    for row in rows:
        assert set(row) == FIELDS
        assert row["target"] == f"sm_{target}" and row["dtype"] == dtype and row["head_dim"] == int(head_dim)
        assert row["registers"] > 0 and 0 < row["estimated_occupancy"] <= 1
        assert row["estimated_bound"] in ("matrix", "exp", "memory", None)


def test_the_record_is_of_these_sources() -> None:
    assert record()["sources"] == compile_report.sources_hash(), f"kernels have changed: run {REGENERATE}"


def test_the_record_holds_every_chip_dtype_and_head_dim_within_the_limits() -> None:
    rows = record()["rows"]
    found: dict[tuple[Any, ...], set[str]] = {}
    for row in rows:
        found.setdefault((row["target"], row["dtype"], row["head_dim"]), set()).add(row["kernel"])
    wanted = [
        (f"sm_{target}", dtype, head_dim)
        for target in compile_report.TARGETS
        for dtype in compile_report.DTYPES
        for head_dim in (64, 128)
    ]
    missing = [place for place in wanted if found.get(place) != set.union(*found.values())]
    assert not missing, f"not every kernel is on record: run {REGENERATE}"
    assert set(record()["modules"]) == set(importable()), f"not every kernel is on record: run {REGENERATE}"
    assert not broken([row for row in rows if row["head_dim"] in (64, 128)])


def test_the_page_is_that_of_the_record() -> None:
    assert RECORD.with_suffix(".md").read_text(encoding="utf-8") == page(record())


def test_spills_and_missing_matrix_instructions_are_seen(tmp_path: Path) -> None:
    code = (
        "import json, sys\n"
        "from kernels._triton import registry\n"
        "registry.KERNELS = {'bad': 'tests.kernels.triton.badly_compiled'}\n"
        "from kernels.compile_report import main\n"
        "asked = ['--kernel', 'bad', '--targets', '90', '--dtypes', 'fp32', '--head-dims', '64', '--json']\n"
        "sys.exit(main(asked))"
    )
    own = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    runs = [
        subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=False)
        for _ in range(2)
    ]
    assert [done.returncode for done in runs] == [0, 0], runs[0].stderr
    (bad, good), again = (json.loads(done.stdout)["rows"] for done in runs)
    assert bad["spills"] > 0 and bad["registers"] == 255 and bad["variant"] == "rows=128"
    assert bad["matrix_instructions"] == 0 and bad["instruction"] == "missing"
    assert [reason.split()[0] for reason in broken_limits(bad)] == ["spills", "multiplies"]
    assert bad["estimated_bound"] == "memory" and good["estimated_bound"] is None
    assert good["spills"] == 0 and good["instruction"] == "none" and not broken_limits(good)
    assert again == [bad, good], "what was compiled before is told again, seconds included"


def test_shared_memory_beyond_the_chips_is_a_broken_limit() -> None:
    row = {"target": "sm_80", "spills": 0, "instruction": "none", "shared_bytes": 166913}
    assert "needs 166913 bytes" in broken_limits(row)[0]
    assert not broken_limits(row | {"shared_bytes": 166912})


def test_interpreted_kernels_cannot_be_compiled_and_that_is_told() -> None:
    done = run(interpret="1")
    assert done.returncode == 2 and "TRITON_INTERPRET=1" in done.stderr and not done.stdout


def test_without_triton_the_way_to_install_it_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compile_report, "find_spec", lambda name: None)
    assert compile_report.main([]) == 2
    assert "pip install 'longreach[gpu]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--kernel", "softmax"], "no kernel is named 'softmax': there are block_sparse"),
        (["--targets", "80,75"], "no target is named '75': there are 80, 90, 100"),
        (["--dtypes", "fp8"], "no dtype is named 'fp8'"),
        (["--head-dims", "512"], "at most 256"),
        (["--jobs", "0"], "at least 1"),
        (["--json", "nowhere/there.json"], "there is no folder 'nowhere'"),
    ],
)
def test_wrong_arguments_are_told_with_what_there_is(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        compile_report.main(arguments)
    assert stopped.value.code == 2 and told in capsys.readouterr().err


def test_comments_and_docstrings_do_not_make_a_record_stale(tmp_path: Path) -> None:
    def of(text: str) -> str:
        (tmp_path / "kernel.py").write_text(text)
        return compile_report.sources_hash(tmp_path)

    plain = of("def f(x):\n    return x + 1\n")
    assert of('"""Adds."""\ndef f(x):\n    """One."""\n    return x + 1  # more\n') == plain
    assert of("def f(x):\n    return x + 2\n") != plain
    (tmp_path / "compile_rows.py").write_text("x = 1\n")
    assert of("def f(x):\n    return x + 1\n") == plain


def test_estimates_follow_registers_shared_memory_and_rates() -> None:
    import torch

    from kernels._triton.compile_estimates import occupancy, roofline
    from kernels._triton.compile_launch import CompiledLaunch
    from kernels._triton.launch import Work
    from kernels._triton.targets import TARGETS

    chip = TARGETS[90]
    few = CompiledLaunch(32, 0, 0, 0, 0, "", 4, 0.0)
    assert occupancy(few, chip) == 1.0
    for narrower, share in (
        ({"registers": 255}, 8 / 64),
        ({"registers": 128}, 16 / 64),
        ({"shared_bytes": 100 * 1024}, 8 / 64),
        ({"shared_bytes": 300 * 1024}, 0.0),
        ({"tensor_memory_columns": 256}, 8 / 64),
        ({"num_warps": 1}, 32 / 64),
    ):
        assert occupancy(CompiledLaunch(**{**vars(few), **narrower}), chip) == share
    second = {"matrix": chip.tflops * 1e12, "exp": chip.texps * 1e12, "memory": chip.bandwidth_gb * 1e9}
    work = Work(second["matrix"], 0.5 * second["exp"], 0.25 * second["memory"])
    assert vars(roofline(work, chip, torch.float16)) == {"bound": "matrix", "ms": pytest.approx(1000.0)}
    assert roofline(work, chip, torch.float32).ms == pytest.approx(6000.0)
    assert roofline(Work(0.0, 2 * second["exp"], 0.0), chip, torch.float16).bound == "exp"
