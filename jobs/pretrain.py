"""``ingot pretrain``: the training loop of ``models.training`` in Ray Train workers, on a workspace's token shards."""

from __future__ import annotations

import json
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from jobs.run_folder import StoredRun, valid_steps
from jobs.session import ray_session
from jobs.settings import PretrainJob, SettingsError
from models.training.loop import LoopConfig
from pipelines import storage
from pipelines.stage import ingot_version, require_manifest

log = logging.getLogger("ingot")

# What may change between two starts of a run without changing what it computes.
_FREE = {
    "workspace", "name", "on_change", "workers", "device", "cpus_per_worker", "microbatch", "compile",
    "checkpoint_every", "keep_checkpoints", "validate_every", "max_failures", "faults", "spikes",
}  # fmt: skip


def run(settings: PretrainJob) -> dict[str, float]:
    """Train to the last step, going on where the run was; returns its final losses.

    Raises:
        SettingsError: the run of this name was started with other settings.
        FileNotFoundError: the token shards are not there.
    """
    with ray_session(settings.workers):
        return pretrain(settings)


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
    workspace = storage.absolute(settings.workspace)
    manifest = require_manifest(storage.join(workspace, "tokens/train"), "tokenize")
    require_manifest(storage.join(workspace, "tokens/validation"), "tokenize")
    config = settings.model.config(manifest["vocab_size"], settings.length())
    folder = StoredRun(storage.join(workspace, folder_name or f"runs/{settings.name}"))
    _check_unchanged(folder, settings, manifest["fingerprint"])
    if done := finished(folder, settings.steps):
        log.info("pretrain: run %s is at step %d already, nothing to do", settings.name, settings.steps)
        return done
    import ray

    on_gpu = settings.device == "gpu" or (
        settings.device == "auto" and ray.cluster_resources().get("GPU", 0) >= settings.workers
    )
    folder.write_json(
        "run.json",
        {
            "name": settings.name,
            "model": asdict(config),
            "settings": asdict(settings),
            "n_params": config.n_params(),
            "tokens_manifest": manifest["fingerprint"],
            "device": "gpu" if on_gpu else "cpu",
            "world_size": settings.workers,
            "started": time.time(),
            "version": ingot_version(),
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
    watcher = _Watcher(folder, settings)
    if watch:
        watcher.start()
    try:
        result = _trainer(settings, folder, attempt, on_gpu, callbacks or []).fit()
    finally:
        watcher.stop()
    if result.error is not None:
        raise result.error
    return finished(folder, settings.steps)


def finished(folder: StoredRun, steps: int) -> dict[str, float] | None:
    """The final losses of a run that has reached its last step, else None."""
    ends = [event for event in folder.events() if event["event"] == "end" and event["step"] >= steps]
    return {k: v for k, v in ends[-1].items() if k not in ("event", "time")} if ends else None


def _check_unchanged(folder: StoredRun, settings: PretrainJob, tokens: str) -> None:
    """Refuse to go on with a run that was started with other settings, or delete it when that is asked for."""
    before = folder.read_json("run.json")
    if before is None:
        return
    now = json.loads(json.dumps(asdict(settings)))
    changed = [
        f"{key} was {before['settings'].get(key)!r} and is {value!r}"
        for key, value in now.items()
        if key not in _FREE and before["settings"].get(key) != value
    ]
    if before["tokens_manifest"] != tokens:
        changed.append("the token shards were made anew")
    if not changed:
        return
    if settings.on_change == "restart":
        log.info("pretrain: run %s starts anew, because %s", settings.name, "; ".join(changed))
        storage.delete(folder.folder)
        return
    raise SettingsError(
        f"the run {settings.name} in {folder.folder} was started with other settings: {'; '.join(changed)}. "
        "Choose another --name, or --on_change restart to delete it"
    )


def _trainer(settings: PretrainJob, folder: StoredRun, attempt: int, on_gpu: bool, callbacks: list[Any]) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    return TorchTrainer(
        _worker,
        train_loop_config={"settings": settings, "folder": folder.folder, "attempt": attempt},
        # Both backends on GPUs: object collectives and checkpoints' planning go over gloo.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=settings.workers, use_gpu=on_gpu, resources_per_worker=_worker_resources(settings, on_gpu)
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=folder.folder,
            failure_config=FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            callbacks=[_failure_events(folder), *callbacks],
        ),
    )


def _worker_resources(settings: PretrainJob, on_gpu: bool) -> dict[str, float]:
    return {"CPU": settings.cpus_per_worker, **({"GPU": 1} if on_gpu else {})}


def _failure_events(folder: StoredRun) -> Any:
    """A Ray Train callback, run by the controller, that puts lost workers into the run's events."""
    from ray.train import UserCallback

    class FailureEvents(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            errors = {
                f"{type(e).__name__}: {str(e).splitlines()[0][:300]}" for e in worker_exceptions.values() if str(e)
            }
            _event(folder, "worker_failure", ranks=sorted(worker_exceptions), error="; ".join(sorted(errors)))

    return FailureEvents()


def _event(folder: StoredRun, event: str, **facts: Any) -> None:
    folder.append_line("events.jsonl", json.dumps({"time": time.time(), "event": event, **facts}))


def _worker(given: dict[str, Any]) -> None:
    """What every Ray Train worker runs: build the model, hand the loop what it needs, train."""
    import ray.train
    import torch
    from ray.train.torch import get_device

    from models.optimizer import build_optimizer
    from models.parallel import compile_model, parallelize
    from models.training.loop import Training
    from models.transformer import Transformer
    from pipelines.batches import Batches, prefetch
    from pipelines.shards import TokenShards
    from pipelines.tokenizer import Tokenizer

    settings: PretrainJob = given["settings"]
    folder = StoredRun(given["folder"])
    workspace = storage.absolute(settings.workspace)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    train = TokenShards(storage.join(workspace, "tokens/train"))
    held_out = TokenShards(storage.join(workspace, "tokens/validation"))
    length = settings.length()
    batches = Batches(train, length, settings.global_batch, settings.seed)
    validation = Batches(held_out, length, settings.global_batch, settings.seed)
    share = settings.global_batch // world
    microbatch = min(settings.microbatch or share, share)
    config = settings.model.config(train.manifest["vocab_size"], length)

    model = parallelize(Transformer(config, settings.seed), world, device)
    if settings.compile:
        compile_model(model)
    lengths = Tokenizer.load(storage.join(workspace, "tokenizer")).byte_lengths()
    byte_lengths = torch.zeros(config.vocab_size, dtype=torch.int64)
    byte_lengths[: len(lengths)] = torch.from_numpy(lengths)

    def rank_batches(data_step: int, skip: Callable[[int], int]) -> Iterator[torch.Tensor]:
        def ahead() -> Iterator[torch.Tensor]:
            at = data_step
            while True:
                at = skip(at)
                tokens = torch.from_numpy(batches.rank(at, rank, world))
                tokens = _poisoned(tokens, at, rank, settings.faults.poison_data_steps, train.manifest["vocab_size"])
                yield tokens.pin_memory() if device.type == "cuda" else tokens
                at += 1

        return prefetch(ahead())

    def validation_batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for samples, weights in validation.in_order(settings.validation_samples, rank, world, microbatch):
            yield torch.from_numpy(samples), torch.from_numpy(weights)

    training = Training(
        model,
        build_optimizer(model, settings.optimizer),
        LoopConfig(
            steps=settings.steps,
            global_batch=settings.global_batch,
            sequence_length=length,
            microbatch=microbatch,
            checkpoint_every=settings.checkpoint_every,
            keep_checkpoints=settings.keep_checkpoints,
            clean_after=settings.clean_after,
            validate_every=settings.validate_every,
            optimizer=settings.optimizer,
            schedule=settings.schedule,
            spikes=settings.spikes,
        ),
        batches=rank_batches,
        validation=validation_batches,
        byte_lengths=byte_lengths,
        run=folder,
        report=_report,
        device=device,
        flops_per_token=config.flops_per_token(length),
        tensorboard=folder.uri("tensorboard") if storage.local_path(folder.folder) else None,
        before_step=lambda step: _kill_once(folder, settings.faults.kill_worker_at_step, step, rank, world),
        resume_cause=_resume_cause(folder, given["attempt"]),
    )
    training.train()


def _report(metrics: dict[str, Any], pointer: dict[str, Any] | None) -> None:
    """Report to Ray Train: metrics, and from rank 0 a pointer to the checkpoint, which lies in the run's folder."""
    import ray.train

    if pointer is None or ray.train.get_context().get_world_rank() != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "pointer.json"), "w") as out:
            json.dump(pointer, out)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _resume_cause(folder: StoredRun, attempt: int) -> str:
    """Whether workers that start find a run that another command left, or one whose group of workers was lost."""
    events = folder.events()
    starts = [i for i, event in enumerate(events) if event["event"] == "start" and event["attempt"] == attempt]
    restarted = any(event["event"] in ("resume", "checkpoint") for event in events[starts[-1] :]) if starts else False
    return "worker_restart" if restarted else "driver_restart"


