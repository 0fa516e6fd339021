import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from jobs import submit
from jobs.settings import SettingsError
from jobs.shipping import Paths, is_here, ship_arguments

ROOT = str(Path(__file__).parents[2])
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
print("last words")
sys.exit(7 if arguments.get("--prompt") == "fail" else 0)
"""


@pytest.fixture(scope="module")
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
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray = os.path.join(os.path.dirname(sys.executable), "ray")
        started = ["--head", "--block", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--num-cpus=1"]
        started += ["--disable-usage-stats", f"--temp-dir={folder}", "--object-store-memory=80000000", *options]
        with open(f"{folder}/start.log", "w+") as log:
            head = subprocess.Popen(
                [ray, "start", *started], stdout=log, stderr=log, env=environment, cwd=folder, start_new_session=True
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


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    for package in ("pipelines", "models", "jobs"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "jobs" / "__main__.py").write_text(PROGRAM)
    (tmp_path / "workspace").mkdir()
    (tmp_path / "workspace" / "secret.bin").write_text("does not travel")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    return tmp_path


@pytest.mark.cluster
def test_a_job_that_succeeds_streams_its_log_and_returns_0(cluster, checkout, capsys, monkeypatch):
    # An explicit address wins over what the environment says.
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    (checkout / "recipe.yaml").write_text('prompt: it\'s a "quoted" prompt; $HOME\nseed: 5\n')
    arguments = ["generate", "--address", cluster, "--config", "recipe.yaml", "--temperature", "0.5"]

    assert submit.main(arguments) == 0

    out = capsys.readouterr()
    assert f"workspace {checkout}/workspace" in out.out
    assert out.out.count("last words") == 1
    assert "ships jobs models pipelines recipe-0.yaml" in out.out
    assert yaml.safe_load(out.out.split("recipe-0.yaml\n")[1].split("\n\n")[0])["seed"] == 5
    assert "SUCCEEDED" in out.err
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:1"


@pytest.mark.cluster
def test_a_job_that_fails_returns_its_own_status(cluster, checkout, capsys):
    settings = submit.SubmitSettings(address=cluster)
    assert submit.run(settings, "generate", ["--prompt", "fail"]) == 7
    out = capsys.readouterr()
    assert "last words" in out.out
    assert "FAILED" in out.err


@pytest.mark.cluster
def test_interrupting_stops_the_job_when_asked(cluster, checkout):
    from ray.job_submission import JobSubmissionClient

    program = "import sys; from jobs.cli import main; sys.exit(main())"
    arguments = ["submit", "generate", "--address", cluster, "--stop-on-interrupt", "--prompt", "sleep"]
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", program, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = iter(process.stdout.readline, "")
    assert any("prompt sleep" in line for line in lines)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=40)
    assert process.returncode == 130, err
    client = JobSubmissionClient(cluster, headers={"Authorization": f"Bearer {TOKEN}"})
    (job,) = [job for job in client.list_jobs() if "sleep" in job.entrypoint]
    assert job.status == "STOPPED"
    assert f"{job.submission_id}: STOPPED" in err


@pytest.mark.cluster
def test_a_refused_token_is_one_sentence(cluster, checkout, monkeypatch):
    settings = submit.SubmitSettings(address=cluster)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong-token")
    with pytest.raises(SettingsError, match="refuses the token that was sent"):
        submit.run(settings, "generate", [])
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(SettingsError, match="asks for a token and none was found"):
        submit.run(settings, "generate", [])


def test_nothing_there_is_one_sentence(checkout):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(SettingsError, match=r"no Ray dashboard answers \(ConnectionError\); start a cluster"):
            submit.run(submit.SubmitSettings(address=address), "generate", [])


def test_an_unknown_job_and_bad_settings_are_refused_before_the_cluster_is_asked(checkout, capsys):
    settings = submit.SubmitSettings(address="http://127.0.0.1:1")
    with pytest.raises(SettingsError, match="there is no job 'pretrian'; there are demo, curate,"):
        submit.run(settings, "pretrian", [])
    with pytest.raises(SystemExit, match="2"):
        submit.run(settings, "generate", ["--temprature", "0.5"])
    assert "temprature" in capsys.readouterr().err
    with pytest.raises(SettingsError, match="address is 'ray://head:10001'"):
        submit.run(submit.SubmitSettings(address="ray://head:10001"), "generate", [])


def test_paths_of_this_machine_are_refused_when_the_cluster_is_elsewhere(checkout):
    here, elsewhere = Paths("http://127.0.0.1:8265", []), Paths("http://127.0.0.1:8265", ["10.0.0.7"])
    assert here.workspace("workspace") == f"{checkout}/workspace"
    assert here.workspace("not/there/yet") == f"{checkout}/not/there/yet"
    for shared in ("s3://bucket/project", "gs://bucket/project", "/mnt/shared/project"):
        assert here.workspace(shared) == elsewhere.workspace(shared) == shared
    with pytest.raises(SettingsError, match=r"workspace is 'workspace', a path of this machine.*10\.0\.0\.7.*s3://"):
        elsewhere.workspace("workspace")

    settings = {"sources": [{"path": "./workspace/*.bin", "name": "a/b"}, {"path": "s3://bucket/x"}], "steps": 3}
    settled = here.settle("", settings)
    assert settled["sources"][0] == {"path": f"{checkout}/workspace/*.bin", "name": "a/b"}
    assert settled["sources"][1] == {"path": "s3://bucket/x"}
    with pytest.raises(SettingsError, match=r"sources\.0\.path is '\./workspace/\*\.bin'"):
        elsewhere.settle("", settings)


def test_arguments_arrive_as_they_were_meant(checkout, tmp_path):
    (checkout / "data").mkdir()
    (checkout / "data" / "a.jsonl").write_text("{}")
    (checkout / "recipe.yaml").write_text(
        "workspace: elsewhere\npretrain: {steps: 5}\ncurate: {sources: [{kind: jsonl, path: data/a.jsonl}]}\n"
    )
    out = tmp_path / "shipped"
    out.mkdir()
    arguments = ["--config=recipe.yaml", "--workspace", "w", "--prompt=a=b c", "--mmlu", "data/a.jsonl"]
    arguments += ["--sources", '[{"kind": "jsonl", "path": "data/a.jsonl"}]', "--flag"]

    shipped = ship_arguments("curate", arguments, str(out), Paths("http://x", []))

    assert shipped[:2] == ["--config", "recipe-0.yaml"]
    assert yaml.safe_load((out / "recipe-0.yaml").read_text()) == {
        "sources": [{"kind": "jsonl", "path": f"{checkout}/data/a.jsonl"}]
    }
    assert shipped[2:4] == ["--prompt=a=b c", f"--mmlu={checkout}/data/a.jsonl"]
    name, value = shipped[4].split("=", 1)
    assert name == "--sources"
    assert yaml.safe_load(value) == [{"kind": "jsonl", "path": f"{checkout}/data/a.jsonl"}]
    assert shipped[5:] == ["--flag"]
    with pytest.raises(SettingsError, match=r"config is 'missing\.yaml'; there is no such file"):
        ship_arguments("curate", ["--config", "missing.yaml"], str(out), Paths("http://x", []))


def test_addresses_of_this_machine_are_told_from_others():
    assert is_here("127.0.0.1")
    assert not is_here("192.0.2.1")  # reserved for documentation (RFC 5737)


class DroppingClient:
    """A job server whose log stream breaks twice, and which sends the log from its start each time."""

    log = "".join(f"line {number}\n" for number in range(30))

    def __init__(self):
        self.connections = 0

    async def tail_job_logs(self, submission):
        self.connections += 1
        sent = (70, 155, len(self.log))[self.connections - 1]
        for start in range(0, sent, 20):
            yield self.log[start : min(start + 20, sent)]
        if self.connections < 3:
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")

    def get_job_info(self, submission):
        from types import SimpleNamespace

        from ray.job_submission import JobStatus

        return SimpleNamespace(status=JobStatus.SUCCEEDED, message="", driver_exit_code=0)

    def get_job_logs(self, submission):
        return self.log


def test_a_dropped_connection_loses_and_repeats_nothing(capsys):
    client = DroppingClient()
    assert submit._follow(client, "pretrain-1", patience=60) == 0
    out = capsys.readouterr()
    assert out.out == client.log
    assert client.connections == 3
    assert out.err.count("connection lost") == 1


def test_following_is_given_up_when_the_cluster_stays_away():
    class Gone(DroppingClient):
        async def tail_job_logs(self, submission):
            raise OSError("no route to host")
            yield

    with pytest.raises(ConnectionError, match="no connection for 0 s"):
        submit._follow(Gone(), "pretrain-1", patience=0)
