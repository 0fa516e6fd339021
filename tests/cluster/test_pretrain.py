"""Pretraining on Ray Train: what is killed goes on as if nothing had been; what is poisoned is left out."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from training_bench import (
    SPIKES,
    descendants,
    end_all,
    processes,
    small_run,
    token_record,
    wait_until,
    weights,
    write_recipe,
)

from jobs import export, validation
from jobs import pretrain as job
from jobs.cli import main
from jobs.run_folder import StoredRun, valid_steps
from jobs.settings import ExportJob, Faults, ModelSettings, OfRun, SettingsError
from jobs.trained import load
from models.config import OptimizerConfig, ScheduleConfig
from models.training.state import TrainingStoppedError
from pipelines import storage
from pipelines.documents import InputError

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session", "short_polls")]

STEPS = 60


@pytest.fixture(scope="module")
def short_polls():
    """Ray Train takes one checkpoint at each look at the workers; these runs take several in a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
        yield


@pytest.fixture(scope="module")
def workspace(token_workspace):
    return token_workspace


def settings(workspace, name, **changes):
    spikes = dataclasses.replace(SPIKES, max_rollbacks=1)
    given = {"steps": STEPS, "spikes": spikes, "validate_every": 30, "validation_samples": 20, **changes}
    return small_run(workspace, name, **given)


def run_of(workspace, name):
    """What a run left behind: its valid losses and data steps by step, events by kind, and its folder."""
    folder = StoredRun(f"{workspace}/runs/{name}")
    rows = valid_steps(folder.metrics())
    events = folder.events()
    return SimpleNamespace(
        folder=folder,
        losses={step: row["loss"] for step, row in rows.items()},
        data_steps={step: row["data_step"] for step, row in rows.items()},
        events=lambda kind: [event for event in events if event["event"] == kind],
    )


@pytest.fixture(scope="module")
def undisturbed(workspace, short_polls):
    final = job.pretrain(settings(workspace, "undisturbed"))
    return SimpleNamespace(final=final, **vars(run_of(workspace, "undisturbed")))


def test_the_model_learns_and_every_step_is_told_once(workspace, undisturbed):
    assert list(undisturbed.losses) == list(range(1, STEPS + 1))
    assert undisturbed.data_steps == {step: step - 1 for step in range(1, STEPS + 1)}
    assert token_record(settings(workspace, "undisturbed")) == []
    assert undisturbed.losses[STEPS] < 0.5 * undisturbed.losses[1]
    held_out = valid_steps(undisturbed.folder.metrics(), "validation_loss")
    assert list(held_out) == [0, 30, STEPS]
    (end,) = undisturbed.events("end")
    assert end["validation_loss"] == undisturbed.final["validation_loss"] == held_out[STEPS]["validation_loss"]
    assert end["loss"] == undisturbed.losses[STEPS]
    assert [event["step"] for event in undisturbed.events("checkpoint")] == list(range(0, STEPS + 1, 10))


def test_pretraining_goes_on_from_an_export(workspace, undisturbed, tmp_path):
    exported = str(tmp_path / "export")
    export.run(ExportJob(workspace=workspace, name="undisturbed", output=exported, max_shard_size="10KB"))
    given = settings(
        workspace,
        "continued",
        init_from=exported,
        model=ModelSettings(),
        steps=2,
        schedule=ScheduleConfig(warmup_steps=2),
    )
    final = job.pretrain(given)
    run = run_of(workspace, "continued")
    measured = valid_steps(run.folder.metrics(), "validation_loss")
    assert measured[0]["validation_loss"] == pytest.approx(undisturbed.final["validation_loss"], abs=1e-5)
    facts, of_before = run.folder.read_json("run.json"), undisturbed.folder.read_json("run.json")
    assert facts["model"] == of_before["model"]
    assert facts["init_from"] == {
        "model": exported,
        "repository": False,
        "fingerprint": facts["init_from"]["fingerprint"],
    }
    assert facts["init_from"]["fingerprint"] == load(OfRun(model=exported)).fingerprint
    assert run.folder.read_json("hardware.json") == {"device": "CPU", "workers": 2}
    # from now on the run needs its own checkpoints alone
    _, second, *_ = sorted(name for name in os.listdir(exported) if name.endswith(".safetensors"))
    os.unlink(f"{exported}/{second}")
    assert job.pretrain(given) == final
    with pytest.raises(SettingsError, match=f"init_from is .*{second}"):
        job.pretrain(dataclasses.replace(given, name="other"))
    with pytest.raises(SettingsError, match=r"started with other settings: init_from was .* and is None"):
        job.pretrain(settings(workspace, "continued", steps=2, schedule=ScheduleConfig(warmup_steps=2)))


