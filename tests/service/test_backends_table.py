"""``longreach backends``: conditions, pictures, and what it refuses; the route that serves the same."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from kernels.api import describe
from kernels.conditions import conditions, why_no_mask
from kernels.registry import BACKENDS
from service import cli
from service.routes import info

MASKED = {name for name in BACKENDS if why_no_mask(name) is None}


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["backends", *arguments])
    told = capsys.readouterr()
    assert caught.value.code == code, told.err
    return told.out, told.err


def test_the_table_of_conditions_has_a_line_per_backend_and_direction(
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, err = run(capsys, "--conditions", "--num-tokens", "130")
    head, *lines = out.partition("\n\n")[0].splitlines()
    columns = "BACKEND, DIRECTION, SELF LOOPS, HAMILTONIAN PATH, S, CAUSAL S, NNZ, DENSITY, PARAMS"
    assert re.split(r"\s{2,}", head) == columns.split(", ")
    names = [line.split()[0].rstrip("*") for line in lines]
    assert set(names) == MASKED
    assert [line.partition(" is left out: ")[0] for line in err.splitlines()] == [
        name for name in BACKENDS if name not in MASKED
    ]
    star = next(line.split() for line in lines if line.startswith("star "))
    assert star[:6] == ["star", "bidirectional", "yes", "true", "2", "-"]
    assert star[6] == str(conditions("star", num_tokens=130, causal=False).nnz[0])
    causal = next(line.split() for line in lines if line.startswith("exact") and "causal" in line)
    assert causal[:8] == ["exact", "causal", "yes", "true", "infinite", "1", str(130 * 131 // 2), "1.0000"]
    assert "130 tokens." in out and "* one example" in out


def test_what_has_no_mask_is_refused_by_name_and_left_out_of_the_rest(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in sorted(BACKENDS.keys() - MASKED):
        for option in (["--conditions"], ["--draw", str(tmp_path)]):
            for more in ([], ["--params", "{}"]):
                out, err = run(capsys, *option, "--backend", name, *more, code=2)
                assert out == "" and err.startswith(
                    f"longreach: error: attention backend {name!r} has no mask: "
                )
    assert list(tmp_path.iterdir()) == []
    out, err = run(capsys, "--conditions", "--num-tokens", "16", "--json")
    assert {each["backend"] for each in json.loads(out)} == MASKED
    assert err.count(" is left out: ") == len(BACKENDS) - len(MASKED)


def test_conditions_of_one_backend_and_its_params_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    params = {"stride": 8, "combine": "sequential"}
    arguments = ["--backend", "strided", "--params", json.dumps(params), "--num-tokens", "64", "--json"]
    out, _ = run(capsys, "--conditions", *arguments)
    both, one_way = json.loads(out)
    assert both["backend"] == "strided" and both["params"] == params and not both["causal"]
    assert (both["num_patterns"], both["nnz"], both["s"]) == (2, [556, 512], 3)
    assert one_way["causal"] and one_way["s"] is None and one_way["causal_s"] == 2
    table, _ = run(capsys, "--conditions", *arguments[:-1])
    assert "556 + 512" in table and "one example" not in table


def test_pictures_are_written_per_direction_with_an_overview(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="drawing needs the extra `bench`")
    out, err = run(capsys, "--draw", str(tmp_path / "new"), "--num-tokens", "64")
    written = {path.name for path in (tmp_path / "new").iterdir()}
    assert written == {Path(line).name for line in out.split()} and "overview.png" in written
    assert {f"{name}-causal.png" for name in MASKED} <= written
    assert len(err.splitlines()) == len(BACKENDS) - len(MASKED)
    run(capsys, "--draw", str(tmp_path / "one"), "--backend", "star", "--params", '{"window": 3}')
    written = {path.name for path in (tmp_path / "one").iterdir()}
    assert written == {"star-bidirectional.png", "star-causal.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-tokens", "64"], "--num-tokens needs --conditions or --draw DIR"),
        (["--num-tokens", "0"], "--num-tokens needs --conditions or --draw DIR"),
        (["--backend", "star"], "--backend needs --conditions or --draw DIR"),
        (["--json"], "--json needs --conditions"),
        (["--draw", "x", "--json"], "--json needs --conditions"),
        (["--conditions", "--params", "{}"], "--params needs --backend NAME"),
        (["--conditions", "--backend", "nope"], "--backend: unknown attention backend 'nope'; known: exact"),
        (["--conditions", "--backend", "star", "--params", "{w"], "--params is not JSON"),
        (["--conditions", "--backend", "star", "--params", "[" * 5000], "--params is nested too deeply"),
        (
            ["--conditions", "--backend", "star", "--params", '{"window": ' + "[" * 5000 + "]" * 5000 + "}"],
            "deeply",
        ),
        (
            ["--conditions", "--backend", "star", "--params", "[2]"],
            "--params: .*expected a mapping, got list",
        ),
        (
            ["--conditions", "--backend", "star", "--params", '{"window": 0}'],
            "--params: .*window: .*or equal to 1",
        ),
        (["--conditions", "--num-tokens", "0"], "num_tokens must lie in 1 .. 4096, got 0"),
        (["--conditions", "--num-tokens", "5000"], "num_tokens must lie in 1 .. 4096, got 5000"),
    ],
)
def test_mistakes_are_one_message_that_names_the_option(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out, err = run(capsys, *arguments, code=2)
    assert out == "" and err.startswith("longreach: error: ") and err.count("\n") == 1
    assert re.search(message, err), err


def test_a_folder_that_cannot_be_written_and_a_missing_matplotlib_are_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ["--backend", "star", "--num-tokens", "16"]
    if pytest.importorskip("matplotlib", reason="drawing needs the extra `bench`"):
        (tmp_path / "file").write_text("")
        _, err = run(capsys, "--draw", str(tmp_path / "file"), *small, code=2)
        assert f"--draw: cannot write {tmp_path / 'file'}" in err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    _, err = run(capsys, "--draw", str(tmp_path), *small, code=2)
    assert "drawing needs matplotlib" in err and "pip install 'longreach[bench]'" in err


def test_the_route_serves_the_graph_of_every_backend(client: TestClient) -> None:
    cards = {card["name"]: card for card in client.get("/v1/attention/backends").json()["data"]}
    assert set(cards) == set(BACKENDS)
    for name, card in cards.items():
        assert card["graph"] == describe(name)["graph"]
    assert cards["star"]["graph"]["bidirectional"]["s"] == 2
    assert cards["star"]["graph"]["causal"]["s"] is None


def test_the_conditions_are_worked_out_off_the_event_loop(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops: list[Any] = []

    def watched(name: str) -> dict[str, Any]:
        try:
            loops.append(asyncio.get_running_loop())
        except RuntimeError:
            loops.append(None)
        return dict(describe(name))

    monkeypatch.setattr(info, "described", watched)
    assert client.get("/v1/attention/backends").status_code == 200
    assert loops == [None] * len(BACKENDS)
