"""Sweeps on Ray Tune and Train: killed and started again no finished trial is repeated, and PBT takes weights over."""

import dataclasses
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from training_bench import descendants, end_all, wait_until, write_recipe

from jobs import tune
from jobs.cli import parse
from jobs.run_folder import StoredRun, valid_steps
from jobs.settings import ModelSettings, PretrainJob, SearchDimension, TuneJob
from jobs.sweep_trials import Trials
from models.config import OptimizerConfig, ScheduleConfig
from models.optimizer import learning_rate
from pipelines import storage

pytestmark = pytest.mark.cluster

STEPS = 40
RATES = [1e-5, 2e-2]


def sweep_of(workspace):
    base = PretrainJob(
        model=ModelSettings(d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=64),
        steps=STEPS,
        global_batch=4,
        sequence_length=32,
        device="cpu",
        optimizer=OptimizerConfig(lr=3.0),
        schedule=ScheduleConfig(warmup_steps=2),
        validation_samples=8,
    )
    space = {"optimizer.lr": SearchDimension(values=RATES), "seed": SearchDimension(low=0, high=9, scale="linear")}
    given = {"workspace": workspace, "name": "rates", "pretrain": base, "space": space}
    return TuneJob(**given, trials=2, concurrent_trials=1, comparisons=5, seed=9)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, token_workspace):
    """The sweep, killed with SIGKILL once a trial had ended, and started again to its end."""
    root = tmp_path_factory.mktemp("tuning")
    settings = sweep_of(token_workspace)
    recipe = f"{root}/recipe.yaml"
    write_recipe(settings, recipe)
    command, folder = ["-m", "jobs", "tune", "--config", recipe], f"{token_workspace}/sweeps/rates"
    with started(command, root / "first.log") as first:
        wait_until(lambda: ended(folder) or first.poll() is not None, 300)
        assert first.poll() is None, (root / "first.log").read_text()
        before = {name: files_of(folder, name) for name in ended(folder)}
    with started(command, root / "second.log") as second:
        assert second.wait(300) == 0, (root / "second.log").read_text()
    table = storage.read_json(f"{folder}/results.json")["trials"]
    printed = (root / "second.log").read_text()
    return SimpleNamespace(settings=settings, folder=folder, before=before, table=table, printed=printed)


