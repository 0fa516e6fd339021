import os
import socket
import subprocess
import sys
import time

import pytest

from jobs import lease as module
from jobs.lease import FILE, lease
from jobs.run_folder import StoredRun
from jobs.settings import SettingsError


@pytest.fixture
def run(tmp_path):
    return StoredRun(str(tmp_path))


def holder(pid=None, host=None, age=0.0):
    return {"host": host or socket.gethostname(), "pid": pid or os.getpid(), "time": time.time() - age}


def test_a_run_that_another_command_trains_is_refused_with_its_name(run):
    run.write_json(FILE, holder(host="elsewhere", pid=7))
    with (
        pytest.raises(SettingsError, match="the run base is being trained by process 7 on elsewhere"),
        lease(run, "base"),
    ):
        pytest.fail("two commands held the run")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        run.write_json(FILE, holder(pid=other.pid))
        with pytest.raises(SettingsError, match=f"process {other.pid}"), lease(run, "base"):
            pytest.fail("two commands held the run")
        other.communicate(b"\n")
    with lease(run, "base"):  # that process is gone now
        assert run.read_json(FILE)["pid"] == os.getpid()
    assert run.read_json(FILE) is None


def test_a_lost_command_holds_a_run_only_for_a_while(run):
    run.write_json(FILE, holder(host="elsewhere", age=module.LOST_AFTER_SECONDS + 1))
    with lease(run, "base"):
        assert run.read_json(FILE)["host"] == socket.gethostname()


def test_a_lease_is_renewed_while_it_is_held(run, monkeypatch):
    monkeypatch.setattr(module, "EVERY_SECONDS", 0.05)
    with lease(run, "base"):
        first = run.read_json(FILE)["time"]
        deadline = time.monotonic() + 20
        while run.read_json(FILE)["time"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.02)
