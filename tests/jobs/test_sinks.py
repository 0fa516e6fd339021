import importlib
import json
import sys
import time
import urllib.request

import pytest

from jobs import sinks
from jobs.run_folder import StoredRun
from jobs.settings import PretrainJob, SettingsError
from models.training.metrics import MetricsWriter

ROWS = [
    {"step": 1, "data_step": 0, "loss": 3.5, "mfu": None, "batch_hash": "00ff", "skipped": True},
    {"step": 1, "validation_loss": 3.25},
    {"step": 2, "data_step": 1, "loss": float("nan"), "mfu": 0.5, "batch_hash": "00fe"},
    {"step": 1, "undone_after": 1},
    {"step": 2, "data_step": 2, "loss": 3.0, "mfu": 0.5, "batch_hash": "00fd"},
]
QUANTITIES = [
    {"data_step": 0.0, "loss": 3.5, "skipped": 1.0},
    {"validation_loss": 3.25},
    {"data_step": 1.0, "mfu": 0.5},
    {},
    {"data_step": 2.0, "loss": 3.0, "mfu": 0.5},
]

# As much of the two clients as the sinks use, which note down what they are told.
WANDB = """
import json, os
class Run:
    def __init__(self, id): self.id = id
    def define_metric(self, name, step_metric): note("define_metric", name, step_metric)
    def log(self, row): note("log", row)
    def finish(self): note("finish")
def note(*call):
    with open(os.environ["NOTES"], "a") as out: out.write(json.dumps(call) + "\\n")
def init(*, project, name, id, resume, config, dir):
    if os.environ.get("AWAY"): raise ConnectionError("wandb does not answer")
    note("init", project, name, id, resume, config, dir)
    return Run(id or "new")
"""
MLFLOW = {
    "__init__.py": "",
    "entities.py": "from collections import namedtuple\nMetric = namedtuple('Metric', 'key value timestamp step')\n",
    "tracking.py": """
import json, os
from types import SimpleNamespace as Of
def note(*call):
    with open(os.environ["NOTES"], "a") as out: out.write(json.dumps(call) + "\\n")
class MlflowClient:
    def get_experiment_by_name(self, name): return None
    def create_experiment(self, name): note("experiment", name); return "7"
    def create_run(self, experiment_id, run_name):
        note("run", experiment_id, run_name)
        return Of(info=Of(run_id="new"))
    def log_param(self, run, key, value): note("param", run, key, value)
    def log_batch(self, run, metrics): note("batch", run, [[m.key, m.value, m.step] for m in metrics])
    def set_terminated(self, run, status="FINISHED"): note("status", run, status)
""",
}


