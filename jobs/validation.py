"""Validation beside training: Ray Train measures reported checkpoints in a task of its own while the workers go on."""

from __future__ import annotations

import functools
import json
import math
import time
from typing import Any

import torch

from jobs import inputs
from jobs.patience import PatientRun
from jobs.run_folder import StoredRun
from jobs.settings import PretrainJob
from models.attention import document_index
from models.loss import IGNORE, inputs_and_targets
from models.parallel import parallelize
from models.training.checkpoints import load_weights
from models.training.ledger import LEDGER
from models.training.run_folder import patiently
from models.transformer import Transformer

METRICS = "metrics/0-validation.jsonl"  # the first by name: the last one is where the workers write now


def config(settings: PretrainJob, folder: StoredRun) -> Any:
    """Ray Train's ``ValidationConfig`` of a run."""
    from ray.train.v2.api.validation_config import ValidationConfig

    return ValidationConfig(
        fn=functools.partial(validate, settings=settings, folder=folder.folder),
        ray_remote_kwargs={"num_cpus": 1, "num_gpus": settings.validation_gpus},
    )


def validate(checkpoint: Any, settings: PretrainJob, folder: str) -> dict[str, float]:
    """Measure the checkpoint that a pointer names; the losses go into the run's metrics and to Ray Train.

    Raises:
        ValueError: it cannot be read, for one because it was given up meanwhile; the run's events tell it too.
    """
    run = PatientRun(folder)
    with checkpoint.as_directory() as local, open(f"{local}/pointer.json") as file:
        pointer = json.load(file)
    entry = next(e for e in run.read_json(LEDGER)["checkpoints"] if e["folder"] == pointer["folder"])
    began = time.time()
    try:
        losses = measure(settings, run, entry["folder"])
    except Exception as error:
        # No reason to stop the run, but nothing that may stay unsaid either.
        fact = {"time": time.time(), "event": "validation_failed", "step": entry["step"], "error": str(error)[:300]}
        patiently(run.append_line, "events.jsonl", json.dumps(fact))
        raise
    # As old as the checkpoint: when the run has gone back behind it since, this row is undone like its neighbours.
    row = {"step": entry["step"], **losses, "validation_seconds": time.time() - began, "time": entry["time"]}
    patiently(run.append_line, METRICS, json.dumps(row))
    return losses


@torch.no_grad()
def measure(settings: PretrainJob, run: StoredRun, checkpoint: str) -> dict[str, float]:
    """Validation loss of a checkpoint in nats a token and in bits a byte, on a GPU where this process has one.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it was changed since it was written.
    """
    _, config = inputs.check_fits(settings)
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