def _poisoned(tokens: Any, data_step: int, rank: int, poison: tuple[int, int] | None, vocab_size: int) -> Any:
    import torch

    if poison is None or not poison[0] <= data_step < poison[1]:
        return tokens
    generator = torch.Generator().manual_seed(data_step * 1009 + rank)
    return torch.randint(0, vocab_size, tokens.shape, generator=generator)


def _kill_once(folder: StoredRun, at: int | None, step: int, rank: int, world: int) -> None:
    """The rehearsed loss of a worker: the last rank kills itself before step ``at``; a marker keeps it at one time."""
    if at is None or step != at or rank != world - 1 or folder.read_json("killed.json") is not None:
        return
    folder.write_json("killed.json", {"step": step, "time": time.time()})
    os.kill(os.getpid(), signal.SIGKILL)


class _Watcher(threading.Thread):
    """Tells the run's progress in the driver, from the files the workers write: a line every few seconds."""

    def __init__(self, folder: StoredRun, settings: PretrainJob, every: float = 5.0) -> None:
        super().__init__(daemon=True, name="progress")
        self.folder, self.settings, self.every = folder, settings, every
        self.stopped = threading.Event()
        self.events_seen = len(folder.events())
        self.last_step = -1

    def stop(self) -> None:
        """Tell what is left to tell and end."""
        self.stopped.set()
        if self.is_alive():
            self.join(timeout=30)

    def run(self) -> None:
        while not self.stopped.wait(self.every):
            self._tell()
        self._tell()

    def _tell(self) -> None:
        try:
            events = self.folder.events()
            rows = self.folder.metrics()
        except (OSError, ValueError):  # storage is slow or away: the next turn tells it
            return
        for event in events[self.events_seen :]:
            if event["event"] not in ("start", "checkpoint"):
                facts = {k: v for k, v in event.items() if k not in ("time", "event")}
                log.info("pretrain: %s %s", event["event"], json.dumps(facts))
        self.events_seen = len(events)
        steps = valid_steps(rows)
        if not steps or rows[-1]["step"] == self.last_step:
            return
        row = steps[max(steps)] if rows[-1].get("loss") is None else rows[-1]
        self.last_step = rows[-1]["step"]
        speed = row["tokens_per_second"]
        left = (self.settings.steps - row["step"]) * self.settings.global_batch * self.settings.length() / speed
        mfu = f", MFU {row['mfu']:.1%}" if row["mfu"] else ""
        losses = valid_steps(rows, "validation_loss")
        held_out = f", validation {losses[max(losses)]['validation_loss']:.3f}" if losses else ""
        log.info(
            "pretrain: step %d/%d, loss %.3f%s, lr %.2e, gradient norm %.2f, %s tokens/s%s, %s left",
            row["step"],
            self.settings.steps,
            row["loss"] if row["loss"] is not None else float("nan"),
            held_out,
            row["lr"],
            row["grad_norm"] if row["grad_norm"] is not None else float("nan"),
            f"{speed:,.0f}",
            mfu,
            time.strftime("%H:%M:%S", time.gmtime(left)),
        )
