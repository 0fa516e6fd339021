"""``ingot flow``: a recipe from its sources to a scored model, as one job, each step on the nodes that it asks for.

Every step knows what it has done already, so the same command goes on where the flow stopped, whatever stopped it. The
steps run one after the other in this process; what they need they ask of Ray, so that a cluster brings CPU nodes for
the corpus and GPU nodes for the training, and lets both go after their use.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from typing import Any

from jobs import curate, evaluate, pretrain, tokenize, tokenizer
from jobs.session import ray_session
from jobs.settings import CurateJob, FlowJob, TokenizeJob, TokenizerJob

log = logging.getLogger("ingot")

STEPS = {
    "curate": curate.run,
    "tokenizer": tokenizer.run,
    "tokenize": tokenize.run,
    "pretrain": pretrain.run,
    "evaluate": evaluate.run,
}


def run(settings: FlowJob) -> None:
    """Take all steps that are not done yet.

    Raises:
        SettingsError: a step's settings are out of range, or do not fit what is there.
        TrainingStoppedError: training went back too often.
    """
    training = settings.pretrain
    for scoring in (training.evaluate, settings.evaluate):  # days before it is asked for
        if scoring.task_names():
            from jobs import eval_tasks  # brings lm_eval, which takes seconds

            eval_tasks.check(scoring)
    with ray_session(math.ceil(training.workers * training.cpus_per_worker)) as only_this_machine:
        if only_this_machine:
            pretrain.require_gpus(training)
        for number, (step, own) in enumerate(steps(settings).items(), 1):
            log.info("flow: %d of %d, %s", number, len(STEPS), step)
            began = time.monotonic()
            STEPS[step](own)
            log.info("flow: %s is done after %.0f s", step, time.monotonic() - began)


def steps(settings: FlowJob) -> dict[str, Any]:
    """Each step's own settings, in the order of the steps."""
    workspace = settings.workspace
    whole = {"curate": CurateJob, "tokenizer": TokenizerJob, "tokenize": TokenizeJob}
    own = {step: kind(workspace=workspace, **_fields(getattr(settings, step))) for step, kind in whole.items()}
    training = dataclasses.replace(settings.pretrain, workspace=workspace)
    scoring = dataclasses.replace(settings.evaluate, workspace=workspace, name=training.name)
    return own | {"pretrain": training, "evaluate": scoring}


def _fields(settings: Any) -> dict[str, Any]:
    return {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
