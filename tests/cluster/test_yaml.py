import copy
import ipaddress
import subprocess
import tomllib
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "cluster").glob("*.yaml"))


def load(path):
    return yaml.safe_load(path.read_text())


def prepared(path):
    """The file as `ray up` sees it: defaults filled in, then held against Ray's own schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(load(path)))
    validate_config(config)
    return config


def commands(config):
    return [
        command
        for key in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
        for command in config[key]
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_ray_accepts_the_file(path):
    config = prepared(path)
    assert config["cluster_name"] == "ingot"
    assert config["max_workers"] >= 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_command_is_valid_shell(path):
    for command in commands(load(path)):
        checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nodes_run_the_ray_that_the_project_needs(path):
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (version,) = [item.split("==")[1] for item in needed if item.startswith("ray[")]
    installs = [command for command in commands(load(path)) if "ray[" in command]
    assert len(installs) == 1
    assert f'tune]=={version}"' in installs[0]
    assert "3.11" in " ".join(load(path)["setup_commands"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_synced_is_there_and_suffices_to_install_the_program(path):
    mounts = {remote: local for remote, local in load(path)["file_mounts"].items() if not local.startswith("~")}
    for local in mounts.values():
        assert (ROOT / local).exists() or local == "README.md", local
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages | {"pyproject.toml", project["project"]["readme"]} == set(mounts.values())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nobody_outside_gets_in(path):
    config = load(path)
    starts = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in config[key]
        if "ray start" in command
    ]
    assert len(starts) == 2
    for command in starts:
        assert "RAY_AUTH_MODE=token" in command
        assert "0.0.0.0" not in command
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("chmod 600 ~/.ray/auth_token" in command for command in config["setup_commands"])
    for rule in config["provider"].get("security_group", {}).get("IpPermissions", []):
        for source in rule["IpRanges"]:
            assert ipaddress.ip_network(source["CidrIp"]).is_private


def test_aws_workers_start_from_zero_and_spot_comes_first():
    nodes = load(ROOT / "cluster/aws.yaml")["available_node_types"]
    workers = {name: node for name, node in nodes.items() if name != "head"}
    assert nodes["head"]["resources"]["CPU"] == 0
    assert all(node["min_workers"] == 0 for node in workers.values())
    spot, on_demand = workers["gpu-spot"], workers["gpu-on-demand"]
    assert spot["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert "InstanceMarketOptions" not in on_demand["node_config"]
    assert spot["priority"] > on_demand["priority"]
    assert spot["node_config"]["InstanceType"] == on_demand["node_config"]["InstanceType"]


def test_aws_falls_back_to_on_demand_when_spot_cannot_be_had():
    """Ray's scheduler itself, asked for four GPUs with and without a failed spot request on record."""
    from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    nodes = load(ROOT / "cluster/aws.yaml")["available_node_types"]
    kinds = {
        name: NodeTypeConfig(
            name=name,
            min_worker_nodes=0,
            max_worker_nodes=node["max_workers"],
            resources={"CPU": 48, "GPU": 4} if name.startswith("gpu") else {"CPU": 16},
            priority=node.get("priority", 0),
        )
        for name, node in nodes.items()
        if name != "head"
    }

    def started(availability):
        request = SchedulingRequest(
            node_type_configs=kinds,
            max_num_nodes=10,
            disable_launch_config_check=True,
            resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make({"GPU": 1, "CPU": 1})] * 4),
            recoverable_resource_availabilities=availability,
        )
        reply = ResourceDemandScheduler(MagicMock()).schedule(request)
        return {launch.instance_type: launch.count for launch in reply.to_launch}

    assert started({}) == {"gpu-spot": 1}
    assert started({"gpu-spot": 0.0}) == {"gpu-on-demand": 1}


def test_aws_takes_the_node_configurations():
    session = pytest.importorskip("botocore.session", reason="boto3 is not installed")
    from botocore.validate import ParamValidator

    shape = session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, node in prepared(ROOT / "cluster/aws.yaml")["available_node_types"].items():
        request = {"MinCount": 1, "MaxCount": 1, **node["node_config"]}
        report = ParamValidator().validate(request, shape)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"
        assert set(node["node_config"]) <= set(shape.members), name
