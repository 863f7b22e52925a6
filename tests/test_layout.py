"""The arrows between the packages, and what may not be in the repository.

loadtests --HTTP--> service -> models -> kernels -> torch;   triton only at call time
"""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HTTP = {"fastapi", "starlette", "uvicorn", "httpx", "httpx2", "prometheus_client", "pydantic_settings"}
MAY_NOT_IMPORT = {
    "kernels": {"models", "service", "loadtests", "tests", "transformers", "huggingface_hub"} | HTTP,
    "models": {"service", "loadtests", "tests"} | HTTP - {"httpx2", "httpx"},
    "service": {"loadtests", "tests"},
    "loadtests": {"kernels", "models", "service", "tests", "torch", "transformers"},
}
MAX_LINES = 400
BEYOND_THIS_MACHINE = re.compile(
    r"/(?:work|farm|root)/|/tmp/[a-z]|/home/(?!longreach)\w+|index[-_]url|find[-_]links|[\w.]*pytorch\.org/whl|/simple/?\s*$",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True)
class Import:
    file: Path
    line: int
    module: str
    in_function: bool
    for_types: bool
    """Under ``if TYPE_CHECKING``: never run."""

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.module}"


def imports_of(file: Path) -> Iterator[Import]:
    """Every import statement of ``file`` with the full name of its module, relative ones resolved."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]

    def visit(node: ast.AST, in_function: bool, for_types: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typed = for_types or isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(file, child.lineno, alias.name, inside, typed)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else ()
                module = ".".join([*base, *([child.module] if child.module else [])])
                for alias in child.names:
                    yield Import(file, child.lineno, f"{module}.{alias.name}", inside, typed)
            yield from visit(child, inside, typed)

    tree = ast.parse(file.read_text(encoding="utf-8"))
    yield from visit(tree, in_function=False, for_types=False)


def python_files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def imports_in(*folders: str) -> list[Import]:
    return [each for file in python_files(*folders) for each in imports_of(file)]


def tracked_files() -> list[Path]:
    """What git tracks or would track; every file outside hidden folders where this is no git checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]
    folders = ["deploy", "kernels", "loadtests", "models", "samples", "service", "tests"]
    return [file for folder in folders for file in (ROOT / folder).rglob("*") if file.is_file()]


@pytest.mark.parametrize("package", MAY_NOT_IMPORT)
def test_imports_point_one_way(package: str) -> None:
    found = imports_in(package)
    assert found
    wrong = [str(each) for each in found if each.module.split(".")[0] in MAY_NOT_IMPORT[package]]
    assert not wrong


def test_attention_backends_never_import_each_other() -> None:
    backends = {file.stem for file in (ROOT / "kernels" / "attention").glob("*.py")} - {"__init__"}
    wrong = [
        str(each)
        for each in imports_in("kernels/attention")
        for other in backends
        if each.module.split(".")[:3] == ["kernels", "attention", other] and each.file.stem != other
    ]
    assert not wrong


def test_triton_is_imported_at_call_time_alone() -> None:
    wrong = [
        str(each)
        for each in imports_in("kernels", "models", "service")
        if (each.module.split(".")[0] == "triton" or each.module.startswith("kernels._triton"))
        and not (each.in_function or each.for_types)
        and ROOT / "kernels" / "_triton" not in each.file.parents
    ]
    assert not wrong


def test_relative_and_nested_imports_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    file = tmp_path / "kernels" / "attention" / "one.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "from . import two\nfrom ..math import x\nif 1:\n    import a.b\ndef f():\n    from c import d\n"
    )
    assert [(each.module, each.in_function) for each in imports_of(file)] == [
        ("kernels.attention.two", False),
        ("kernels.math.x", False),
        ("a.b", False),
        ("c.d", True),
    ]


@pytest.mark.parametrize("folder", ["models", "service", "loadtests"])
def test_no_file_is_longer_than_one_idea(folder: str) -> None:
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in python_files(folder)}
    assert lengths
    too_long = {str(file.relative_to(ROOT)): lines for file, lines in lengths.items() if lines > MAX_LINES}
    assert not too_long


def test_no_tracked_file_names_a_machine_or_a_package_index() -> None:
    wrong = []
    for file in tracked_files():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        wrong += [f"{file.relative_to(ROOT)}: {match[0]}" for match in BEYOND_THIS_MACHINE.finditer(text)]
    assert not wrong


@pytest.mark.parametrize(
    "parts", ["cd /ro ot/x", "open('/tm p/x')", "--index -url x", "PIP_FIND _LINKS=x", "/ho me/me"]
)
def test_a_machine_path_or_an_index_would_be_found(parts: str) -> None:
    assert BEYOND_THIS_MACHINE.search(parts.replace(" ", ""))


def test_what_every_repository_has_is_here() -> None:
    for name in [
        "README.md",
        "ARCHITECTURE.md",
        "CHANGELOG.md",
        "LICENSE",
        "Makefile",
        "Dockerfile",
        ".ci/run",
    ]:
        assert (ROOT / name).stat().st_size > 0, name
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_the_changelog_begins_with_the_version_of_the_package() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[(\d[^]]*)\] - (\d{4}-\d{2}-\d{2})$", changelog, re.MULTILINE)
    assert released[0][0] == version
    assert [date for _, date in released] == sorted((date for _, date in released), reverse=True)
