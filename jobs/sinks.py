"""Where a run's numbers go beside its own files: TensorBoard, Ray's metrics, Weights & Biases, MLflow.

Each is a ``models.training.metrics.Sink``, opened by its first row, so that a service that does not answer keeps no
run from starting. The last two are no dependencies: they are asked for by the setting ``track``, and have to be
installed where the workers run. A run that goes on after a restart goes on there too; which run it is there lies in
``track.json`` of its folder.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from jobs.run_folder import StoredRun
from jobs.settings import PretrainJob, SettingsError
from models.training.metrics import Sink
from pipelines import storage

TRACK = "track.json"

# Not a quantity: where the row belongs, or for the record.
_NO_QUANTITY = {"step", "time", "undone_after", "batch_hash", "data_steps"}


def check_installed(track: list[str]) -> None:
    """Refuse to start a run that is to be tracked with what is not there.

    Raises:
        SettingsError: naming what to install.
    """
    for name in track:
        if importlib.util.find_spec(name) is None:
            raise SettingsError(
                f"track names {name}, which is not installed here; `pip install {name}` on all machines of the "
                "cluster, or leave it out"
            )


def sinks_of(settings: PretrainJob, folder: StoredRun) -> list[Sink]:
    """The sinks of a run, for the worker of rank 0; TensorBoard's where the run's folder is local.

    Raises:
        SettingsError: ``track`` names what is not installed here.
    """
    check_installed(settings.track)
    sinks: list[Sink] = [RayMetrics(settings.name, folder)]
    if storage.local_path(folder.folder):
        sinks.append(TensorBoard(folder.uri("tensorboard")))
    if "wandb" in settings.track:
        sinks.append(WeightsAndBiases(settings.name, folder))
    if "mlflow" in settings.track:
        sinks.append(MLflow(settings.name, folder))
    return sinks


def quantities(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row by name; what is None is left out, yes is 1."""
    return {
        name: float(value) for name, value in row.items() if name not in _NO_QUANTITY and isinstance(value, int | float)
    }


