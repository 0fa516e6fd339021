"""The way to a cluster by its file; what goes through it survives that it breaks."""

import os
import signal
import sys
import threading
import time

import pytest

from jobs import submit, tunnel
from jobs.settings import SettingsError

# Stands for kubectl, which needs a Kubernetes cluster: forwards a port and knows a secret.
KUBECTL = """#!{python}
import base64, os, socket, sys, threading

def copy(source, target):
    while data := source.recv(65536):
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)

open({calls!r}, "a").write(" ".join(sys.argv[1:]) + chr(10))
if "secret" in sys.argv:
    print(base64.b64encode({token!r}.encode()).decode(), end="")
    sys.exit()
open({pid!r}, "w").write(str(os.getpid()))
server = socket.create_server(("127.0.0.1", int(sys.argv[-1].split(":")[0])))
while True:
    here, _ = server.accept()
    there = socket.create_connection(("127.0.0.1", {port}))
    for pair in ((here, there), (there, here)):
        threading.Thread(target=copy, args=pair, daemon=True).start()
"""
RAYCLUSTER = """
apiVersion: v1
kind: Namespace
metadata: {name: training}
---
apiVersion: ray.io/v1
kind: RayCluster
metadata: {name: ingot, namespace: training}
spec:
  authOptions: {mode: token}
"""


@pytest.fixture
def kubernetes(cluster, checkout, token, tmp_path, monkeypatch):
    """The cluster as one of Kubernetes; gives its file, the file with the calls of kubectl, and that with its pid."""
    programs, calls, pid = tmp_path / "programs", tmp_path / "calls", tmp_path / "pid"
    programs.mkdir()
    script = programs / "kubectl"
    facts = {"python": sys.executable, "calls": str(calls), "pid": str(pid), "token": token}
    script.write_text(KUBECTL.format(port=int(cluster.rpartition(":")[2]), **facts))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    file = tmp_path / "cluster.yaml"
    file.write_text(RAYCLUSTER)
    return str(file), calls, pid


@pytest.mark.cluster
def test_a_job_is_followed_through_a_tunnel_that_breaks(kubernetes, capfd, monkeypatch):
    file, calls, pid = kubernetes
    monkeypatch.setenv("OF_THIS_TEST", "passed on")

    def break_it():
        while not os.path.exists("workspace/counts"):
            time.sleep(0.1)
        os.kill(int(pid.read_text()), signal.SIGKILL)

    breaker = threading.Thread(target=break_it)
    breaker.start()
    status = submit.main(
        ["generate", "--cluster", file, "--env", "OF_THIS_TEST", "--prompt", "count", "--device", "cpu"]
    )
    breaker.join()

    assert status == 0
    out = capfd.readouterr()
    assert [line for line in out.out.splitlines() if line.startswith("number")] == [f"number {i}" for i in range(20)]
    assert "environment passed on" in out.out
    assert out.err.count("connection lost") == 1
    secret, *forwards = calls.read_text().splitlines()
    assert secret.startswith("--namespace=training get secret ingot")
    assert len(forwards) == 2
    assert all("service/ingot-head-svc" in call and call.endswith(":8265") for call in forwards)
    with pytest.raises(ProcessLookupError):  # it goes with who needed it
        os.kill(int(pid.read_text()), 0)


def test_the_token_is_the_one_that_the_file_copies_to_the_nodes(tmp_path):
    (tmp_path / "token").write_text("secret-of-this-cluster\n")
    file = tmp_path / "cluster.yaml"
    file.write_text(
        f"cluster_name: c\nprovider: {{type: local}}\nfile_mounts: {{~/.ray/auth_token: {tmp_path}/token}}\n"
    )
    entrance = tunnel.read_entrance(str(file))
    assert entrance.token() == "secret-of-this-cluster"
    assert entrance.command(4711)[1:] == ["-m", "ray.scripts.scripts", "dashboard", str(file), "--port=4711"]
    (tmp_path / "token").unlink()
    with pytest.raises(SettingsError, match="the token cannot be read.*get-auth-token --generate"):
        entrance.token()


def test_a_file_without_a_cluster_and_a_cluster_without_a_head_are_one_sentence(tmp_path):
    file = tmp_path / "cluster.yaml"
    with pytest.raises(SettingsError, match="cannot be read"):
        tunnel.read_entrance(str(file))
    file.write_text("kind: Deployment\nmetadata: {name: x}\n")
    with pytest.raises(
        SettingsError, match="which holds Deployment; give a file for `ray up`, or one with a RayCluster"
    ):
        tunnel.read_entrance(str(file))
    file.write_text("cluster_name: none-such\nprovider: {type: nowhere}\n")
    entrance = tunnel.read_entrance(str(file))
    entrance.command = lambda port: [
        sys.executable,
        "-c",
        "raise SystemExit('Head node of cluster (none-such) not found!')",
    ]
    with (
        pytest.raises(SettingsError, match="cannot be opened: Head node of cluster \\(none-such\\) not found"),
        tunnel.tunnel(entrance),
    ):
        pass
