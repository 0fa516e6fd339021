"""``ingot pretrain``: the training loop of ``models.training`` in Ray Train workers, on a workspace's token shards."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from dataclasses import asdict
from typing import Any

from jobs import init_from, trainer
from jobs.inputs import of_run
from jobs.lease import lease
from jobs.model_folder import absolute
from jobs.progress import Progress
from jobs.provenance import data_facts
from jobs.run_folder import StoredRun, valid_steps
from jobs.session import ray_session
from jobs.settings import PretrainJob, SettingsError
from jobs.sinks import check_installed
from jobs.worker import since_start
from models.training.state import TrainingStoppedError
from pipelines import storage
from pipelines.stage import ingot_version

log = logging.getLogger("ingot")

# What may change between two starts of a run without changing what it computes.
_FREE = {
    "workspace", "name", "on_change", "workers", "min_workers", "resize_every_seconds", "start_timeout_seconds",
    "device", "cpus_per_worker", "gpus_per_worker", "microbatch", "compile", "checkpoint_every", "keep_checkpoints",
    "clean_after", "validate_every", "validation", "validation_gpus", "max_failures", "max_preemptions", "faults",
    "spikes", "keep_every", "keep_best", "host_snapshots", "profile", "parallelism", "recompute", "track",
    "report_every", "evaluate",
}  # fmt: skip


def run(settings: PretrainJob) -> dict[str, float]:
    """Train to the last step, going on where the run was; returns its final losses.

    Raises:
        SettingsError: the run of this name was started with other settings, or there is no such task to score it on.
        FileNotFoundError: the token shards are not there.
        TrainingStoppedError: it went back too often.
    """
    opened, folder, changed = _open(settings)  # refused or done: in either case Ray need not start
    if not changed and (done := _already_done(opened, folder)):
        return done
    if opened.evaluate.task_names():
        from jobs import eval_tasks  # brings lm_eval, which takes seconds

        eval_tasks.check(opened.evaluate)
    beside = 1 if settings.measures_beside() else 0
    with ray_session(math.ceil(settings.workers * settings.cpus_per_worker) + beside) as only_this_machine:
        if only_this_machine:
            require_gpus(settings)
        return pretrain(settings)


def require_gpus(settings: PretrainJob) -> None:
    """Refuse to wait for GPUs on a machine that has too few.

    Raises:
        SettingsError: with what is there.
    """
    import ray

    there, needed = int(ray.cluster_resources().get("GPU", 0)), settings.fewest_workers()
    if settings.device == "gpu" and there < needed:
        raise SettingsError(
            f"device is gpu with {needed} workers, and this machine has {there} GPUs; take fewer --workers or "
            "--device cpu, or submit the job to a cluster"
        )


def pretrain(
    settings: PretrainJob, *, folder_name: str | None = None, callbacks: list[Any] | None = None, watch: bool = True
) -> dict[str, float]:
    """``run`` inside a Ray session.

    Args:
        settings: of the run.
        folder_name: the run's folder in the workspace, when it is not ``runs/NAME``.
        callbacks: further Ray Train callbacks.
        watch: tell the progress in the log.
    """
    settings, folder, changed = _open(settings, folder_name)
    if not changed and (done := _already_done(settings, folder)):
        return done
    with lease(folder, settings.name):
        if changed:
            log.info("pretrain: run %s starts anew, because %s", settings.name, "; ".join(changed))
            storage.delete(folder.folder)
        return _train(settings, folder, callbacks or [], watch)


def _train(settings: PretrainJob, folder: StoredRun, callbacks: list[Any], watch: bool) -> dict[str, float]:
    manifest, config = of_run(settings, folder)
    import ray

    on_gpu = settings.device == "gpu" or (
        settings.device == "auto" and ray.cluster_resources().get("GPU", 0) >= settings.fewest_workers()
    )
    # As it was at the first start: the workspace's corpus goes on, and a model may be replaced.
    before = folder.read_json("run.json") or {}
    folder.write_json(
        "run.json",
        {
            "name": settings.name,
            "model": asdict(config),
            "settings": asdict(settings),
            "n_params": config.n_params(),
            "tokens_manifest": manifest["fingerprint"],
            "tokenizer": manifest["tokenizer"],
            "device": "gpu" if on_gpu else "cpu",
            "world_size": settings.workers,
            "started": time.time(),
            "version": ingot_version(),
            "data": before.get("data") or data_facts(settings.workspace),
            "init_from": before.get("init_from") or init_from.facts(settings),
        },
    )
    attempt = len([e for e in folder.events() if e["event"] == "start"]) + 1
    _event(folder, "start", attempt=attempt, world_size=settings.workers, version=ingot_version())
    log.info(
        "pretrain: run %s, %.1fM parameters, %d steps of %d tokens, %d %s worker%s",
        settings.name,
        config.n_params() / 1e6,
        settings.steps,
        settings.global_batch * settings.length(),
        settings.workers,
        "GPU" if on_gpu else "CPU",
        "s" if settings.workers > 1 else "",
    )
    watcher = Progress(folder, settings)
    if watch:
        watcher.start()
    try:
        trainer.fit(settings, folder, attempt, on_gpu, callbacks)
    finally:
        watcher.stop()
    if done := finished(folder, settings.steps):
        return done
    stops = [event["diagnosis"] for event in since_start(folder, attempt) if event["event"] == "stop"]
    raise TrainingStoppedError(stops[-1] if stops else f"{folder.folder}: interrupted before step {settings.steps}")


def finished(folder: StoredRun, steps: int) -> dict[str, float] | None:
    """The final losses of a run that has reached its last step, else None."""
    ends = [event for event in folder.events() if event["event"] == "end" and event["step"] >= steps]
    if not ends:
        return None
    final = {k: v for k, v in ends[-1].items() if k not in ("event", "time")}
    if "validation_loss" not in final:  # measured beside training, it may have come after the end
        row = valid_steps(folder.metrics(), "validation_loss").get(final["step"], {})
        final |= {k: row[k] for k in ("validation_loss", "validation_bits_per_byte") if k in row}
    return final


def _open(settings: PretrainJob, folder_name: str | None = None) -> tuple[PretrainJob, StoredRun, list[str]]:
    """The settings with their workspace for every process, the run's folder, and why what it holds has to go.

    Raises:
        SettingsError: the settings do not fit the tokens, or not the run, which is not to be started anew.
        FileNotFoundError: the token shards are not there.
    """
    # Ray Train's workers have working directories of their own, so a relative path must not reach them.
    settings = dataclasses.replace(settings, workspace=storage.absolute(settings.workspace))
    if settings.evaluate.data_dir is not None:
        scoring = dataclasses.replace(settings.evaluate, data_dir=storage.absolute(settings.evaluate.data_dir))
        settings = dataclasses.replace(settings, evaluate=scoring)
    if settings.init_from is not None:
        settings = dataclasses.replace(settings, init_from=absolute(settings.init_from))
    check_installed(settings.track)
    folder = StoredRun(storage.join(settings.workspace, folder_name or f"runs/{settings.name}"))
    manifest, _ = of_run(settings, folder)
    changed = _changes(folder, settings, manifest["fingerprint"])
    if changed and settings.on_change == "refuse":
        raise SettingsError(
            f"the run {settings.name} in {folder.folder} was started with other settings: {'; '.join(changed)}. "
            "Choose another --name, or --on_change restart to delete it"
        )
    return settings, folder, changed


def _already_done(settings: PretrainJob, folder: StoredRun) -> dict[str, float] | None:
    done = finished(folder, settings.steps)
    if done:
        log.info("pretrain: run %s is at step %d already, nothing to do", settings.name, settings.steps)
    return done


def _changes(folder: StoredRun, settings: PretrainJob, tokens: str) -> list[str]:
    """What would make a run that is there compute something else if it went on."""
    before = folder.read_json("run.json")
    if before is None:
        return []
    was, now = _dotted(before["settings"]), _dotted(json.loads(json.dumps(asdict(settings))))
    changed = [
        f"{name} was {was.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(was.keys() | now.keys())
        if name.split(".")[0] not in _FREE and was.get(name) != now.get(name)
    ]
    if before["tokens_manifest"] != tokens:
        changed.append("the token shards were made anew")
    return changed


def _dotted(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names, as the command line has them."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _event(folder: StoredRun, event: str, **facts: Any) -> None:
    folder.append_line("events.jsonl", json.dumps({"time": time.time(), "event": event, **facts}))
