"""A Ray cluster of one node for all tests that submit to one."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time

import psutil
import pytest

TOKEN = "a-token-for-the-tests-of-submission"


# Stands for the program: a checkout is whatever folder holds these three packages.
PROGRAM = """
import os, sys, time
job = sys.argv[1]
arguments = dict(word.split("=", 1) for word in sys.argv[2:] if "=" in word)
workspace = sys.argv[sys.argv.index("--workspace") + 1]
print("job", job, "prompt", arguments.get("--prompt"), "workspace", workspace)
print("ships", *sorted(os.listdir(".")))
if "--config" in sys.argv:
    print(open(sys.argv[sys.argv.index("--config") + 1]).read())
if arguments.get("--prompt") == "sleep":
    time.sleep(120)
for number in range(20 if arguments.get("--prompt") == "count" else 0):
    print("number", number)
    time.sleep(0.2)
    if number == 5:
        open(f"{workspace}/counts", "w").close()
print("environment", os.environ.get("OF_THIS_TEST"))
print("last words")
sys.exit(7 if arguments.get("--prompt") == "fail" else 0)
"""


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
                # Asked to end, the raylet waits half a minute for the actors that Ray Data and Ray Train leave behind.
                family = [*psutil.Process(head.pid).children(recursive=True), head]
                for process in family:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                psutil.wait_procs(family[:-1], 60)
                head.wait(60)


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


@pytest.fixture
def checkout(tmp_path, monkeypatch, token):
    for package in ("pipelines", "models", "jobs"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "jobs" / "__main__.py").write_text(PROGRAM)
    (tmp_path / "workspace").mkdir()
    (tmp_path / "workspace" / "secret.bin").write_text("does not travel")
    monkeypatch.chdir(tmp_path)
    return tmp_path
