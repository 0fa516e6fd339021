"""A Ray cluster of one node for all tests that submit to one."""

import os
import socket
import subprocess
import sys
import tempfile
import time

import pytest

TOKEN = "a-token-for-the-tests-of-submission"


@pytest.fixture
def token(monkeypatch):
    """The cluster's token, where whoever submits has it."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    return TOKEN


@pytest.fixture(scope="session")
def cluster():
    """A cluster of one node with a dashboard and token authentication, on ports of its own."""
    ports = [socket.socket() for _ in range(6)]
    for port in ports:
        port.bind(("127.0.0.1", 0))
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    names += ("metrics-export-port", "ray-client-server-port")
    options = [f"--{name}={port.getsockname()[1]}" for name, port in zip(names, ports, strict=True)]
    address = f"http://127.0.0.1:{ports[1].getsockname()[1]}"
    for port in ports:
        port.close()
    programs = os.path.dirname(sys.executable)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "PYTHONPATH"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "PATH": f"{programs}:{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as folder:
        started = ["--head", "--block", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--num-cpus=2"]
        started += ["--disable-usage-stats", f"--temp-dir={folder}", "--object-store-memory=80000000", *options]
        with open(f"{folder}/start.log", "w+") as log:
            head = subprocess.Popen(
                [f"{programs}/ray", "start", *started],
                stdout=log,
                stderr=log,
                env=environment,
                cwd=folder,
                start_new_session=True,
            )
            try:
                wait_for_dashboard(address, head)
                yield address
            finally:
                head.terminate()  # --block: ends everything that it started
                head.wait(30)


def wait_for_dashboard(address, head):
    import requests

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and head.poll() is None:
        try:
            headers = {"Authorization": f"Bearer {TOKEN}"}
            if requests.get(f"{address}/api/jobs/", headers=headers, timeout=5).status_code == 200:
                return
        except requests.RequestException:
            pass
        time.sleep(0.3)
    raise AssertionError("the cluster did not come up")
