"""Validation beside training: Ray Train measures reported checkpoints in a task of its own while the workers go on.

That are losses, with ``validation`` set to beside, and scores on tasks of lm_eval, where ``evaluate`` has some.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from typing import Any

import torch

from jobs import inputs
from jobs.patience import PatientRun
from jobs.run_folder import StoredRun
from jobs.settings import EvaluateJob, PretrainJob, Scoring
from jobs.trained import find
from models.attention import document_index
from models.loss import IGNORE, inputs_and_targets
from models.parallel import parallelize
from models.training.checkpoints import load_weights
from models.training.ledger import LEDGER
from models.training.run_folder import patiently
from models.transformer import Transformer

METRICS = "metrics/0-validation.jsonl"  # the first by name: the last one is where the workers write now


def config(settings: PretrainJob, folder: StoredRun) -> Any:
    """Ray Train's ``ValidationConfig`` of a run, None when nothing is measured beside training."""
    from ray.train.v2.api.validation_config import ValidationConfig

    if not settings.measures_beside():
        return None
    return ValidationConfig(
        fn=functools.partial(validate, settings=settings, folder=folder.folder),
        ray_remote_kwargs={"num_cpus": 1, "num_gpus": settings.validation_gpus},
    )


def validate(checkpoint: Any, settings: PretrainJob, folder: str) -> dict[str, float]:
    """Measure the checkpoint that a pointer names; what comes out goes into the run's files and to Ray Train.

    Raises:
        ValueError: it cannot be read, for one because it was given up meanwhile; the run's events tell it too.
    """
    run = PatientRun(folder)
    with checkpoint.as_directory() as local, open(f"{local}/pointer.json") as file:
        pointer = json.load(file)
    entry = next(e for e in run.read_json(LEDGER)["checkpoints"] if e["folder"] == pointer["folder"])
    losses: dict[str, float] = {}
    began = time.time()
    try:
        if settings.losses_due(entry["step"]):
            losses = measure(settings, run, entry["folder"])
            # As old as the checkpoint: when the run has gone back behind it since, this row is undone like its
            # neighbours.
            took = {"validation_seconds": time.time() - began, "time": entry["time"]}
            patiently(run.append_line, METRICS, json.dumps({"step": entry["step"], **losses, **took}))
        scores = score(settings, entry["step"], entry["folder"]) if settings.scores_due(entry["step"]) else {}
    except Exception as error:
        # No reason to stop the run, but nothing that may stay unsaid either.
        _tell(run, "validation_failed", entry["step"], error=str(error)[:300])
        raise
    if scores:
        told = {_named(row): row["value"] for row in scores["scores"] if row["group"] is None}
        _tell(run, "scores", entry["step"], scores=told)
    for task, reason in scores.get("failed", {}).items():
        _tell(run, "validation_failed", entry["step"], error=f"task {task}: {reason}")
    return losses


def _named(row: dict[str, Any]) -> str:
    name = f"{row['task']} {row['metric']}"
    return name if row["filter"] == "none" else f"{name} {row['filter']}"  # gsm8k has one metric by two filters


def _tell(run: StoredRun, event: str, step: int, **facts: Any) -> None:
    patiently(run.append_line, "events.jsonl", json.dumps({"time": time.time(), "event": event, "step": step, **facts}))


def score(settings: PretrainJob, step: int, checkpoint: str) -> dict[str, Any]:
    """Scores of a checkpoint on the tasks of the settings, kept where ``ingot evaluate`` keeps them.

    Raises:
        ValueError: the checkpoint is not there any more.
    """
    from jobs import evaluate  # brings lm_eval, which takes seconds
    from jobs.eval_harness import Harness
    from jobs.eval_workers import Model

    scoring = {field.name: getattr(settings.evaluate, field.name) for field in dataclasses.fields(Scoring)}
    job = EvaluateJob(
        workspace=settings.workspace, name=settings.name, step=step, validation_samples=0, **scoring
    )  # fmt: skip
    harness = Harness(job)
    if find(job)[2].folder != checkpoint:
        raise ValueError(f"{checkpoint}: was given up, another checkpoint of its step is there")
    model = Model(job, "cuda" if torch.cuda.is_available() else "cpu")
    results = evaluate.scored(job, model, harness)
    results.pop("table")
    return evaluate.keep(results | {"made_of": None})


@torch.no_grad()
def measure(settings: PretrainJob, run: StoredRun, checkpoint: str) -> dict[str, float]:
    """Validation loss of a checkpoint in nats a token and in bits a byte, on a GPU where this process has one.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it was changed since it was written.
    """
    _, config = inputs.of_run(settings, run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Transformer(config, seed=None)
    load_weights(run, checkpoint, model)
    model = parallelize(model, None, device, precision=settings.precision if device.type == "cuda" else "auto").eval()
    eos_id = inputs.end_of_text(settings) if settings.mask_documents else None
    sizes = inputs.byte_lengths(settings, config.vocab_size).to(device)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    rows = inputs.microbatch(settings, settings.workers)  # as many as fit the workers
    for samples, weights in inputs.validation_batches(settings, 0, 1, rows)():
        tokens, targets = inputs_and_targets(samples.to(device))
        documents = None if eos_id is None else document_index(tokens, eos_id)
        losses = model(tokens, targets, reduction="none", documents=documents).view(targets.shape)
        counted = (targets != IGNORE) * weights.to(device)[:, None]
        sums[0] += (losses.double() * counted).sum()
        sums[1] += counted.sum()
        sums[2] += (sizes[targets.clamp(min=0)] * counted).sum()
    nats, tokens, size = sums.tolist()
    return {"validation_loss": nats / tokens, "validation_bits_per_byte": nats / math.log(2) / size}
