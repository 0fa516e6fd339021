import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jobs import job_server, submit
from jobs.settings import SettingsError
from jobs.shipping import Paths, is_here, ship_arguments

ROOT = str(Path(__file__).parents[2])


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
def test_interrupting_stops_the_job_when_asked(cluster, checkout, token):
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
    client = JobSubmissionClient(cluster, headers={"Authorization": f"Bearer {token}"})
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


def test_nothing_there_is_one_sentence(checkout, monkeypatch):
    monkeypatch.setattr(job_server, "REACH_SECONDS", 0.1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(SettingsError, match=r"no Ray dashboard answers \(ConnectionError\); start a cluster"):
            submit.run(submit.SubmitSettings(address=address), "generate", [])


def test_an_unknown_job_and_bad_settings_are_refused_before_the_cluster_is_asked(checkout, capsys):
    settings = submit.SubmitSettings(address="http://127.0.0.1:1")
    with pytest.raises(SettingsError, match="there is no job 'pretrian'; there are demo, flow, curate,"):
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
    files = {}
    arguments = ["--config=recipe.yaml", "--workspace", "w", "--prompt=a=b c", "--data_dir", "data/a.jsonl"]
    arguments += ["--sources", '[{"kind": "jsonl", "path": "data/a.jsonl"}]', "--flag"]

    shipped = ship_arguments("curate", arguments, files, Paths("http://x", []))

    assert shipped[:2] == ["--config", "recipe-0.yaml"]
    assert yaml.safe_load(files["recipe-0.yaml"]) == {
        "sources": [{"kind": "jsonl", "path": f"{checkout}/data/a.jsonl"}]
    }
    assert shipped[2:4] == ["--prompt=a=b c", f"--data_dir={checkout}/data/a.jsonl"]
    name, value = shipped[4].split("=", 1)
    assert name == "--sources"
    assert yaml.safe_load(value) == [{"kind": "jsonl", "path": f"{checkout}/data/a.jsonl"}]
    assert shipped[5:] == ["--flag"]
    with pytest.raises(SettingsError, match=r"config is 'missing\.yaml'; there is no such file"):
        ship_arguments("curate", ["--config", "missing.yaml"], {}, Paths("http://x", []))


def test_addresses_of_this_machine_are_told_from_others():
    assert is_here("127.0.0.1")
    assert not is_here("192.0.2.1")  # reserved for documentation (RFC 5737)