class started:  # noqa: N801 (used as a context manager function)
    """A Python program with a Ray of its own; ended with all its processes when the block is left."""

    def __init__(self, arguments, log):
        self.arguments, self.log = arguments, log

    def __enter__(self):
        with open(self.log, "w") as log:
            self.driver = subprocess.Popen(
                [sys.executable, *self.arguments],
                env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.driver

    def __exit__(self, *_):
        family = descendants(self.driver.pid)
        self.driver.kill()
        self.driver.wait()
        end_all(family)


def ended(folder):
    """Names of the trials that have come to their end, by their own account or the scheduler's."""
    return [name for name, trial in Trials(folder).all.items() if trial.state in ("finished", "stopped")]


def files_of(folder, trial):
    """A trial's files with size and time, without what Ray keeps there."""
    files = storage.list_files(f"{folder}/trials/{trial}")
    return [file for file in files if "/ray/" not in file.uri]


def test_results_rank_every_trial_by_its_measured_validation_loss(sweep):
    assert len(sweep.table) == 2
    assert [row["step"] for row in sweep.table] == sorted((row["step"] for row in sweep.table), reverse=True)
    for row in sweep.table:
        trial = StoredRun(f"{sweep.folder}/trials/{row['trial']}")
        held_out = valid_steps(trial.metrics(), "validation_loss")
        assert row["validation_loss"] == held_out[row["step"]]["validation_loss"]
        given = trial.read_json("run.json")["settings"]
        assert (given["optimizer"]["lr"], given["seed"]) == (row["optimizer.lr"], row["seed"])
        assert row["trial"] in sweep.printed
    finished = [row for row in sweep.table if row["step"] == STEPS]
    assert finished
    assert sweep.table[0]["validation_loss"] == min(row["validation_loss"] for row in finished)
    hopeless = [row for row in sweep.table if row["optimizer.lr"] == 1e-5]
    assert hopeless
    assert all(row["step"] < STEPS and row["state"] == "stopped" for row in hopeless)


def test_the_best_settings_are_a_recipe_for_pretraining(sweep):
    best = parse("pretrain", ["--config", f"{sweep.folder}/best.yaml"])
    base, row = sweep.settings.pretrain, sweep.table[0]
    expected = dataclasses.replace(
        base,
        workspace=sweep.settings.workspace,
        name="best",
        optimizer=OptimizerConfig(lr=row["optimizer.lr"]),
        seed=row["seed"],
    )
    assert best == expected


def test_a_killed_sweep_goes_on_without_repeating_what_had_ended(sweep):
    assert sweep.before
    for trial, files in sweep.before.items():
        assert files_of(sweep.folder, trial) == files
    assert sorted(os.listdir(f"{sweep.folder}/trials")) == sorted(row["trial"] for row in sweep.table)


def test_a_finished_sweep_does_nothing_when_started_again(sweep, monkeypatch, capsys):
    before = storage.list_files(sweep.folder)
    monkeypatch.setattr(tune, "ray_session", None)  # not even Ray is started
    assert tune.run(sweep.settings) == sweep.table
    changed = [storage.file_name(file.uri) for file in storage.list_files(sweep.folder) if file not in before]
    assert set(changed) <= {"sweep.json", "best.yaml", "results.json"}
    assert sweep.table[0]["trial"] in capsys.readouterr().out


# A planted objective


def planted_sweep(workspace):
    """Sixteen trials under ASHA, whose best setting is one of four learning rates."""
    return TuneJob(
        workspace=workspace,
        name="planted",
        pretrain=PretrainJob(steps=80, device="cpu", schedule=ScheduleConfig(warmup_steps=10)),
        space={
            "optimizer.lr": SearchDimension(values=[1e-4, 1e-3, 1e-2, 1e-1]),
            "optimizer.weight_decay": SearchDimension(low=0.0, high=0.2, scale="linear"),
        },
        search="tpe",
        trials=16,
        concurrent_trials=2,
    )


def planted(task):
    """Nats that lie lowest at a learning rate of 0.01; takes down each call. Trial 005 fails when it is run first."""
    storage.append_line(f"{task.folder}/calls.txt", "called")
    if task.name == "005" and len(storage.read_bytes(f"{task.folder}/calls.txt").split()) == 1:
        raise MemoryError("planted")
    for step in (20, 40, 60, 80):
        off = abs(math.log10(task.settings["optimizer.lr"]) + 2)
        task.report(step, 3 + off + task.settings["optimizer.weight_decay"] + 20 / step)


def calls(folder, trial):
    return len(storage.read_bytes(f"{folder}/trials/{trial}/calls.txt").split())


@pytest.mark.lab
def test_sixteen_trials_killed_half_way_are_run_once_each_and_find_the_planted_optimum(tmp_path, ray_session):
    folder = f"{tmp_path}/sweeps/planted"
    code = (
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_tune as t; from jobs import tune\n"
        f"tune.sweep(t.planted_sweep({str(tmp_path)!r}), t.planted)"
    )
    with started(["-c", code], tmp_path / "first.log") as first:
        wait_until(lambda: len(ended(folder)) >= 7 or first.poll() is not None, 300)
        assert first.poll() is None, (tmp_path / "first.log").read_text()
    before = {name: calls(folder, name) for name in ended(folder)}
    table = tune.sweep(planted_sweep(str(tmp_path)), planted)
    assert 7 <= len(before) < 16
    assert set(before.values()) == {1}
    assert {name: calls(folder, name) for name in before} == before
    assert len(table) == 16
    states = {row["trial"]: row["state"] for row in table}
    assert states.pop("005") in ("failed", "finished", "stopped")  # as it was run before the kill or after
    assert set(states.values()) == {"finished", "stopped"}
    assert table[0]["optimizer.lr"] == 1e-2
    hopeless = [row for row in table if row["optimizer.lr"] == 1e-4 and row["trial"] > "003"]
    assert all(row["step"] < 80 for row in hopeless)


@pytest.mark.lab
def test_a_population_takes_over_weights_and_tells_its_lineage(token_workspace):
    base = dataclasses.replace(sweep_of(token_workspace).pretrain, steps=20)
    space = {"optimizer.lr": SearchDimension(low=1e-6, high=3e-2)}
    given = {"workspace": token_workspace, "name": "population", "pretrain": base, "space": space}
    table = tune.run(TuneJob(**given, trials=2, scheduler="pbt", comparisons=2, concurrent_trials=2))
    folder = f"{token_workspace}/sweeps/population"
    trials = Trials(folder)
    worse, better = sorted(trials.all.values(), key=lambda trial: -trial.losses[10])
    assert (worse.step, better.step) == (20, 20)
    row = next(row for row in table if row["trial"] == worse.name)
    was, now = worse.stretches
    assert row["lineage"] == [{"step": 10, "from": better.name, "before": was.settings, "after": now.settings}]
    assert now.settings["optimizer.lr"] not in (was.settings["optimizer.lr"], better.settings["optimizer.lr"])
    # The weights are the better one's, and the rate is the new one, of a schedule over all steps.
    run = StoredRun(f"{folder}/trials/{worse.name}/1")
    rows = valid_steps(run.metrics())
    assert list(rows) == list(range(11, 21))
    assert rows[11]["loss"] == pytest.approx(trials.all[better.name].losses[10], abs=0.4)
    assert rows[11]["lr"] == pytest.approx(learning_rate(10, 20, now.settings["optimizer.lr"], base.schedule))
    assert f"{better.name} at 10" in storage.read_bytes(f"{folder}/report.html").decode()
