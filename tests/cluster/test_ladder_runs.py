"""A ladder that is trained: rungs that are there are kept, others added, and the law written down."""

import dataclasses
import os

import pytest

from jobs import ladder
from jobs.cli import parse
from jobs.run_folder import StoredRun
from jobs.settings import LadderJob, ModelSettings, PretrainJob, SettingsError
from models.config import OptimizerConfig, ScheduleConfig
from pipelines import storage

pytestmark = pytest.mark.cluster


@pytest.mark.lab
def test_a_ladder_keeps_the_rungs_that_are_there_and_writes_what_it_foretells(token_workspace, capsys):
    base = PretrainJob(
        model=ModelSettings(d_model=32, n_layers=1, n_heads=8, n_kv_heads=8, d_ff=64),
        steps=40,
        global_batch=4,
        sequence_length=32,
        device="cpu",
        cpus_per_worker=0.5,
        optimizer=OptimizerConfig(lr=1e-2),
        schedule=ScheduleConfig(warmup_steps=4),
        validation_samples=8,
        report_every=0,
    )
    settings = LadderJob(
        workspace=token_workspace, name="steps", pretrain=base, widths=[8, 16], tokens_per_parameter=[0.25]
    )
    folder = f"{token_workspace}/sweeps/steps"
    with pytest.raises(RuntimeError, match="2 runs of 2 sizes; a scaling law wants at least 4"):
        ladder.run(settings)
    first = storage.list_files(f"{folder}/rungs")
    assert not os.path.exists(f"{folder}/ladder.json")

    settings = dataclasses.replace(settings, widths=[8, 16, 12, 20], gpu_hours=0.01)
    result = ladder.run(settings)
    files = storage.list_files(f"{folder}/rungs")
    assert [file for file in files if file in first] == first
    assert [row["d_model"] for row in result["rungs"]] == [8, 12, 16, 20]
    for row in result["rungs"]:
        stored = StoredRun(f"{folder}/rungs/{row['name']}")
        assert row["loss"] == [e for e in stored.events() if e["event"] == "end"][-1]["validation_loss"]
        assert stored.read_json("run.json")["model"]["base_width"] == 32  # the target's own: its learning rate is right
        assert row["flops_per_second_and_worker"] > 0
    assert storage.read_json(f"{folder}/ladder.json") == result
    assert parse("pretrain", ["--config", f"{folder}/best.yaml"]).model.d_model == result["budget"]["d_model"]
    assert {"ladder.svg", "report.html"} <= set(os.listdir(folder))
    assert f"loss {result['target']['loss']:.4f}" in capsys.readouterr().out

    hotter = dataclasses.replace(settings, pretrain=dataclasses.replace(base, optimizer=OptimizerConfig(lr=2e-2)))
    with pytest.raises(SettingsError, match=r"w8-l1-t0.25 .* optimizer.lr was 0.01 and is 0.02"):
        ladder.run(hotter)
