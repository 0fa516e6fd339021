"""What the files of `cluster/` promise beyond what `ingot cluster check` looks at."""

import ast
import re
import shlex
import tomllib
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import yaml

from jobs.machine_types import machine

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FILES = sorted((ROOT / "cluster").glob("*.yaml"))
CLOUDS = [path for path in FILES if path.stem in ("aws", "gcp", "azure")]
KUBERNETES = sorted((ROOT / "cluster/kubernetes").glob("*.yaml"))


def load(path):
    return yaml.safe_load(path.read_text())


def machine_type(node):
    config = node["node_config"]
    return config.get("InstanceType") or config.get("machineType") or config["azure_arm_parameters"]["vmSize"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_synced_is_there_and_suffices_to_install_the_program(path):
    mounts = {remote: local for remote, local in load(path)["file_mounts"].items() if not local.startswith("~")}
    for local in mounts.values():
        assert (ROOT / local).exists() or local == "README.md", local
    packages = {pattern.rstrip("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages | {"pyproject.toml", PROJECT["project"]["readme"]} == set(mounts.values())


def test_the_image_holds_what_suffices_to_install_the_program():
    copied = re.findall(r"^COPY (.*) \S+$", (ROOT / "cluster/kubernetes/Dockerfile").read_text(), re.MULTILINE)
    packages = {pattern.rstrip("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages | {"pyproject.toml", PROJECT["project"]["readme"]} == set(" ".join(copied).split())


def test_pyproject_is_the_one_place_that_says_the_version_of_ray():
    (version,) = [text.split("==")[1] for text in PROJECT["project"]["dependencies"] if text.startswith("ray[")]
    said = {
        path.name: [line.strip() for line in path.read_text().splitlines() if version in line]
        for path in [*FILES, *KUBERNETES, ROOT / "cluster/kubernetes/Dockerfile"]
    }
    # KubeRay asks for it in a field of its own.
    for name, lines in said.items():
        assert all(line.startswith(f"rayVersion: {version}") for line in lines), (name, lines)
        assert len(lines) == (name.startswith("ray")), name


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.name)
def test_nodes_start_from_zero_and_spot_comes_first_with_the_same_machine_on_demand_behind(path):
    nodes = load(path)["available_node_types"]
    assert nodes["head"]["resources"]["CPU"] == 0
    workers = {name: node for name, node in nodes.items() if name != "head"}
    assert all(node["min_workers"] == 0 for node in workers.values())
    for name in [name for name in workers if name.endswith("-spot")]:
        spot, on_demand = workers[name], workers[name.replace("-spot", "-on-demand")]
        assert spot["priority"] > on_demand["priority"]
        assert machine_type(spot) == machine_type(on_demand)


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.name)
def test_workers_watch_for_the_end_of_a_spot_machine(path):
    from jobs.spot_watch import METADATA

    cloud = load(path)["provider"]["type"]
    (watch,) = [command for command in load(path)["worker_start_ray_commands"] if "jobs.spot_watch" in command]
    assert f"--cloud {cloud} " in watch
    assert cloud in METADATA
    assert watch.startswith("(RAY_AUTH_MODE=token setsid nohup flock -n ")  # once, and beyond the ssh session
    assert watch.endswith("&)")


def scheduled(path, demand, availability=(), allowed=None):
    """Nodes that Ray's own scheduler of autoscaler v2 starts for a list of demands.

    Args:
        path: a file of `ray up`.
        demand: resources of each task or worker that waits.
        availability: node types and how recently they could be had; 0 is just now not.
        allowed: max_workers of node types in place of the file's.
    """
    from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    config = load(path)
    kinds = {}
    for name, node in config["available_node_types"].items():
        if name == "head":
            continue
        held = machine(machine_type(node))
        kinds[name] = NodeTypeConfig(
            name=name,
            min_worker_nodes=0,
            max_worker_nodes=(allowed or {}).get(name, node["max_workers"]),
            resources={"CPU": held.cpus, **({"GPU": held.gpus} if held.gpus else {})},
            priority=node.get("priority", 0),
        )
    request = SchedulingRequest(
        node_type_configs=kinds,
        max_num_nodes=config["max_workers"] + 1,
        disable_launch_config_check=True,
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(each) for each in demand]),
        recoverable_resource_availabilities=dict(availability),
    )
    reply = ResourceDemandScheduler(MagicMock()).schedule(request)
    return {launch.instance_type: launch.count for launch in reply.to_launch}


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.name)
def test_training_brings_spot_nodes_and_on_demand_ones_where_those_cannot_be_had(path):
    workers = [{"GPU": 1, "CPU": 4}] * 8
    assert scheduled(path, workers) == {"gpu-spot": 2}
    assert scheduled(path, workers, {"gpu-spot": 0.0}) == {"gpu-on-demand": 2}


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.name)
def test_curation_brings_cpu_nodes_only(path):
    assert scheduled(path, [{"CPU": 1}] * 40) == {"cpu": 3}


def test_how_full_a_machine_gets_decides_before_priorities():
    """Why the files leave larger machines off, and say to turn the others off before turning them on."""
    workers = [{"GPU": 1, "CPU": 4}] * 8
    assert scheduled(ROOT / "cluster/aws.yaml", workers, allowed={"a100-on-demand": 1}) == {"a100-on-demand": 1}


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: path.name)
def test_pods_that_are_told_to_go_drain_themselves(path):
    from jobs import spot_watch

    commands = re.findall(r"^\s*- (python -c \".*)$", path.read_text(), re.MULTILINE)
    assert len(commands) == path.read_text().count("preStop:")
    for command in commands:
        assert command.endswith(" && sleep 100")
        _, _, program, *_ = shlex.split(command)
        imported = [node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.ImportFrom)]
        assert [node.module for node in imported] == ["jobs.spot_watch"]
        assert all(hasattr(spot_watch, alias.name) for node in imported for alias in node.names)


def test_every_job_that_takes_long_has_a_rayjob():
    entrypoints = " ".join(load(path)["spec"]["entrypoint"] for path in KUBERNETES if path.name.startswith("rayjob-"))
    jobs = set(re.findall(r"-m jobs (\w+)", entrypoints))
    assert jobs >= {"curate", "tokenizer", "tokenize", "pretrain", "tune", "evaluate", "flow"}
