"""Jobs by their ids, and a cluster at one glance."""

import time
from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus

from jobs import status
from jobs.job_server import JobServer
from jobs.settings import SettingsError
from jobs.submitted import chosen, described, duration

AUTOSCALER = """======== Autoscaler status: 2026-01-01 00:00:00 ========
Node status
---------------------------------------------------------------
Active:
 1 head
Idle:
 (no idle nodes)
Pending:
 gpu-spot, 2 launching
Recent failures:
 gpu-spot: InsufficientInstanceCapacity (latest_attempt: 00:00:00)

Resources
---------------------------------------------------------------
Total Usage:
 1.0/4.0 CPU

From request_resources:
 (none)
Pending Demands:
 {'GPU': 1.0, 'CPU': 4.0}: 2+ pending tasks/actors"""


def job(name, state, started=0, **more):
    facts = {"status": JobStatus(state), "start_time": 1000 * started, "end_time": None, "driver_node_id": "h"}
    facts |= {"entrypoint": "python -m jobs", "metadata": {}, "message": "", "error_type": None, "job_id": None}
    return SimpleNamespace(submission_id=name, **facts | more)


def test_a_job_is_found_by_the_beginning_of_its_id():
    jobs = [
        job("ingot-tune-b-2", "FAILED"),
        job("ingot-pretrain-base-1", "RUNNING"),
        job("ingot-pretrain-x", "STOPPED"),
    ]
    assert chosen(jobs, "ingot-t", running=False) is jobs[0]
    assert chosen(jobs, None, running=False) is chosen(jobs, None, running=True) is jobs[1]
    assert chosen([jobs[0], jobs[2]], None, running=False) is jobs[0]
    with pytest.raises(SettingsError, match="beginning of several: ingot-pretrain-base-1, ingot-pretrain-x"):
        chosen(jobs, "ingot-pretrain", running=False)
    with pytest.raises(SettingsError, match="none that the cluster knows: ingot-tune-b-2"):
        chosen(jobs, "curate", running=False)
    with pytest.raises(SettingsError, match="the cluster runs no job"):
        chosen([jobs[0]], None, running=True)


def test_durations_are_read_as_clocks():
    assert [duration(seconds) for seconds in (5, 3723, 2 * 86400 + 60)] == ["0:00:05", "1:02:03", "2 d 0:01:00"]


class Dashboard(JobServer):
    """A dashboard's answers, as Ray 2.60 gives them, cut down to what is read."""

    def __init__(self, jobs=()):
        super().__init__("http://head", {}, SimpleNamespace(list_jobs=lambda: list(jobs)))

    def get(self, path, **query):
        started = 1000 * (time.time() - 7200)
        raylets = [
            {"nodeId": "g1", "nodeName": "10.0.0.2", "nodeTypeName": "gpu", "resourcesTotal": {"CPU": 8.0, "GPU": 4.0}},
            {"nodeId": "h", "nodeName": "10.0.0.1", "isHeadNode": True, "resourcesTotal": {}},
            {"nodeId": "x", "nodeName": "10.0.0.9", "state": "DEAD"},
        ]
        worker = {"class_name": "RayTrainWorker", "job_id": "02", "node_id": "g1"}
        helper = worker | {"class_name": "TrainController", "required_resources": {}}
        answers = {
            "/nodes": {
                "summary": [
                    {"raylet": {"state": "ALIVE", "startTimeMs": str(started), **raylet}} for raylet in raylets
                ],
                "nodeLogicalResources": {"g1": "2.0/8.0 CPU\n1.0/4.0 GPU\n0B/1GiB memory"},
            },
            "/api/cluster_status": {"clusterStatus": AUTOSCALER},
            "/api/v0/actors": {
                "result": {"result": [worker | {"required_resources": {"GPU_group_0_ab": 1.0}}, helper]},
            },
            "/api/v0/tasks": {"result": {"result": []}},
        }
        log = "05:00:00 pretrain: step 10/90, loss 3.0\nsome noise\n05:00:05 pretrain: step 20/90, loss 2.0\n"
        return SimpleNamespace(json=lambda: {"data": answers[path]}, text=log)


def test_status_tells_nodes_jobs_progress_waits_and_costs(tmp_path):
    tariff = status.Tariff(None)
    kinds = {"gpu": 10.0, "head": 0.5}
    tariff.hourly = lambda node: kinds.get(node.kind)
    tariff.cluster = SimpleNamespace(path="aws.yaml", prices={"gpu": SimpleNamespace(seen="2026-01")})
    jobs = [job("ingot-pretrain-base-1", "RUNNING", time.time() - 65, job_id="02"), job("old", "SUCCEEDED")]

    lines = status.status(Dashboard(jobs), tariff)

    assert [line.split() for line in lines[1:3]] == [
        ["1", "head", "0", "of", "0", "0", "of", "0", "0.50"],
        ["1", "gpu", "2", "of", "8", "1", "of", "4", "10.00"],
    ]
    text = "\n".join(lines)
    assert "waits: pending: gpu-spot, 2 launching; recent failures: gpu-spot: InsufficientInstanceCapacity" in text
    assert "pending demands: {'GPU': 1.0, 'CPU': 4.0}: 2+ pending tasks/actors" in text
    assert "ingot-pretrain-base-1\n  status     RUNNING, started" in text
    assert "  progress   pretrain: step 20/90, loss 2.0\n  on         1 RayTrainWorker on gpu" in text
    assert "costs 10.50 USD/h, 21.00 USD since these nodes started" in text
    assert "old" not in text


def test_a_failed_job_says_why():
    message = "Job entrypoint command failed with exit code 2, last available logs (truncated to 20,000 chars):\nlong"
    lines = described(Dashboard(), job("ingot-tune-a", "FAILED", message=message, metadata={"workspace": "s3://b/p"}))
    assert "  message    Job entrypoint command failed with exit code 2" in lines
    assert "  workspace  s3://b/p" in lines
