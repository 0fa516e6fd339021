"""A sweep: its results, its recipe and its picture; killed and started again, no finished trial is repeated."""

import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from xml.etree import ElementTree as ET

import pytest
import yaml
from training_bench import descendants, end_all, wait_until

from jobs import tune
from jobs.cli import parse
from jobs.run_folder import StoredRun, valid_steps
from jobs.settings import ModelSettings, PretrainJob, SearchDimension, TuneJob
from models.config import OptimizerConfig, ScheduleConfig
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
    return TuneJob(**given, trials=3, concurrent_trials=1, comparisons=5, seed=10)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, token_workspace):
    """The sweep, killed with SIGKILL once a trial had ended, and started again to its end."""
    root = tmp_path_factory.mktemp("tuning")
    settings = sweep_of(token_workspace)
    recipe = f"{root}/recipe.yaml"
    with open(recipe, "w") as file:
        yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(settings))), file)
    folder = f"{token_workspace}/sweeps/rates"
    with started(root, recipe, "first.log") as first:
        wait_until(lambda: ended(folder) or first.poll() is not None, 120)
        assert first.poll() is None, (root / "first.log").read_text()
        first.before = {name: files_of(folder, name) for name in ended(folder)}
    with started(root, recipe, "second.log") as second:
        assert second.wait(120) == 0, (root / "second.log").read_text()
    table = storage.read_json(f"{folder}/results.json")["trials"]
    printed = (root / "second.log").read_text()
    return SimpleNamespace(settings=settings, folder=folder, before=first.before, table=table, printed=printed)


class started:  # noqa: N801 (used as a context manager function)
    """`python -m jobs tune`, with a Ray of its own; ended with all its processes when the block is left."""

    def __init__(self, root, recipe, log):
        self.root, self.recipe, self.log = root, recipe, log

    def __enter__(self):
        with open(self.root / self.log, "w") as log:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", "jobs", "tune", "--config", self.recipe],
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
    """Names of the trials that have reached their last step."""
    trials = f"{folder}/trials"
    names = os.listdir(trials) if os.path.exists(trials) else []
    return [n for n in names if any(e["event"] == "end" for e in StoredRun(f"{trials}/{n}").events())]


def files_of(folder, trial):
    """A trial's files with size and time, without what Ray keeps there."""
    files = storage.list_files(f"{folder}/trials/{trial}")
    return [file for file in files if "/ray/" not in file.uri]


def test_results_rank_every_trial_by_its_measured_validation_loss(sweep):
    assert len(sweep.table) == 3
    assert [row["step"] for row in sweep.table] == sorted((row["step"] for row in sweep.table), reverse=True)
    for row in sweep.table:
        trial = StoredRun(f"{sweep.folder}/trials/{row['trial']}")
        held_out = valid_steps(trial.metrics(), "validation_loss")
        assert row["validation_loss"] == held_out[max(held_out)]["validation_loss"]
        given = trial.read_json("run.json")["settings"]
        assert (given["optimizer"]["lr"], given["seed"]) == (row["optimizer.lr"], row["seed"])
        assert row["trial"] in sweep.printed
    finished = [row for row in sweep.table if row["step"] == STEPS]
    assert finished
    assert sweep.table[0]["validation_loss"] == min(row["validation_loss"] for row in finished)
    hopeless = [row for row in sweep.table if row["optimizer.lr"] == 1e-5]
    assert hopeless
    assert all(row["step"] < STEPS for row in hopeless)  # stopped early


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


def test_the_picture_is_an_svg(sweep):
    root = ET.parse(f"{sweep.folder}/sweep.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"


def test_a_killed_sweep_goes_on_without_repeating_what_had_ended(sweep):
    assert sweep.before
    for trial, files in sweep.before.items():
        assert files_of(sweep.folder, trial) == files
    assert sorted(os.listdir(f"{sweep.folder}/trials")) == sorted(row["trial"] for row in sweep.table)


def test_a_finished_sweep_does_nothing_when_started_again(sweep, monkeypatch, capsys):
    before = storage.list_files(sweep.folder)
    monkeypatch.setattr(tune, "ray_session", None)  # not even Ray is started
    assert tune.run(sweep.settings) == sweep.table
    changed = [file.uri for file in storage.list_files(sweep.folder) if file not in before]
    assert changed == [f"{sweep.folder}/sweep.json"]
    assert sweep.table[0]["trial"] in capsys.readouterr().out
