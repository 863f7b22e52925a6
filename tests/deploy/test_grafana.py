from __future__ import annotations

import itertools
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.promql import SCRAPED, exported_series, groupings_in, matchers_in, metrics_in
from tests.deploy.tools import DASHBOARD, DEPLOY, ROOT, read_yaml, tool

BOARD: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = BOARD["panels"]
GRAPHS = [panel for panel in PANELS if panel["type"] != "row"]
VARIABLES = {each["name"]: each for each in BOARD["templating"]["list"]}


def expressions(panel: dict[str, Any]) -> list[str]:
    return [target["expr"] for target in panel["targets"]]


def with_values(expr: str) -> str:
    """The expression as Grafana sends it."""
    return expr.replace("$__rate_interval", "5m").replace("$model", ".*").replace("$attention", ".*")


def test_panel_ids_are_unique() -> None:
    ids = [panel["id"] for panel in PANELS]
    assert len(ids) == len(set(ids))


def test_panels_lie_on_the_grid_and_never_overlap() -> None:
    cells = []
    for panel in PANELS:
        grid = panel["gridPos"]
        assert grid["x"] >= 0 and grid["w"] >= 1 and grid["x"] + grid["w"] <= 24, panel["title"]
        rows = range(grid["y"], grid["y"] + grid["h"])
        cells += itertools.product(rows, range(grid["x"], grid["x"] + grid["w"]))
    assert len(cells) == len(set(cells))


def test_the_rows_answer_the_questions_in_their_order() -> None:
    assert [panel["title"] for panel in PANELS if panel["type"] == "row"] == [
        "Traffic and errors",
        "Latency by attention backend and length",
        "Time to first token and between tokens",
        "Queue and batch",
        "Memory",
        "Attention",
    ]


@pytest.mark.parametrize("panel", GRAPHS, ids=lambda panel: panel["title"])
def test_panels_name_metrics_and_labels_that_the_service_exports(panel: dict[str, Any]) -> None:
    exported = exported_series()
    for expr in map(with_values, expressions(panel)):
        metrics = metrics_in(expr)
        assert metrics and metrics <= set(exported), expr
        assert {m.label for m in matchers_in(expr) if m.label not in exported[m.metric]} <= SCRAPED, expr
        known = {"le"} | SCRAPED.union(*(exported[metric] for metric in metrics))
        assert groupings_in(expr) <= known, expr
        for legend in (target["legendFormat"] for target in panel["targets"]):
            assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= known, legend


@pytest.mark.parametrize("panel", GRAPHS, ids=lambda panel: panel["title"])
def test_panels_have_a_title_a_description_a_unit_and_the_chosen_data_source(panel: dict[str, Any]) -> None:
    assert panel["title"] and panel["description"]
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])
    assert "unit" in panel["fieldConfig"]["defaults"] or panel["type"] == "heatmap"


def test_every_expression_is_valid_promql(tmp_path: Path) -> None:
    program = tool("promtool", "Debian: the package prometheus")
    exprs = [with_values(expr) for panel in GRAPHS for expr in expressions(panel)]
    rules = [{"record": f"panel:expr:{index}", "expr": expr} for index, expr in enumerate(exprs)]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run([program, "check", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_model_and_attention_can_be_chosen_and_are_used() -> None:
    assert set(VARIABLES) == {"datasource", "model", "attention"}
    exported = exported_series()
    for name in ("model", "attention"):
        query = VARIABLES[name]["query"]["query"]
        [(metric, label)] = re.findall(r"label_values\((\w+), (\w+)\)", query)
        assert label in exported[metric]
        assert any(f"${name}" in expr for panel in GRAPHS for expr in expressions(panel))


def test_every_exported_metric_is_shown_somewhere() -> None:
    shown = " ".join([json.dumps(BOARD), (DEPLOY / "prometheus" / "alerts.yml").read_text()])
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported_series()}
    ours = {name for name in families if re.match(r"longreach_(?!process)", name)}
    totals = {name for name in ours if name + "_total" not in ours}
    missing = {name for name in totals if name not in shown}
    # info metrics are read in the table browser, truncated inputs beside their tokens
    assert missing <= {"longreach_build_info", "longreach_truncated_inputs_total"}


def test_provisioning_points_at_what_compose_mounts() -> None:
    volumes = read_yaml(ROOT / "docker-compose.yml")["services"]["grafana"]["volumes"]
    mounts = dict(volume.removesuffix(":ro").split(":") for volume in volumes)
    assert mounts["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"
    [provider] = read_yaml(DEPLOY / "grafana/provisioning/dashboards/longreach.yml")["providers"]
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    [source] = read_yaml(DEPLOY / "grafana/provisioning/datasources/prometheus.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090" and source["type"] == "prometheus"
