"""cluster/aws.yaml against an AWS that is here: nodes come from zero for what a job needs, are lost, and go."""

import pytest
import yaml
from machines import ROOT, run_on_laptop

pytestmark = pytest.mark.lab

pytest.importorskip("boto3", reason="pip install 'ingot[aws]'")
pytest.importorskip("moto.server", reason="pip install 'ingot[test]'")

MINUTES = 60


@pytest.fixture(scope="module")
def config():
    return yaml.safe_load((ROOT / "cluster/aws.yaml").read_text())


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    return run_on_laptop("aws.py", tmp_path_factory.mktemp("aws"), MINUTES * 60)


def launches(facts, kind):
    """What RunInstances was given for a node type, one dict a request."""
    return [request for request in facts["launches"] if tags(request).get("ray-user-node-type") == kind]


def tags(request):
    keys = {name: value for name, value in request.items() if name.startswith("TagSpecification.1.Tag.")}
    return {value: keys[name.replace(".Key", ".Value")] for name, value in keys.items() if name.endswith(".Key")}


def test_up_starts_the_head_alone(facts):
    assert facts["after_up"] == ["head"]


def test_curation_brings_cpu_nodes_and_no_gpu_node(facts):
    assert facts["kinds_for_curation"] == ["cpu", "head"]
    assert facts["curated"] > 0


def test_pretraining_brings_two_spot_gpu_nodes(facts):
    assert facts["kinds_for_pretraining"] == ["gpu-spot", "gpu-spot", "head"]


def test_a_spot_node_that_is_lost_without_notice_costs_what_came_after_the_last_checkpoint(facts):
    at, from_step, cause = facts["without_notice"]
    assert cause == "worker_restart"
    assert at - from_step <= 2 * facts["checkpoint_every"]


def test_a_spot_node_that_is_announced_to_go_costs_less_than_an_interval(facts):
    at, from_step, cause = facts["with_notice"]
    assert cause == "preemption"
    assert from_step in facts["saves"]
    assert at - from_step < facts["checkpoint_every"]


def test_when_there_is_no_spot_capacity_an_on_demand_node_takes_the_place(facts):
    assert facts["refused"] > 0
    assert "gpu-on-demand" in facts["kinds_without_spot"]


def test_the_run_ends_right(facts):
    assert facts["status"] == 0
    assert facts["steps"] == facts["wanted_steps"]
    assert facts["wrong_tokens"] == []
    assert facts["losses"][1] < 0.7 * facts["losses"][0]


def test_idle_nodes_go_and_down_leaves_nothing(facts):
    assert facts["after_idle"] == ["head"]
    assert facts["after_down"] == []
    assert facts["machines_on"] == 0


def test_aws_was_asked_for_what_the_file_says(facts, config):
    for kind in ("head", "cpu", "gpu-spot"):
        assert launches(facts, kind)
        wanted = config["available_node_types"][kind]["node_config"]
        for request in launches(facts, kind):
            assert request["InstanceType"] == wanted["InstanceType"]
            assert request["IamInstanceProfile.Name"] == wanted["IamInstanceProfile"]["Name"]
            market = wanted.get("InstanceMarketOptions", {}).get("MarketType")
            assert request.get("InstanceMarketOptions.MarketType") == market
            assert request["MetadataOptions.HttpTokens"] == "required"
            (disk,) = wanted["BlockDeviceMappings"]
            assert request["BlockDeviceMapping.1.DeviceName"] == disk["DeviceName"]
            for name, value in disk["Ebs"].items():
                assert request[f"BlockDeviceMapping.1.Ebs.{name}"].lower() == str(value).lower()
            assert tags(request)["ray-cluster-name"] == config["cluster_name"]
            assert tags(request)["ray-node-type"] == ("head" if kind == "head" else "worker")


def test_ray_opens_nothing_and_makes_no_role(facts):
    assert all(request["SecurityGroupId.1"] == facts["group"] for request in facts["launches"])
    assert set(facts["actions"]) == {"CreateKeyPair", "CreateTags", "RunInstances", "TerminateInstances"}
