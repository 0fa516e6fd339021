"""The whole flow as one job on a cluster, submitted with Ray's own tool and with ours."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from jobs import cli, flow, status, submit, submitted
from jobs.job_server import Door, job_server
from jobs.settings import CurateJob, SettingsError, checked

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path):
    """A recipe for a model of next to nothing."""
    draw = random.Random(0)
    words = ["house", "river", "letter", "machine", "garden", "window", "road", "ship", "table", "bird", "engine"]
    with open(tmp_path / "texts.jsonl", "w") as file:
        for _ in range(60):
            lines = (
                f"The {draw.choice(words)} sees the {draw.choice(words)} {draw.randrange(999)}." for _ in range(40)
            )
            file.write(json.dumps({"text": " ".join(lines)}) + "\n")
    sections = {
        "workspace": str(tmp_path / "project"),
        "curate": {"sources": [{"kind": "jsonl", "path": str(tmp_path / "texts.jsonl"), "rules": []}]},
        "tokenizer": {"vocab_size": 400},
        "tokenize": {"validation_share": 0.1},
        "pretrain": {
            "name": "tiny",
            "model": {"preset": "nano", "n_layers": 1, "d_model": 32, "n_heads": 2, "n_kv_heads": 1, "d_ff": 64},
            "device": "cpu",
            "sequence_length": 32,
            "global_batch": 4,
            "steps": 6,
            "checkpoint_every": 3,
            "validate_every": 3,
            "validation_samples": 4,
            "clean_after": 1,
            "schedule": {"warmup_steps": 1},
        },
        "evaluate": {"validation_samples": 4},
        "export": {},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(sections))
    return file


def test_each_step_gets_its_section_of_the_recipe(recipe):
    settings = cli.parse("flow", ["--config", str(recipe), "--pretrain.steps", "9"])
    checked(settings)
    steps = flow.steps(settings)
    assert list(steps) == list(cli.FLOW) == list(flow.STEPS)
    assert {own.workspace for own in steps.values()} == {f"{recipe.parent}/project"}
    assert isinstance(steps["curate"], CurateJob)
    assert steps["tokenizer"].vocab_size == 400
    assert (steps["pretrain"].steps, steps["evaluate"].name, steps["evaluate"].validation_samples) == (9, "tiny", 4)


def test_steps_of_other_workspaces_and_runs_are_refused(recipe):
    for option, message in (
        ("--pretrain.workspace", "workspace of a step is 'x'"),
        ("--evaluate.name", "pretrain's, tiny"),
    ):
        with pytest.raises(SettingsError, match=message):
            checked(cli.parse("flow", ["--config", str(recipe), option, "x"]))


@pytest.mark.parametrize("section", ["evaluate", "pretrain.evaluate"])
def test_a_task_that_does_not_exist_is_refused_before_anything_is_done(recipe, monkeypatch, section):
    monkeypatch.setattr(flow, "ray_session", None)  # nothing is started
    every = ["--pretrain.evaluate.every_steps", "3"] if section == "pretrain.evaluate" else []
    settings = cli.parse("flow", ["--config", str(recipe), f"--{section}.tasks", "mmlu_anatomie", *every])
    with pytest.raises(SettingsError, match="'mmlu_anatomie'; the harness has no such task; near are"):
        flow.run(settings)


@pytest.mark.cluster
def test_rays_own_submission_works_and_ours_goes_on_where_it_was_stopped(cluster, token, recipe, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    ray = [os.path.join(os.path.dirname(sys.executable), "ray"), "job", "submit", "--address", cluster]
    job = ["python", "-m", "jobs", "flow", "--config", str(recipe)]
    plain = [*ray, "--submission-id", "plain", "--no-wait", "--working-dir", ".", "--", *job]
    handed_in = subprocess.run(plain, capture_output=True, text=True)
    assert handed_in.returncode == 0, handed_in.stderr
    with job_server(Door(cluster)) as server:
        while "flow: 4 of 5" not in (log := server.client.get_job_logs("plain")):
            assert not server.client.get_job_status("plain").is_terminal(), log
            time.sleep(0.2)
        (details,) = [job for job in submitted.submitted(server) if job.submission_id == "plain"]
        assert submitted.last_words(server, details).startswith(("flow: 4 of 5, pretrain", "pretrain: "))
    assert status.main(["--address", cluster]) == 0
    assert submitted.main(["stop", "plain", "--address", cluster]) == 0
    seen = capsys.readouterr().out
    assert "1      head  " in seen
    assert "plain\n  status     RUNNING" in seen

    assert submit.main(["flow", "--address", cluster, "--config", str(recipe)]) == 0

    out = capsys.readouterr().out
    for stage in ("extract", "filter", "exact", "near", "tokenizer", "tokens"):
        assert f"{stage}: up to date, nothing to do" in out
    results = json.loads((recipe.parent / "project/evals/tiny/results.json").read_text())
    assert results["step"] == 6
    assert f"validation loss {results['validation_loss']:.4f}" in out
    run = [json.loads(line) for line in (recipe.parent / "project/runs/tiny/events.jsonl").read_text().splitlines()]
    assert run[-1]["event"] == "end"
