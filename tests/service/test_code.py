"""What the code must never contain, read from its syntax tree."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path for package in ("service", "models", "kernels") for path in (ROOT / package).rglob("*.py")
)
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {("torch", "load"), ("yaml", "load"), ("yaml", "unsafe_load"), ("os", "system")}


def names(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_evaluated_or_loaded_unsafely(path: Path) -> None:
    for node in names(path):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_MODULES
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in FORBIDDEN_MODULES
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in FORBIDDEN_ATTRIBUTES
        if isinstance(node, ast.keyword) and node.arg in ("shell", "trust_remote_code"):
            assert isinstance(node.value, ast.Constant) and node.value.value is False


def test_only_the_settings_read_the_environment() -> None:
    for path in (ROOT / "service").rglob("*.py"):
        if path.name == "settings.py":
            continue
        for node in names(path):
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("environ", "getenv"), path


POLICY = (
    "admission",
    "affine_fit",
    "begun",
    "chunks",
    "cost",
    "drain_rate",
    "fair_share",
    "ledger",
    "planner",
    "schedule",
    "scheduler",
    "turns",
)


def test_policy_is_plain_python() -> None:
    for name in POLICY:
        for node in names(ROOT / "service" / f"{name}.py"):
            imported = []
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                imported = [node.module or ""]
            assert not {module.split(".")[0] for module in imported} & {
                "torch",
                "asyncio",
                "threading",
                "time",
                "fastapi",
            }
