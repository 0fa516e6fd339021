"""Nodes that come, are drained and die under a run, on a cluster of several raylets on this machine."""

import os
import signal
import subprocess
import sys

import pytest
from training_bench import descendants, end_all, events_of, small_run, token_record, wait_until, write_recipe

from jobs.run_folder import StoredRun, valid_steps
from jobs.settings import Faults
from models.config import OptimizerConfig
from models.training.spikes import SpikeConfig

pytestmark = pytest.mark.cluster

STEPS = 100
PATIENCE = 150  # seconds for what takes a few on a quiet machine


@pytest.fixture
def cluster(monkeypatch):
    """A head with one core, apart from the session's own Ray."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    # A raylet that was killed is seen after some seconds, not after half a minute.
    quick = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": quick, "object_store_memory": 80 << 20}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    yield nodes
    nodes.shutdown()


def add_node(cluster):
    return cluster.add_node(num_cpus=1, object_store_memory=80 << 20)


def kill_raylet(node):
    """As a node that loses its power: the raylet by SIGKILL, its workers follow it."""
    (raylet,) = node.all_processes["raylet"]
    os.kill(raylet.process.pid, signal.SIGKILL)


def drain(cluster, node, seconds):
    """As a cloud does that takes a spot node back."""
    command = [os.path.join(os.path.dirname(sys.executable), "ray"), "drain-node", "--address", cluster.address]
    command += ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    subprocess.run([*command, "--deadline-remaining-seconds", str(seconds)], check=True, capture_output=True)


def test_a_run_grows_shrinks_and_survives_a_dead_node_with_every_token_seen_once(token_workspace, cluster, tmp_path):
    settings = small_run(
        token_workspace,
        "elastic",
        steps=STEPS,
        global_batch=7,  # no number of workers above 1 divides it
        min_workers=1,
        resize_every_seconds=2,
        start_timeout_seconds=3,
        optimizer=OptimizerConfig(lr=5e-3),
        spikes=SpikeConfig(),
        checkpoint_every=50,
        validate_every=STEPS,
        max_failures=1,
        faults=Faults(slow_worker_seconds=0.3),
    )
    write_recipe(settings, tmp_path / "recipe.yaml")
    run = StoredRun(f"{token_workspace}/runs/elastic")
    with open(tmp_path / "log", "w+") as log:
        driver = subprocess.Popen(
            [sys.executable, "-m", "jobs", "pretrain", "--config", str(tmp_path / "recipe.yaml")],
            env={**os.environ, "RAY_ADDRESS": cluster.address},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def resumes(*causes):
        def there():
            assert driver.poll() is None, (tmp_path / "log").read_text()
            return [event["cause"] for event in events_of(run, "resume")] == list(causes)

        wait_until(there, PATIENCE)

    def trains_for(steps):
        def rows():
            return len(valid_steps(run.metrics(), "batch_hash"))

        before = rows()
        wait_until(lambda: rows() >= before + steps, PATIENCE)

    family = []
    try:
        wait_until(lambda: driver.poll() is not None or events_of(run, "checkpoint"), PATIENCE)
        node = add_node(cluster)
        resumes("resize")
        trains_for(3)
        drain(cluster, node, 8)
        wait_until(lambda: events_of(run, "preempted"), PATIENCE)
        kill_raylet(node)  # the cloud takes it, at the time that it said
        resumes("resize", "preemption")
        trains_for(3)
        node = add_node(cluster)
        resumes("resize", "preemption", "resize")
        trains_for(3)
        kill_raylet(node)
        resumes("resize", "preemption", "resize", "worker_restart")
        family = descendants(driver.pid)
        assert driver.wait(PATIENCE) == 0, (tmp_path / "log").read_text()
    finally:
        driver.kill()
        driver.wait()
        end_all(family)

    assert token_record(settings) == []
    grown, drained, grown_again, died = events_of(run, "resume")
    assert [event["world_size"] for event in (grown, drained, grown_again, died)] == [2, 1, 2, 1]
    # Nothing was computed twice for a resize: the run saved right before.
    resizes, interrupts = events_of(run, "resize"), events_of(run, "interrupt")
    assert [(e["before"], e["after"], e["saved"]) for e in resizes] == [(1, 2, True), (1, 2, True)]
    # Once the checkpoint is durable the group may be ended, also before it has written that it was interrupted.
    saved = {e["step"] for e in interrupts if e["reason"] == "resize"}
    assert saved <= {grown["from_step"], grown_again["from_step"]} <= {e["step"] for e in events_of(run, "checkpoint")}
    # Of the drained node it knew before, and saved in time; that is no failure.
    # A checkpoint that was due anyway may have followed.
    assert drained["from_step"] >= max(e["step"] for e in interrupts if e["reason"] == "preemption")
    assert len(events_of(run, "preemption")) == len(events_of(run, "preempted")) == 1
    assert len(events_of(run, "worker_failure")) == 1
