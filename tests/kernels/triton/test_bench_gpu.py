"""The GPU bench without a GPU: what it does with times, and that it says so where there is no device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kernels.bench_gpu import Options, bench, main, options
from kernels.benchmarks.gpu_rows import GpuRecord, device_of, plot, table
from kernels.benchmarks.gpu_timing import WallTimer

SMALL = ["--lengths", "70", "--shapes", "2x1x16", "--backends", "window", "exact", "--dtypes", "fp32"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SMALL) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_rows_hold_times_of_all_contenders_and_what_was_computed(tmp_path: Path) -> None:
    """Times of interpreted kernels mean nothing; that they are taken and told is what is tested."""
    asked: Options = options([*SMALL, "--rounds", "1", "--no-flex", "--json", str(tmp_path / "gpu.json")])
    record = GpuRecord(device_of(SMALL))
    said: list[str] = []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench(asked, record, WallTimer(1), device, said.append)
    assert not record.failures
    assert [(row.backend, row.causal) for row in record.rows] == [
        ("window", True),
        ("exact", True),
        ("window", False),
        ("exact", False),
    ]
    for row in record.rows:
        assert row.ms > 0 and row.opponents_ms["SDPA"] > 0 and row.flex_ms is None
        assert row.difference is not None and row.difference < 1e-4
        assert 0 < row.density <= row.density_computed
    assert len(said) == 4 and "SDPA" in said[0]
    assert [row["backend"] for row in json.loads((tmp_path / "gpu.json").read_text())["rows"]][:2] == [
        "window",
        "exact",
    ]
    assert table(record.rows).count("\n") == 5
    plot(record, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 1000


def test_a_backend_that_fails_does_not_lose_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = options([*SMALL, "--rounds", "1", "--no-flex"])
    record = GpuRecord(device_of(SMALL))

    def fails(*_: object, **given: object) -> object:
        raise RuntimeError("out of registers")

    monkeypatch.setattr("kernels.benchmarks.gpu_turns.attend", fails)
    bench(asked, record, WallTimer(1), torch.device("cpu"), lambda line: None)
    assert not record.rows and len(record.failures) == 4 and "out of registers" in record.failures[0]


def test_an_opponent_that_fails_does_not_lose_our_own_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = options([*SMALL, "--rounds", "1", "--no-flex"])
    record = GpuRecord(device_of(SMALL))

    def fails(*_: object, **given: object) -> object:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", fails)
    bench(asked, record, WallTimer(1), torch.device("cpu"), lambda line: None)
    assert len(record.rows) == 4 and all(not row.opponents_ms for row in record.rows)
    assert len(record.failures) == 2
    assert "SDPA" in record.failures[0] and "out of memory" in record.failures[0]
    assert "SDPA" not in table(record.rows)


@pytest.mark.parametrize("wrong", [["--shapes", "3x2x64"], ["--shapes", "8"], ["--rounds", "0"]])
def test_options_that_make_no_sense_are_refused(wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        options(wrong)
