"""Following a job: what a broken connection, a lost head and a waiting cluster look like to whoever follows."""

import asyncio
from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus

from jobs import following
from jobs.following import JobLostError, follow


class Client:
    """A job server whose log stream breaks twice, and which sends the log from its start each time."""

    log = "".join(f"line {number}\n" for number in range(30))

    def __init__(self, **details):
        self.connections = 0
        succeeded = {"status": JobStatus.SUCCEEDED, "message": "", "driver_exit_code": 0, "error_type": None}
        self.details = SimpleNamespace(**succeeded | details)

    async def tail_job_logs(self, job):
        self.connections += 1
        sent = (70, 155, len(self.log))[self.connections - 1]
        for start in range(0, sent, 20):
            yield self.log[start : min(start + 20, sent)]
        if self.connections < 3:
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")

    def get_job_info(self, job):
        return self.details

    def get_job_logs(self, job):
        return self.log


def server(client, waiting=lambda: ""):
    return SimpleNamespace(client=client, waiting=waiting)


def test_a_dropped_connection_loses_and_repeats_nothing(capsys):
    client = Client()
    assert follow(server(client), "pretrain-1", patience=60) == 0
    out = capsys.readouterr()
    assert out.out == client.log
    assert client.connections == 3
    assert out.err.count("connection lost") == 1


class Gone(Client):
    async def tail_job_logs(self, job):
        raise OSError("no route to host")
        yield


def test_following_is_given_up_when_the_cluster_stays_away():
    with pytest.raises(ConnectionError, match="no connection for 0 s"):
        follow(server(Gone()), "pretrain-1", patience=0)


def test_a_head_that_was_started_anew_does_not_know_the_job():
    class Anew(Gone):
        def get_job_info(self, job):
            raise RuntimeError("Request failed with status code 404: Job pretrain-1 does not exist.")

    with pytest.raises(JobLostError, match="does not know this job"):
        follow(server(Anew()), "pretrain-1", patience=60)


def test_a_job_whose_driver_was_lost_did_not_fail_by_itself():
    lost = {"status": JobStatus.FAILED, "error_type": "JOB_SUPERVISOR_ACTOR_DIED", "driver_exit_code": None}
    with pytest.raises(JobLostError, match="lost the job's driver"):
        follow(server(Client(message="Job supervisor actor died: its node died", **lost)), "pretrain-1", patience=60)


def test_what_the_cluster_waits_for_is_told_once(capsys, monkeypatch):
    monkeypatch.setattr(following, "QUIET_SECONDS", 0.05)

    class Slow(Client):
        async def tail_job_logs(self, job):
            await asyncio.sleep(0.5)
            yield "started\n"

        def get_job_status(self, job):
            return JobStatus.RUNNING

    assert follow(server(Slow(), lambda: "pending: gpu-spot, 1 launching"), "pretrain-1", patience=60) == 0
    out = capsys.readouterr()
    assert out.out == "started\n"
    assert out.err.count("pretrain-1: the cluster waits, pending: gpu-spot, 1 launching") == 1
