import pytest
import yaml
from ray.autoscaler.v2.instance_manager.config import FileConfigReader
from ray.autoscaler.v2.schema import ClusterStatus, LaunchRequest, NodeInfo

from jobs.spot_fallback import Fallback


@pytest.fixture
def file(tmp_path):
    kinds = {
        name: {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": most}
        for name, most in {
            "head": 0,
            "cpu": 8,
            "gpu-spot": 8,
            "gpu-on-demand": 8,
            "big-spot": 2,
            "big-on-demand": 0,
        }.items()
    }
    config = {"cluster_name": "c", "head_node_type": "head", "max_workers": 20, "available_node_types": kinds}
    config |= {"provider": {"type": "gcp", "region": "r", "availability_zone": "z", "project_id": "p"}, "auth": {}}
    path = tmp_path / "ray_bootstrap_config.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def status(now, *refused, nodes=()):
    def node(name):
        return NodeInfo(instance_type_name=name, ray_node_type_name=name, instance_id=name, ip_address="")

    failed = [
        LaunchRequest(name, name, 1, LaunchRequest.Status.FAILED, now - 2, now - 1, "no capacity") for name in refused
    ]
    return ClusterStatus(active_nodes=[node(name) for name in nodes], failed_launches=failed)


def most(file, name):
    """What the autoscaler itself reads."""
    return FileConfigReader(file).get_cached_autoscaling_config().get_node_type_configs()[name].max_worker_nodes


def test_a_kind_that_is_refused_stays_as_it_is_for_a_while_and_may_grow_again(file):
    fallback = Fallback(file, seconds=600)
    (line,) = fallback.look(status(1000, "gpu-spot", nodes=["gpu-spot", "cpu"]), 1000)
    assert "no capacity" in line
    assert (most(file, "gpu-spot"), most(file, "gpu-on-demand"), most(file, "cpu")) == (1, 8, 8)
    assert fallback.look(status(1000, "gpu-spot"), 1002) == []  # the same refusal, still told
    assert fallback.look(status(1599), 1599) == []
    fallback.look(status(1600), 1600)
    assert most(file, "gpu-spot") == 8


def test_kinds_without_a_twin_that_may_start_are_left_alone(file):
    assert Fallback(file).look(status(1000, "cpu", "big-spot", "gpu-on-demand"), 1000) == []
    assert (most(file, "cpu"), most(file, "big-spot")) == (8, 2)


def test_one_that_comes_after_a_restart_gives_back_what_was_allowed(file):
    Fallback(file).look(status(1000, "gpu-spot"), 1000)
    assert most(file, "gpu-spot") == 0
    Fallback(file).look(status(1010), 1010)
    assert most(file, "gpu-spot") == 8


def test_what_ray_up_has_written_since_stands(file):
    fallback = Fallback(file, seconds=600)
    with open(file) as text:
        before = text.read()
    fallback.look(status(1000, "gpu-spot"), 1000)
    with open(file, "w") as out:
        out.write(before.replace("max_workers: 8", "max_workers: 5"))
    assert fallback.look(status(2000), 2000) == []
    assert most(file, "gpu-spot") == 5