def test_ray_trains_result_points_to_the_newest_checkpoint(undisturbed):
    from ray.train import Result

    result = Result.from_path(undisturbed.folder.uri("ray"))
    with result.checkpoint.as_directory() as folder, open(f"{folder}/pointer.json") as file:
        pointer = json.load(file)
    newest = undisturbed.folder.read_json("ledger.json")["checkpoints"][-1]
    assert pointer["folder"] == newest["folder"] == f"checkpoints/step-{STEPS:08d}"
    assert newest["status"] == "clean"
    assert undisturbed.folder.read_json(f"{newest['folder']}/checkpoint.json")["files"]


def test_a_finished_run_does_nothing_when_started_again(workspace, undisturbed, monkeypatch):
    before = storage.list_files(undisturbed.folder.folder)
    monkeypatch.setattr(job, "ray_session", None)  # not even Ray is started
    assert job.run(settings(workspace, "undisturbed")) == undisturbed.final
    assert storage.list_files(undisturbed.folder.folder) == before


def test_a_driver_killed_at_any_step_goes_on_bit_for_bit(workspace, undisturbed, tmp_path):
    """From a working directory, with a relative workspace, as on a command line."""
    folder = StoredRun(f"{workspace}/runs/killed")
    slow = Faults(slow_worker_seconds=0.1)  # the kill comes before the end
    given = settings(os.path.basename(workspace), "killed", checkpoint_every=5, faults=slow)
    write_recipe(given, tmp_path / "recipe.yaml")
    kill_after = random.Random(1).randrange(5, 50)
    with open(tmp_path / "log", "w+") as log:
        driver = subprocess.Popen(
            [sys.executable, "-m", "jobs", "pretrain", "--config", str(tmp_path / "recipe.yaml")],
            cwd=os.path.dirname(workspace),
            env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        family = []
        try:
            wait_until(lambda: checkpoints_of(folder, kill_after) or driver.poll() is not None, 90)
            assert driver.poll() is None, (tmp_path / "log").read_text()
            family = descendants(driver.pid)
        finally:
            driver.kill()
            driver.wait()
            end_all(family)
    assert not any(event["event"] == "end" for event in folder.events())
    # Ray writes its own account of the run in place: the kill may have come while it did.
    storage.write_bytes(folder.uri("ray/checkpoint_manager_snapshot.json"), b"")

    job.pretrain(settings(workspace, "killed", checkpoint_every=5))

    run = run_of(workspace, "killed")
    assert run.losses == undisturbed.losses, f"killed after the checkpoint at or behind step {kill_after}"
    assert run.data_steps == undisturbed.data_steps
    (resume,) = run.events("resume")
    assert resume["cause"] == "driver_restart"
    assert resume["from_step"] >= kill_after
    assert [event["attempt"] for event in run.events("start")] == [1, 2]


def test_a_killed_worker_and_poisoned_data_are_recovered_from(workspace, undisturbed):
    kill_at = random.Random(2).randrange(11, 35)
    faults = Faults(kill_worker_at_step=kill_at, poison_data_steps=(42, 47))
    final = job.pretrain(settings(workspace, "chaos", faults=faults))
    run = run_of(workspace, "chaos")

    (failure,) = run.events("worker_failure")
    assert 1 in failure["ranks"]
    (resume,) = run.events("resume")
    assert resume["cause"] == "worker_restart"
    assert resume["from_step"] in (kill_at // 10 * 10, kill_at // 10 * 10 - 10)  # or it was still being written
    (rollback,) = run.events("rollback")
    assert rollback["checkpoint_status"] == "clean"
    assert rollback["to_step"] == 30
    start, end = rollback["skipped"]
    assert start <= 42
    assert end >= 44
    ledger = run.folder.read_json("ledger.json")
    assert ledger["skips"] == [[start, end]] or end < 47
    assert len(run.events("start")) == len(run.events("end")) == 1

    assert list(run.losses) == list(range(1, STEPS + 1))
    assert not set(run.data_steps.values()) & set(range(start, end))
    assert {step: run.losses[step] for step in range(1, start + 1)} == {
        step: undisturbed.losses[step] for step in range(1, start + 1)
    }
    assert final["validation_loss"] == pytest.approx(undisturbed.final["validation_loss"], rel=0.1)


def test_a_killed_controller_is_started_again_and_the_run_ends_bit_for_bit(workspace, undisturbed):
    folder = StoredRun(f"{workspace}/runs/headless")
    killed = []

    def kill():
        wait_until(lambda: checkpoints_of(folder, 15), 90)
        # Those of earlier runs may take a while to go.
        *_, controller = processes("ray::TrainController", os.getpid())
        os.kill(controller, signal.SIGKILL)
        killed.append(controller)

    killer = threading.Thread(target=kill)
    killer.start()
    # All cores of the session: the new workers need those of the old ones.
    given = settings(workspace, "headless", checkpoint_every=5, faults=Faults(slow_worker_seconds=0.1))
    given.cpus_per_worker = 2
    job.pretrain(given)
    killer.join()
    run = run_of(workspace, "headless")
    assert len(killed) == len(run.events("controller_failure")) == 1
    assert [(event["cause"], event["from_step"] >= 15) for event in run.events("resume")] == [
        ("controller_restart", True)
    ]
    assert run.losses == undisturbed.losses
    assert token_record(given) == []
    assert np.array_equal(weights(given), weights(settings(workspace, "undisturbed")))


def test_validation_beside_training_measures_what_the_workers_would(workspace, undisturbed):
    given = settings(workspace, "beside", validation="beside", keep_checkpoints=10)
    final = job.pretrain(given)
    run = run_of(workspace, "beside")
    names = ("validation_loss", "validation_bits_per_byte")
    within, beside = (valid_steps(of.folder.metrics(), names[0]) for of in (undisturbed, run))
    assert list(beside) == list(within) == [0, 30, STEPS]
    for name in names:
        assert [row[name] for row in beside.values()] == pytest.approx([row[name] for row in within.values()], rel=1e-5)
        assert final[name] == beside[STEPS][name]

    # What cannot be measured is told, and is Ray Train's to report, not the end of the run.
    from ray.train import Checkpoint

    pointed = run.folder.uri("pointed")
    run.folder.write_json("pointed/pointer.json", {"folder": "checkpoints/step-00000030"})
    storage.delete(run.folder.uri("checkpoints/step-00000030"))
    with pytest.raises(FileNotFoundError):
        validation.validate(Checkpoint.from_directory(pointed), given, run.folder.folder)
    (failed,) = run_of(workspace, "beside").events("validation_failed")
    assert failed["step"] == 30


def test_a_damaged_token_shard_ends_the_run_at_once_with_its_name(workspace, tmp_path):
    for folder in ("tokens", "tokenizer"):
        shutil.copytree(f"{workspace}/{folder}", tmp_path / folder)
    for shard in sorted((tmp_path / "tokens" / "train").glob("shard-*.parquet")):
        content = bytearray(shard.read_bytes())
        content[len(content) // 3] ^= 4
        shard.write_bytes(content)
    with pytest.raises(InputError, match=r"tokens/train/shard-\d+\.parquet: row group \d+ cannot be read"):
        job.pretrain(settings(str(tmp_path), "damaged"))
    run = run_of(str(tmp_path), "damaged")
    assert len(run.events("stop")) == 1
    assert not run.events("worker_failure")


def test_one_worker_sees_the_same_batches_and_comes_to_the_same_losses(workspace, undisturbed, capsys):
    given = settings(workspace, "alone", workers=1)
    job.pretrain(given)
    run = run_of(workspace, "alone")
    assert run.data_steps == undisturbed.data_steps
    # sums are made in another order; what rounding leaves grows with the steps
    losses, expected = list(run.losses.values()), list(undisturbed.losses.values())
    assert losses[:10] == pytest.approx(expected[:10], rel=2e-6)
    assert losses == pytest.approx(expected, rel=1e-3)

    before = storage.list_files(run.folder.folder)
    changed = dataclasses.replace(given, optimizer=OptimizerConfig(lr=1e-3))
    with pytest.raises(SettingsError, match=r"optimizer.lr was 0.02 and is 0.001\. Choose another --name"):
        job.pretrain(changed)
    assert storage.list_files(run.folder.folder) == before

    # Started anew, and with data that never gets better: it stops by itself, once, and says why.
    hopeless = dataclasses.replace(changed, on_change="restart", faults=Faults(poison_data_steps=(30, 10_000)))
    with pytest.raises(TrainingStoppedError, match="gone back 1 times .* spikes.max_rollbacks"):
        job.pretrain(dataclasses.replace(hopeless, optimizer=OptimizerConfig(lr=1e-2)))
    anew = run_of(workspace, "alone")
    assert [event["attempt"] for event in anew.events("start")] == [1]
    assert len(anew.events("stop")) == 1
    assert not anew.events("worker_failure")
    assert not anew.events("end")
    assert anew.folder.read_json("run.json")["settings"]["optimizer"]["lr"] == 1e-2


def test_sequences_longer_than_the_tokens_are_refused_before_ray_starts(workspace, monkeypatch, capsys):
    monkeypatch.setattr(job, "ray_session", None)
    assert main(["pretrain", "--workspace", workspace, "--name", "long", "--sequence_length", "1000000"]) == 2
    assert "sequence_length is 1000000; " in capsys.readouterr().err
    assert not os.path.exists(f"{workspace}/runs/long")


def checkpoints_of(folder, step):
    """Whether the run has a checkpoint of this step or a later one."""
    return any(event["event"] == "checkpoint" and event["step"] >= step for event in folder.events())
