"""A run that may shrink and grow has only as many workers as can be laid out."""

from types import SimpleNamespace

import pytest
import ray
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import NoopDecision
from ray.train.v2.api import data_parallel_trainer

from jobs.elastic import ElasticTrainer, SizedPolicy
from jobs.settings import ModelSettings, PretrainJob, SettingsError
from models.mesh import Parallelism


def settings(**changes):
    model = ModelSettings(d_model=32, n_layers=1, n_heads=4, n_kv_heads=4, d_ff=64)
    return PretrainJob(model=model, workers=8, min_workers=2, **changes)


def test_a_run_asks_for_worker_counts_that_its_parallelism_divides():
    assert settings().worker_counts() == [2, 3, 4, 5, 6, 7, 8]
    assert settings(parallelism=Parallelism(tensor_parallel=2)).worker_counts() == [2, 4, 6, 8]
    assert settings(parallelism=Parallelism(tensor_parallel=2, shard_workers=1)).worker_counts() == [2, 4, 6, 8]
    assert settings(parallelism=Parallelism(context_parallel=2, shard_workers=2)).worker_counts() == [2, 4, 6, 8]
    with pytest.raises(SettingsError, match="parallelism.tensor_parallel is 4"):
        settings(parallelism=Parallelism(tensor_parallel=4)).validate()  # the fewest are 2


def policy(nodes, sizes):
    """Ray's policy on a cluster whose nodes have so many CPU cores free for it."""
    made = SizedPolicy(ScalingConfig(num_workers=(2, 8), resources_per_worker={"CPU": 1}), sizes)
    made._maybe_send_resource_request = lambda: None
    made._get_reserved_resources = lambda: {str(i): {"CPU": float(cores)} for i, cores in enumerate(nodes)}
    return made


@pytest.mark.parametrize(("nodes", "size"), [([3, 2], 4), ([3], 2), ([4, 4, 4], 8), ([1], None)])
def test_nodes_that_suffice_for_a_size_in_between_get_the_one_below(nodes, size):
    decision = policy(nodes, [2, 4, 6, 8]).make_decision_for_non_running_worker_group()
    assert isinstance(decision, NoopDecision) if size is None else decision.num_workers == size


def test_a_running_group_is_not_disturbed_for_a_node_that_makes_no_size():
    running = SimpleNamespace(start_time=float("-inf"), num_workers=2)
    for nodes, size in (([2, 1], None), ([2, 2], 4)):
        decision = policy(nodes, [2, 4, 6, 8]).make_decision_for_running_worker_group(running, None)
        assert isinstance(decision, NoopDecision) if size is None else decision.num_workers == size


def test_a_node_that_has_come_or_gone_counts_at_once(monkeypatch):
    asked = []
    get = SimpleNamespace(remote=lambda requester, **how: asked.append((requester, how)))
    made = SizedPolicy(ScalingConfig(num_workers=(2, 8), resources_per_worker={"CPU": 1}), [2, 4, 6, 8])
    made._maybe_send_resource_request = lambda: None
    made._coordinator_client = SimpleNamespace(_autoscaling_coordinator=SimpleNamespace(get_reserved_resources=get))
    made._requester_id = "train-1"
    monkeypatch.setattr(ray, "get", lambda ref, timeout: {"node": {"CPU": 5.0}})
    for _ in range(2):  # within a second, the coordinator is asked once
        assert made.make_decision_for_non_running_worker_group().num_workers == 4
    assert asked == [("train-1", {"recompute": True}), ("train-1", {})]


def test_ray_train_takes_the_policy(monkeypatch):
    given = {}

    def run(self, **kwargs):
        given.update(kwargs)
        return SimpleNamespace(error=None)

    monkeypatch.setattr(data_parallel_trainer.DataParallelTrainer, "_initialize_and_run_controller", run)
    monkeypatch.setattr(data_parallel_trainer, "ObjectRefWrapper", lambda function: function)
    ElasticTrainer(lambda: None, scaling_config=ScalingConfig(num_workers=(2, 8)), sizes=[2, 8]).fit()
    assert given["scaling_policy"].sizes == [2, 8]
    assert given["scaling_policy"].scaling_config.max_workers == 8
