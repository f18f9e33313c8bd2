"""The dashboard and the alerts speak of what the page has, and the alerts say what to do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.watch.conftest import Watched

CONFIG = Path(__file__).parents[3] / "config"
DASHBOARD = json.loads((CONFIG / "grafana-dashboard.json").read_text())
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((CONFIG / "prometheus-alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
PANELS: list[dict[str, Any]] = [one for one in DASHBOARD["panels"] if one["type"] != "row"]
EXPRESSIONS = [
    *(rule["expr"] for rule in RULES),
    *(target["expr"] for panel in PANELS for target in panel["targets"]),
]
_NAME = re.compile(r"\bgpud_[a-z_]+\b")


async def on_the_page(watched: Watched) -> set[str]:
    """Every name that a query may use."""
    names: set[str] = set()
    for line in (await watched.page.render()).decode().splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            parts = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
            names |= {name + part for part in parts}
    return names


async def test_every_metric_that_is_asked_for_exists(watched: Watched) -> None:
    asked = {name for one in EXPRESSIONS for name in _NAME.findall(one)}
    assert asked - await on_the_page(watched) == set()


async def test_every_metric_is_on_the_dashboard(watched: Watched) -> None:
    shown = {name for panel in PANELS for name in _NAME.findall(json.dumps(panel["targets"]))}
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in await on_the_page(watched)}
    families = {name for name in families if not name.startswith("gpud_process_")}
    assert families - {re.sub("_(bucket|sum|count)$", "", name) for name in shown} == set()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_is_wrong_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["alert"].startswith("Gpud")
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert "{{ $labels.instance }}" in rule["annotations"]["summary"]
    description = rule["annotations"]["description"]
    assert len(description) > 80
    assert re.search("`[^`]+`", description), "names no command"


def test_alerts_have_distinct_names() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names)


def test_the_dashboard_asks_the_chosen_prometheus_for_the_chosen_servers() -> None:
    variables = {one["name"]: one["type"] for one in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource": "datasource", "server": "query"}
    rows = [one["title"] for one in DASHBOARD["panels"] if one["type"] == "row"]
    assert rows == ["Sales", "Orders", "GPUs", "API", "Host"]
    for panel in PANELS:
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            assert "$server" in target["expr"]


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert taken.isdisjoint(cells), panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