class TensorBoard:
    """Event files in a local folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.writer: Any = None

    def write(self, row: dict[str, Any]) -> None:
        """Take a row."""
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(self.folder)
        for name, value in quantities(row).items():
            self.writer.add_scalar(name, value, row["step"], walltime=row["time"])

    def flush(self) -> None:
        """Write to the folder."""
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        """End the file."""
        if self.writer is not None:
            self.writer.close()


class RayMetrics:
    """Gauges ``ingot_<quantity>`` with the tag ``run``, which Ray exports to Prometheus as ``ray_ingot_<quantity>``.

    ``ingot_recoveries`` counts how often the run went back to a checkpoint, after spikes and after restarts. Ray's
    dashboard draws what Prometheus has; the node of the first worker offers it. cluster/grafana has a dashboard.

    Ray forgets a gauge that was not set for two of its intervals, 20 s, so all are set anew at each flush: a validation
    loss is to stay until the next.
    """

    def __init__(self, run: str, folder: StoredRun) -> None:
        self.run, self.folder = run, folder
        self.recoveries: int | None = None
        self.values: dict[str, float] = {}
        self.gauges: dict[str, Any] = {}

    def write(self, row: dict[str, Any]) -> None:
        """Take a row."""
        if self.recoveries is None:  # those that workers before this one have seen
            before = [old for old in self.folder.metrics() if old["time"] < row["time"]]
            self.recoveries = sum("undone_after" in old for old in before)
        self.recoveries += "undone_after" in row
        found = {"step": float(row["step"]), "recoveries": float(self.recoveries), **quantities(row)}
        if "data_step" in row:
            found.setdefault("skipped", 0.0)
        self.values |= found
        self._set(found)

    def _set(self, values: dict[str, float]) -> None:
        from ray.util.metrics import Gauge

        for name, value in values.items():
            if name not in self.gauges:
                told = f"{name.replace('_', ' ')} of a pretraining run"
                self.gauges[name] = Gauge(f"ingot_{name}", description=told, tag_keys=("run",))
            self.gauges[name].set(value, tags={"run": self.run})

    def flush(self) -> None:
        """Keep what there is."""
        self._set(self.values)

    def close(self) -> None:
        """Gauges end with their process."""


class WeightsAndBiases:
    """A run of the project ``ingot``, or of what ``WANDB_PROJECT`` says; ``WANDB_MODE=offline`` keeps it on disk."""

    def __init__(self, name: str, folder: StoredRun) -> None:
        self.name, self.folder = name, folder
        self.run: Any = None

    def write(self, row: dict[str, Any]) -> None:
        """Take a row."""
        if self.run is None:
            self.run = self._open()
        if found := quantities(row):
            self.run.log({"step": row["step"], **found})

    def _open(self) -> Any:
        import wandb

        known = _known(self.folder, "wandb")
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ingot"),
            name=self.name,
            id=known,
            resume="allow",
            config=_config(self.folder),
            dir=storage.local_path(self.folder.folder),  # None: where it likes
        )
        if known is None:
            _remember(self.folder, "wandb", run.id)
        # Its own count of steps only goes up, and a run that goes back does not.
        run.define_metric("*", step_metric="step")
        return run

    def flush(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        """Send what is left."""
        if self.run is not None:
            self.run.finish()


class MLflow:
    """A run of the experiment ``ingot``, or of what ``MLFLOW_EXPERIMENT_NAME`` says, at ``MLFLOW_TRACKING_URI``."""

    BATCH = 1000  # metrics that one request may hold

    def __init__(self, name: str, folder: StoredRun) -> None:
        self.name, self.folder = name, folder
        self.client: Any = None
        self.id = ""
        self.rows: list[dict[str, Any]] = []

    def write(self, row: dict[str, Any]) -> None:
        """Take a row; it is sent with others."""
        self.rows.append(row)
        if self.client is None:
            self._open()

    def _open(self) -> None:
        from mlflow.tracking import MlflowClient

        client = MlflowClient()
        known = _known(self.folder, "mlflow")
        if known is None:
            title = os.environ.get("MLFLOW_EXPERIMENT_NAME", "ingot")
            experiment = client.get_experiment_by_name(title)
            number = experiment.experiment_id if experiment else client.create_experiment(title)
            known = client.create_run(number, run_name=self.name).info.run_id
            _remember(self.folder, "mlflow", known)
            for key, value in _flat(_config(self.folder)).items():
                client.log_param(known, key, value)
        client.set_terminated(known, status="RUNNING")  # also one that had ended
        self.client, self.id = client, known

    def flush(self) -> None:
        """Send what is there."""
        if self.client is None:
            return
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, int(row["time"] * 1000), row["step"])
            for row in self.rows
            for name, value in quantities(row).items()
        ]
        for first in range(0, len(metrics), self.BATCH):
            self.client.log_batch(self.id, metrics=metrics[first : first + self.BATCH])
        self.rows.clear()

    def close(self) -> None:
        """Send what is left and end the run."""
        self.flush()
        if self.client is not None:
            self.client.set_terminated(self.id)


def _config(folder: StoredRun) -> dict[str, Any]:
    """The run's settings and shape."""
    facts = folder.read_json("run.json") or {}
    return {name: facts[name] for name in ("settings", "model", "n_params", "version") if name in facts}


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}{key}.") if isinstance(inner, Mapping) else {f"{prefix}{key}": inner}
    return flat


def _known(folder: StoredRun, tracker: str) -> str | None:
    return (folder.read_json(TRACK) or {}).get(tracker)


def _remember(folder: StoredRun, tracker: str, number: str) -> None:
    folder.write_json(TRACK, {**(folder.read_json(TRACK) or {}), tracker: number})