@pytest.fixture
def run(tmp_path):
    folder = StoredRun(str(tmp_path / "runs/base"))
    folder.write_json("run.json", {"settings": {"steps": 2, "optimizer": {"lr": 0.001}}, "n_params": 5, "started": 1.0})
    return folder


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """Both clients installed as stand-ins; gives the calls that they got."""
    packages = tmp_path / "packages"
    (packages / "mlflow").mkdir(parents=True)
    (packages / "wandb.py").write_text(WANDB)
    for name, text in MLFLOW.items():
        (packages / "mlflow" / name).write_text(text)
    monkeypatch.syspath_prepend(str(packages))
    importlib.invalidate_caches()
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    calls = tmp_path / "calls.jsonl"
    monkeypatch.setenv("NOTES", str(calls))
    yield lambda: [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
    for name in ("wandb", "mlflow", "mlflow.entities", "mlflow.tracking"):
        sys.modules.pop(name, None)


def write(run, sink, rows=ROWS):
    writer = MetricsWriter(run, [sink], every=1e6)
    for row in rows:
        writer.write(row)
    writer.close()


def test_what_is_asked_for_but_not_installed_is_refused_by_name(run):
    settings = PretrainJob(name="base", track=["wandb"])
    with pytest.raises(SettingsError, match="track names wandb, which is not installed here; `pip install wandb`"):
        sinks.sinks_of(settings, run)


def test_only_what_is_asked_for_is_opened(run, notes):
    kinds = [type(sink).__name__ for sink in sinks.sinks_of(PretrainJob(name="base"), run)]
    assert kinds == ["RayMetrics", "TensorBoard"]
    asked = sinks.sinks_of(PretrainJob(name="base", track=["mlflow", "wandb"]), run)
    assert [type(sink).__name__ for sink in asked] == [*kinds, "WeightsAndBiases", "MLflow"]
    remote = sinks.sinks_of(PretrainJob(name="base"), StoredRun("s3://bucket/runs/base"))
    assert [type(sink).__name__ for sink in remote] == ["RayMetrics"]
    assert notes() == []


def test_tensorboard_has_the_numbers_by_step(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(run, sinks.TensorBoard(run.uri("tensorboard")))
    board = EventAccumulator(run.uri("tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == {"data_step", "loss", "mfu", "skipped", "validation_loss"}
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 3.5), (2, 3.0)]


def test_weights_and_biases_gets_the_rows_and_the_run_goes_on_there_after_a_restart(run, notes):
    write(run, sinks.WeightsAndBiases("base", run))
    write(run, sinks.WeightsAndBiases("base", run), ROWS[-1:])
    first, second = (call for call in notes() if call[0] == "init")
    config = {"settings": {"steps": 2, "optimizer": {"lr": 0.001}}, "n_params": 5}
    assert first == ["init", "ingot", "base", None, "allow", config, run.folder]
    assert second[3] == "new"
    told = [{"step": row["step"], **found} for row, found in zip(ROWS, QUANTITIES, strict=True) if found]
    assert [call[1] for call in notes() if call[0] == "log"] == [*told, told[-1]]
    assert ["define_metric", "*", "step"] in notes()
    assert notes()[-1] == ["finish"]


def test_mlflow_gets_the_rows_and_the_run_goes_on_there_after_a_restart(run, notes):
    write(run, sinks.MLflow("base", run))
    write(run, sinks.MLflow("base", run), ROWS[-1:])
    calls = notes()
    assert calls[:2] == [["experiment", "ingot"], ["run", "7", "base"]]
    assert [call for call in calls if call[0] == "run"] == [["run", "7", "base"]]
    assert ["param", "new", "settings.optimizer.lr", 0.001] in calls
    expected = [
        [name, value, row["step"]] for row, found in zip(ROWS, QUANTITIES, strict=True) for name, value in found.items()
    ]
    batches = [call[2] for call in calls if call[0] == "batch"]
    assert batches == [expected, expected[-3:]]
    assert [call[2] for call in calls if call[0] == "status"] == ["RUNNING", "FINISHED"] * 2


def test_a_service_that_does_not_answer_at_first_gets_the_rows_that_follow(run, notes, monkeypatch, caplog):
    sink = sinks.WeightsAndBiases("base", run)
    monkeypatch.setenv("AWAY", "1")
    with pytest.raises(ConnectionError):
        sink.write(ROWS[0])
    monkeypatch.delenv("AWAY")
    write(run, sink, ROWS[-1:])
    assert [call[1]["step"] for call in notes() if call[0] == "log"] == [2]


class Reporter:
    """Stands for the worker of rank 0."""

    def write(self, folder):
        sink = sinks.RayMetrics("base", StoredRun(folder))
        for row in ROWS:
            no_number = row["step"] == 2 and row.get("data_step") == 1
            sink.write({**row, "time": 2.0, "loss": None if no_number else row.get("loss")})


def test_rays_metrics_are_kept_from_being_forgotten(monkeypatch, run):
    told = []

    class Gauge:
        def __init__(self, name, description, tag_keys):
            self.name = name

        def set(self, value, tags):
            told.append((self.name, value, tags["run"]))

    monkeypatch.setattr("ray.util.metrics.Gauge", Gauge)
    sink = sinks.RayMetrics("base", run)
    sink.write({"step": 1, "validation_loss": 3.25, "time": 1.0})
    sink.write({"step": 2, "loss": 3.0, "time": 2.0})
    told.clear()
    sink.flush()
    expected = {"step": 2.0, "recoveries": 0.0, "validation_loss": 3.25, "loss": 3.0}
    assert told == [(f"ingot_{name}", value, "base") for name, value in expected.items()]


def test_rays_metrics_show_the_newest_numbers_with_the_name_of_the_run(ray_session, run):
    ray = ray_session
    run.write_text("metrics/1.jsonl", '{"step": 0, "undone_after": 0, "time": 1.0}\n')  # of workers before these
    reporter = ray.remote(num_cpus=0)(Reporter).remote()
    ray.get(reporter.write.remote(run.folder))
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline, found = time.monotonic() + 60, {}
    while len(found) < 7 and time.monotonic() < deadline:  # Ray collects them every few seconds
        time.sleep(0.5)
        with urllib.request.urlopen(address) as page:
            lines = [line for line in page.read().decode().splitlines() if line.startswith("ray_ingot_")]
        found = {line.split("{")[0]: float(line.split()[-1]) for line in lines if 'run="base"' in line}
    assert found == {
        "ray_ingot_step": 2, "ray_ingot_data_step": 2, "ray_ingot_loss": 3.0, "ray_ingot_mfu": 0.5,
        "ray_ingot_skipped": 0, "ray_ingot_validation_loss": 3.25, "ray_ingot_recoveries": 2,
    }  # fmt: skip
    ray.kill(reporter)
