from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.tools import ROOT, tool

VENV_STAMP = ".venv/.stamps/venv"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(folder: Path, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    program = tool("make", "Debian: the package make")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }
    if path is not None:
        environment["PATH"] = path
    command = [program, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_help_lists_every_target_with_what_it_does(checkout: Path) -> None:
    done = make(checkout)
    listed = re.findall(r"^  make (\w+) +\S", done.stdout, re.MULTILINE)
    figures = ["interference", "mixing", "decode", "verify_cost", "chaos"]
    assert listed == ["help", "serve", "test", "check", "bench", *figures, "load", "clean"]


def test_a_virtual_environment_is_made_once(checkout: Path) -> None:
    first = make(checkout, VENV_STAMP, f"PYTHON={sys.executable}")
    assert first.returncode == 0, first.stderr
    assert "creating .venv" in first.stdout
    assert (checkout / ".venv" / "bin" / "python").exists()
    second = make(checkout, VENV_STAMP)
    assert second.returncode == 0 and "creating" not in second.stdout


def test_a_copied_environment_is_refused_with_a_way_out(checkout: Path) -> None:
    assert make(checkout, VENV_STAMP, f"PYTHON={sys.executable}").returncode == 0
    copy = checkout / "copy"
    shutil.copytree(checkout, copy, symlinks=True)
    done = make(copy, VENV_STAMP, f"PYTHON={sys.executable}")
    assert done.returncode != 0
    assert "make clean" in done.stderr


def test_a_missing_python_is_told_with_what_to_install(checkout: Path) -> None:
    tools = checkout / "tools"
    tools.mkdir()
    for name in ("sh", "cat", "mkdir", "grep", "sed"):
        (tools / name).symlink_to(shutil.which(name) or f"/bin/{name}")
    done = make(checkout, VENV_STAMP, path=str(tools))
    assert done.returncode != 0
    assert "no Python 3.11 or later found" in done.stderr and "apt-get install python3" in done.stderr


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ("exit 1", "is not a Python 3.11 or later"),
        ('case "$2" in *ensurepip*) exit 1;; esac', "has no venv module"),
    ],
    ids=["too old", "without venv"],
)
def test_an_unusable_python_is_told_in_a_sentence(checkout: Path, answers: str, words: str) -> None:
    python = checkout / "python3"
    python.write_text(f"#!/bin/sh\n{answers}\n")
    python.chmod(0o755)
    done = make(checkout, VENV_STAMP, f"PYTHON={python}")
    assert done.returncode != 0
    assert words in done.stderr


def test_an_install_that_fails_says_how_to_go_on(checkout: Path) -> None:
    assert make(checkout, VENV_STAMP, f"PYTHON={sys.executable}").returncode == 0
    done = make(checkout, ".venv/.stamps/torch-0.0.0", "TORCH=0.0.0")
    assert done.returncode != 0
    assert "installing torch 0.0.0 failed" in done.stderr
    assert "run the same make command again" in done.stderr
    assert not (checkout / ".venv/.stamps/torch-0.0.0").exists()


def test_ci_is_valid_bash() -> None:
    subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True)
    linter = shutil.which("shellcheck")
    if linter:
        subprocess.run([linter, ROOT / ".ci" / "run"], check=True)
