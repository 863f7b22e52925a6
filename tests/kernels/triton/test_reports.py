"""What the records of interpreted and compiled kernels say, and the README's table that is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kernels import compile_report, interpret_report
from kernels.benchmarks import status
from kernels.registry import BACKENDS

ROOT = Path(__file__).resolve().parents[3]
NOTHING: dict[str, Any] = {}


def interpreted(*kernels: str, agrees: bool = True) -> dict[str, Any]:
    return {"rows": [{"backend": "window", "kernels": list(kernels), "agrees": agrees}]}


def compiled(*kernels: str, targets: tuple[str, ...] = tuple(status.CHIPS)) -> dict[str, Any]:
    return {"rows": [{"kernel": kernel, "target": target} for kernel in kernels for target in targets]}


def cell(target: str, **records: Any) -> str:
    given = {"cpu": NOTHING, "gpus": (), "interpreted": NOTHING, "compiled": NOTHING} | records
    return status.on_chip(status.Records(**given), "window", target)


def test_a_backend_is_no_better_known_than_its_least_known_kernel() -> None:
    both = compiled("softmax", "merge")
    assert cell("sm_90") == status.NOTHING
    assert cell("sm_90", compiled=both) == "compiled only"
    assert cell("sm_90", compiled=both, interpreted=interpreted("softmax", "merge")) == "interpreted"
    assert cell("sm_90", compiled=both, interpreted=interpreted("softmax", "merge", agrees=False)) == (
        "compiled only"
    )
    assert cell("sm_90", compiled=compiled("softmax"), interpreted=interpreted("softmax", "merge")) == (
        status.NOTHING
    ), "one of its kernels does not compile"
    some = compiled("softmax", "merge", targets=("sm_80",))
    assert cell("sm_90", compiled=some, interpreted=interpreted("softmax")) == status.NOTHING


def test_measured_is_what_a_bench_ran_on_such_a_chip() -> None:
    ran = {"capability": 90, "rows": [{"backend": "window"}]}
    known = {"compiled": compiled("softmax"), "interpreted": interpreted("softmax")}
    assert cell("sm_90", gpus=(ran,), **known) == "measured"
    assert cell("sm_80", gpus=(ran,), **known) == "interpreted"
    cpu = {"rows": [{"backend": "window", "impl": "torch"}]}
    records = status.Records(cpu, (), NOTHING, NOTHING)
    assert (status.on_cpu(records, "window"), status.on_cpu(records, "star")) == ("measured", status.NOTHING)


def test_the_readme_tells_what_the_records_say() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = readme.partition("benchmarks.status docs` -->\n")[2].partition("\n<!-- /devices -->")[0]
    assert shown == status.markdown(status.read(ROOT / "docs")), (
        "run `python -m kernels.benchmarks.status docs` and paste it between the marks"
    )


def test_the_interpreted_record_is_of_these_sources_and_of_every_backend() -> None:
    told = json.loads((ROOT / "docs" / "kernels-interpreted.json").read_text(encoding="utf-8"))
    assert told["sources"] == compile_report.sources_hash(), f"kernels have changed: {told['command']}"
    assert {row["backend"] for row in told["rows"]} == set(BACKENDS)
    assert all(row["agrees"] and row["kernels"] for row in told["rows"])


def test_a_backend_that_is_off_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(interpret_report, "_difference", lambda name, call, dtype: 0.5)
    assert interpret_report.main(["--backends", "window"]) == 1
    assert "OFF" in capsys.readouterr().out


def test_without_the_interpreter_the_way_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert interpret_report.main(["--backends", "window"]) == 2
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err
