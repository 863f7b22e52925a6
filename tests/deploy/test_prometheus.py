from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.promql import SCRAPED, exported_series, groupings_in, matchers_in, metrics_in
from tests.deploy.tools import ALERTS, DEPLOY, read_yaml, tool

PROMETHEUS = DEPLOY / "prometheus"
RULES: list[dict[str, Any]] = [rule for group in read_yaml(ALERTS)["groups"] for rule in group["rules"]]


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = tool("promtool", "Debian: the package prometheus")
    command = [program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_finds_nothing_wrong(arguments: tuple[str, str, str]) -> None:
    done = promtool(*arguments[:2], PROMETHEUS / arguments[2])
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_would_notice_a_broken_threshold(tmp_path: Path) -> None:
    (tmp_path / "alerts.yml").write_text(ALERTS.read_text().replace("> 0.9", "> 0.99"))
    (tmp_path / "alerts_test.yml").write_text((PROMETHEUS / "alerts_test.yml").read_text())
    assert promtool("test", "rules", tmp_path / "alerts_test.yml").returncode != 0


def test_every_alert_has_a_case_where_it_fires_and_one_where_it_does_not() -> None:
    cases = [
        case
        for test in read_yaml(PROMETHEUS / "alerts_test.yml")["tests"]
        for case in test["alert_rule_test"]
    ]
    names = {rule["alert"] for rule in RULES}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == names
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == names


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alerts_name_metrics_labels_and_values_that_the_service_exports(rule: dict[str, Any]) -> None:
    exported = exported_series()
    expr = rule["expr"]
    assert metrics_in(expr) or expr.startswith("up{")
    assert metrics_in(expr) <= set(exported)
    for matcher in matchers_in(expr):
        values = exported[matcher.metric][matcher.label]
        if matcher.operator in ("=", "!="):
            assert matcher.value in values, matcher
        else:
            for alternative in matcher.value.split("|"):
                assert any(re.fullmatch(alternative, value) for value in values), (matcher, alternative)
    known = SCRAPED.union(*(exported[metric] for metric in metrics_in(expr)))
    assert groupings_in(expr) <= known


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alerts_say_how_bad_it_is_and_what_it_means(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert {"summary", "description"} <= set(rule["annotations"])


def test_the_readme_lists_exactly_the_alerts_there_are() -> None:
    listed = re.findall(r"^\| (Longreach\w+) \|", (DEPLOY / "README.md").read_text(), re.MULTILINE)
    assert listed == [rule["alert"] for rule in RULES]
