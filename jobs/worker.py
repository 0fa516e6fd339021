"""What every Ray Train worker of a run does: build the model, hand the loop what it needs, train."""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jobs import init_from, inputs, logs
from jobs.interruptions import Interruptions
from jobs.patience import PatientRun
from jobs.run_folder import StoredRun
from jobs.settings import PretrainJob
from jobs.sinks import sinks_of
from models.training.metrics import MetricsWriter
from models.training.run_folder import patiently
from models.training.state import TrainingStoppedError

if TYPE_CHECKING:
    import torch

    from models.training.loop import Training

log = logging.getLogger("ingot")


def train(given: dict[str, Any]) -> None:
    """Ray Train's function for each worker.

    Args:
        given: ``settings`` of the run, its ``folder``, and the number of this ``attempt`` at it.
    """
    import ray.train
    import torch
    from ray.train.torch import get_device

    settings: PretrainJob = given["settings"]
    folder = PatientRun(given["folder"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    logs.mark(run=settings.name, rank=rank)
    if rank == 0:
        folder.take_over()
    device = get_device()
    if rank == 0:
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        patiently(folder.write_json, "hardware.json", {"device": kind, "workers": world})
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if settings.gpus_per_worker < 1:  # the others on this GPU have theirs
            torch.cuda.set_per_process_memory_fraction(settings.gpus_per_worker, device)
    interruptions = Interruptions(rank, world)

    def before_step(step: int) -> None:
        interruptions.step = step
        if rank == world - 1 and settings.faults.slow_worker_seconds:
            time.sleep(settings.faults.slow_worker_seconds)
        _kill_once(folder, settings.faults.kill_worker_at_step, step, rank, world)

    metrics = MetricsWriter(folder, sinks_of(settings, folder)) if rank == 0 else None
    training = build(
        settings,
        folder,
        device,
        report=functools.partial(_report, settings, folder.folder, interruptions),
        metrics=metrics,
        before_step=before_step,
        interrupt=interruptions,
        resume_cause=resume_cause(folder, given["attempt"]),
    )
    try:
        training.train()
    except TrainingStoppedError as error:
        # The driver finds the diagnosis in the events. An error here would only make Ray start the workers again.
        log.warning("pretrain: %s", error)
    except Exception:
        interruptions.wait_for_the_end()
        raise
    finally:
        interruptions.over()
        if metrics is not None:
            metrics.close()


def build(
    settings: PretrainJob,
    folder: StoredRun,
    device: torch.device,
    *,
    report: Callable[[dict[str, Any], dict[str, Any] | None], None],
    metrics: MetricsWriter | None,
    **hooks: Any,
) -> Training:
    """The run that the settings describe, in this process of the default process group, or alone.

    Args:
        settings: of the run.
        folder: of the run.
        device: of this process.
        report: told of checkpoints, as `Training` does it.
        metrics: rank 0's.
        hooks: further arguments of `Training`.
    """
    import torch

    from models.attention import document_index
    from models.mesh import data_rank_and_world, make_mesh
    from models.optimizer import build_optimizer
    from models.parallel import compile_model, parallelize
    from models.training.loop import LoopConfig, Training
    from models.transformer import Transformer

    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    manifest, config = patiently(inputs.of_run, settings, folder)
    mesh = make_mesh(settings.parallelism, device.type)
    rank, world = data_rank_and_world(mesh)
    with torch.device("meta"):  # no worker ever holds more than its part
        model = Transformer(config, seed=None)
    model = parallelize(model, mesh, device, precision=settings.precision, recompute=settings.recompute)
    model.init_weights(settings.seed)
    model.z_loss = settings.z_loss
    if settings.compile:
        compile_model(model)
    optimizer = build_optimizer(model, settings.optimizer)
    training = Training(
        model,
        optimizer,
        LoopConfig(
            steps=settings.steps,
            global_batch=settings.data_batch(),
            sequence_length=settings.length(),
            microbatch=inputs.microbatch(settings, world),
            checkpoint_every=settings.checkpoint_every,
            keep_checkpoints=settings.keep_checkpoints,
            keep_every=settings.keep_every,
            keep_best=settings.keep_best,
            host_snapshots=settings.host_snapshots,
            clean_after=settings.clean_after,
            validate_every=settings.validate_every,
            optimizer=settings.optimizer,
            schedule=settings.schedule,
            spikes=settings.spikes,
            batch_ramp=settings.ramp(),
            interrupt_every=1,
            profile=settings.profile,
        ),
        batches=inputs.training_batches(settings, manifest["vocab_size"], rank, world, pin=device.type == "cuda"),
        validation=inputs.validation_batches(settings, rank, world) if settings.validation == "within" else None,
        byte_lengths=inputs.byte_lengths(settings, config.vocab_size),
        run=folder,
        report=report,
        device=device,
        flops_per_token=config.flops_per_token(settings.length()),
        metrics=metrics,
        documents=functools.partial(inputs.documents, settings),
        document_index=functools.partial(document_index, eos_id=inputs.end_of_text(settings))
        if settings.mask_documents
        else None,
        data_rank=(rank, world),
        first_weights=None if settings.init_from is None else lambda: init_from.read_weights(settings, model),
        **hooks,
    )
    poison, factor = settings.faults.poison_data_steps, settings.faults.poison_lr_factor
    if poison is not None and factor != 1:

        def heat(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if poison[0] <= training.state.data_step - 1 < poison[1]:
                for group in optimizer.param_groups:
                    group["lr"] *= factor

        optimizer.register_step_pre_hook(heat)
    return training


def _report(
    settings: PretrainJob,
    folder: str,
    interruptions: Interruptions,
    metrics: dict[str, Any],
    pointer: dict[str, Any] | None,
) -> None:
    """Report to Ray Train: metrics, and from rank 0 a pointer to the checkpoint, which lies in the run's folder."""
    import ray.train

    interruptions.saved(metrics["step"])
    if pointer is None or ray.train.get_context().get_world_rank() != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as local:
        with open(os.path.join(local, "pointer.json"), "w") as out:
            json.dump(pointer, out)
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(local),
            validation=validation_due(settings, metrics["step"]),
        )


def validation_due(settings: PretrainJob, step: int) -> bool:
    """Whether Ray Train is to measure the checkpoint of a step beside training."""
    return settings.losses_due(step) or settings.scores_due(step)


def resume_cause(folder: StoredRun, attempt: int) -> str:
    """Why workers that start find a run that is under way: from the last event of an interruption in this attempt."""
    causes = {
        "worker_failure": "worker_restart",
        "controller_failure": "controller_restart",
        "preemption": "preemption",
        "resize": "resize",
    }
    since = since_start(folder, attempt)
    told = [causes[event["event"]] for event in since if event["event"] in causes]
    restarted = any(event["event"] in ("resume", "checkpoint") for event in since)
    return told[-1] if told else "worker_restart" if restarted else "driver_restart"


def since_start(folder: StoredRun, attempt: int) -> list[dict[str, Any]]:
    """The run's events from the start of this attempt on."""
    events = patiently(folder.events)
    starts = [i for i, event in enumerate(events) if event["event"] == "start" and event["attempt"] == attempt]
    return events[starts[-1] :] if starts else []


def _kill_once(folder: StoredRun, at: int | None, step: int, rank: int, world: int) -> None:
    """The rehearsed loss of a worker: the last rank kills itself before step ``at``; a marker keeps it at one time."""
    if at is None or step != at or rank != world - 1 or folder.read_json("killed.json") is not None:
        return
    folder.write_json("killed.json", {"step": step, "time": time.time()})
    os.kill(os.getpid(), signal.SIGKILL)
