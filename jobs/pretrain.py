"""``ingot pretrain``: the training loop of ``models.training`` in Ray Train workers, on a workspace's token shards."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from jobs.lease import lease
from jobs.progress import Progress
from jobs.run_folder import StoredRun
from jobs.session import ray_session
from jobs.settings import PretrainJob, SettingsError
from models.config import ModelConfig
from models.training.loop import LoopConfig, TrainingStoppedError
from pipelines import storage
from pipelines.batches import Batches, prefetch
from pipelines.shards import TokenShards
from pipelines.stage import ingot_version, require_manifest

log = logging.getLogger("ingot")

# What may change between two starts of a run without changing what it computes.
_FREE = {
    "workspace", "name", "on_change", "workers", "device", "cpus_per_worker", "microbatch", "compile",
    "checkpoint_every", "keep_checkpoints", "clean_after", "validate_every", "max_failures", "faults", "spikes",
}  # fmt: skip


def run(settings: PretrainJob) -> dict[str, float]:
    """Train to the last step, going on where the run was; returns its final losses.

    Raises:
        SettingsError: the run of this name was started with other settings.
        FileNotFoundError: the token shards are not there.
        TrainingStoppedError: it went back too often.
    """
    opened, folder, changed = _open(settings)  # refused or done: in either case Ray need not start
    if not changed and (done := _already_done(opened, folder)):
        return done
    with ray_session(math.ceil(settings.workers * settings.cpus_per_worker)) as only_this_machine:
        if only_this_machine:
            require_gpus(settings)
        return pretrain(settings)


def require_gpus(settings: PretrainJob) -> None:
    """Refuse to wait for GPUs on a machine that has too few.

    Raises:
        SettingsError: with what is there.
    """
    import ray

    there = int(ray.cluster_resources().get("GPU", 0))
    if settings.device == "gpu" and there < settings.workers:
        raise SettingsError(
            f"device is gpu with {settings.workers} workers, and this machine has {there} GPUs; take fewer "
            "--workers or --device cpu, or submit the job to a cluster"
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
    manifest, config = check_fits(settings)
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
            "tokenizer": manifest["tokenizer"],
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
    # Ray's own account of a run cannot be read any more when a kill tears it, and the ledger says more: start without.
    folder.delete("ray")
    watcher = Progress(folder, settings)
    if watch:
        watcher.start()
    try:
        result = _trainer(settings, folder, attempt, on_gpu, callbacks).fit()
    finally:
        watcher.stop()
    if result.error is not None:
        raise result.error
    if done := finished(folder, settings.steps):
        return done
    stops = [event["diagnosis"] for event in _since_start(folder, attempt) if event["event"] == "stop"]
    raise TrainingStoppedError(stops[-1] if stops else f"{folder.folder}: interrupted before step {settings.steps}")


def finished(folder: StoredRun, steps: int) -> dict[str, float] | None:
    """The final losses of a run that has reached its last step, else None."""
    ends = [event for event in folder.events() if event["event"] == "end" and event["step"] >= steps]
    return {k: v for k, v in ends[-1].items() if k not in ("event", "time")} if ends else None


def _open(settings: PretrainJob, folder_name: str | None = None) -> tuple[PretrainJob, StoredRun, list[str]]:
    """The settings with their workspace for every process, the run's folder, and why what it holds has to go.

    Raises:
        SettingsError: the settings do not fit the tokens, or not the run, which is not to be started anew.
        FileNotFoundError: the token shards are not there.
    """
    # Ray Train's workers have working directories of their own, so a relative path must not reach them.
    settings = dataclasses.replace(settings, workspace=storage.absolute(settings.workspace))
    manifest, _ = check_fits(settings)
    folder = StoredRun(storage.join(settings.workspace, folder_name or f"runs/{settings.name}"))
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


def check_fits(settings: PretrainJob) -> tuple[dict[str, Any], ModelConfig]:
    """Manifest of the workspace's training tokens, and the model's shape for them.

    Raises:
        SettingsError: the vocabulary is too small, a sequence longer than a split, or the tokenizer another one.
        FileNotFoundError: the token shards or the tokenizer are not there.
    """
    manifests = {}
    for split in ("train", "validation"):
        tokens = storage.join(settings.workspace, "tokens", split)
        manifests[split] = require_manifest(tokens, "tokenize")
        try:
            Batches(TokenShards(tokens), settings.length(), settings.global_batch, settings.seed)
        except ValueError as error:
            raise SettingsError(f"sequence_length is {settings.length()}; {error}") from None
    train = manifests["train"]
    tokenizer = storage.join(settings.workspace, "tokenizer")
    if require_manifest(tokenizer, "tokenizer")["fingerprint"] != train["tokenizer"]:
        raise SettingsError(
            f"{settings.workspace}/tokens/train: made with another tokenizer than the one in {tokenizer} now; "
            "run `ingot tokenize` again"
        )
    return train, settings.model.config(train["vocab_size"], settings.length())


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
    from pipelines.tokenizer import Tokenizer

    settings: PretrainJob = given["settings"]
    folder = StoredRun(given["folder"])
    workspace = settings.workspace
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    manifest, config = check_fits(settings)
    length, vocab_size = settings.length(), manifest["vocab_size"]

    def reader(split: str) -> Batches:
        shards = TokenShards(storage.join(workspace, "tokens", split))
        return Batches(shards, length, settings.global_batch, settings.seed)

    validation = reader("validation")
    share = settings.global_batch // world
    microbatch = min(settings.microbatch or share, share)

    model = parallelize(Transformer(config, settings.seed), world, device)
    if settings.compile:
        compile_model(model)
    lengths = Tokenizer.load(storage.join(workspace, "tokenizer")).byte_lengths()
    byte_lengths = torch.zeros(config.vocab_size, dtype=torch.int64)
    byte_lengths[: len(lengths)] = torch.from_numpy(lengths)

    def rank_batches(data_step: int, skip: Callable[[int], int]) -> Iterator[torch.Tensor]:
        batches = reader("train")  # its own: the thread of a stream that was just closed may still be reading

        def ahead() -> Iterator[torch.Tensor]:
            at = data_step
            while True:
                at = skip(at)
                tokens = torch.from_numpy(batches.rank(at, rank, world))
                tokens = _poisoned(tokens, at, rank, settings.faults.poison_data_steps, vocab_size)
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
        documents=lambda data_steps: reader("train").documents(data_steps, most=50),
        resume_cause=_resume_cause(folder, given["attempt"]),
    )
    try:
        training.train()
    except TrainingStoppedError as error:
        # The driver finds the diagnosis in the events. An error here would only make Ray start the workers again.
        log.warning("pretrain: %s", error)


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
    restarted = any(event["event"] in ("resume", "checkpoint") for event in _since_start(folder, attempt))
    return "worker_restart" if restarted else "driver_restart"


def _since_start(folder: StoredRun, attempt: int) -> list[dict[str, Any]]:
    """The run's events from the start of this attempt on."""
    events = folder.events()
    starts = [i for i, event in enumerate(events) if event["event"] == "start" and event["attempt"] == attempt]
    return events[starts[-1] :] if starts else []


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
