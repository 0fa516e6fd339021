"""The Grafana dashboard asks for what exists: Ingot's metrics by the code that sets them, Ray's by Ray's dashboards."""

import json
import os
import re
import sys
from types import SimpleNamespace

import pytest
import yaml
from ray.dashboard.modules.metrics.dashboards import default_dashboard_panels

from jobs.history import _COLUMNS
from jobs.sinks import quantities
from pipelines import progress

FOLDER = os.path.join(os.path.dirname(__file__), "..", "..", "cluster", "grafana")


@pytest.fixture(scope="module")
def dashboard():
    with open(os.path.join(FOLDER, "ingot.json")) as file:
        return json.load(file)


def expressions(dashboard):
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def ingots(monkeypatch):
    """Metrics that Ingot sets, as Ray exports them."""
    training = {f"ray_ingot_{name}" for name in quantities(dict.fromkeys(_COLUMNS, 1.0))}
    counted = []

    class Counter:
        def inc(self, value, tags):
            assert tags == {"stage": "filter"}

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
    monkeypatch.setattr(progress, "_counter", lambda name: counted.append(name) or Counter())
    one = progress.Progress("filter", {"a": 1, "b": 1}, done=1)
    one.step("a", 1, 1, finished=True)
    one.step("b", 1, 1, finished=True)
    return training | {"ray_ingot_step", "ray_ingot_recoveries"} | {f"ray_ingot_stage_{n}_total" for n in counted}


def test_every_metric_exists(dashboard, monkeypatch):
    asked = {name for text in expressions(dashboard) for name in re.findall(r"\b(?:ray|autoscaler)_\w+", text)}
    asked |= {variable["definition"].split("(")[1].split(",")[0] for variable in dashboard["templating"]["list"][1:]}
    with open(default_dashboard_panels.__file__) as file:
        rays = set(re.findall(r"\b(?:ray|autoscaler)_\w+", file.read()))
    rays |= {"ray_node_mem_used", "ray_node_mem_total"}  # what the host or the container has, whichever counts
    assert asked - rays == asked & ingots(monkeypatch)
    assert len(asked) > 30


def test_the_dashboard_has_what_grafana_imports(dashboard):
    assert (dashboard["uid"], dashboard["title"]) == ("ingot", "Ingot")
    assert dashboard["templating"]["list"][0]["type"] == "datasource"  # no data source of ours is written into it
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(numbers)) == len(numbers)
    taken = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken
        taken |= cells
        for target in panel.get("targets", []):
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            for left, right in ("()", "{}", "[]"):
                assert target["expr"].count(left) == target["expr"].count(right)


def test_prometheus_reads_where_ray_writes():
    with open(os.path.join(FOLDER, "prometheus.yml")) as file:
        (job,) = yaml.safe_load(file)["scrape_configs"]
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    (files,) = (place["files"] for place in job["file_sd_configs"])
    assert files == [f"/tmp/ray/session_latest/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]
