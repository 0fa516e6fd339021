"""``ingot evaluate``: a trained model on tasks of lm_eval, and its validation loss and bits per byte."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
import time
from importlib.metadata import version
from typing import Any

import xxhash

from jobs.eval_cache import MEANING
from jobs.placing import Write, place
from jobs.run_folder import StoredRun
from jobs.settings import EvaluateJob, FailedError, PretrainJob, Scoring
from jobs.trained import find, located, run_fingerprint
from pipelines import storage
from pipelines.stage import ingot_version, require_manifest

log = logging.getLogger("ingot")

DATA = ("mmlu", "gsm8k", "humaneval")  # folders of data_dir, as of jobs.eval_tasks
RESULTS = "results.json"  # of the checkpoint that was scored last
_EACH = "results.jsonl"  # what each evaluation of a checkpoint measured, of which the file above is made


def run(settings: EvaluateJob) -> dict[str, Any]:
    """Score the model and write what came out below evals/NAME; returns the results of the last checkpoint.

    A checkpoint that was scored with the same settings is not scored again, and an evaluation that was stopped goes on
    where it was.

    Raises:
        SettingsError: a setting is out of range, or there is no such run, checkpoint or task.
        FileNotFoundError: the validation split is not there.
        FailedError: tasks failed, after all others were done.
    """
    settings = located(settings)  # on a cluster it is done in another process, whose working directory is another
    if settings.data_dir is not None:
        settings = dataclasses.replace(settings, data_dir=storage.absolute(settings.data_dir))
    if settings.model is None and settings.validation_samples is None:
        samples = find(settings)[1].get("settings", {}).get("validation_samples", PretrainJob.validation_samples)
        settings = dataclasses.replace(settings, validation_samples=samples)
    results: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for step in _steps(settings):
        results = _one(dataclasses.replace(settings, step=step, steps=None))
        at = f" at step {step}" if settings.steps else ""
        failed |= {f"{task}{at}": reason for task, reason in results.get("failed", {}).items()}
    if settings.model is None:
        _redraw(settings)
    if failed:
        raise FailedError("; ".join(f"task {task} failed: {reason}" for task, reason in failed.items()))
    return results


def _redraw(settings: EvaluateJob) -> None:
    """Have the run's page show what was measured, if there is one."""
    from jobs.report import REPORT, build_report

    folder = find(settings)[0]
    if storage.exists(folder.uri(REPORT)):
        try:
            log.info("evaluate: the page is %s", build_report(settings.workspace, settings.name))
        except OSError as error:
            log.warning("evaluate: the page could not be drawn; `ingot report` does it later: %s", error)


def _steps(settings: EvaluateJob) -> list[int | None]:
    if settings.steps is None:
        return [settings.step]
    if settings.steps != "all":
        steps = list(settings.steps)
        for step in steps:
            find(dataclasses.replace(settings, step=step))
        return steps
    from models.training.ledger import LEDGER, Ledger

    ledger = Ledger.from_dict(find(settings)[0].read_json(LEDGER))
    return sorted({entry.step for entry in ledger.usable()})


def _one(settings: EvaluateJob) -> dict[str, Any]:
    """Score one checkpoint, or a model that is no run's."""
    made_of = None
    if settings.model is None:  # the files of other models may change
        made_of = _made_of(settings)
        evals = evals_folder(settings.workspace, settings.name)
        before = storage.json_if_there(storage.join(evals, step_folder(find(settings)[2].step), RESULTS)) or {}
        if before.get("made_of") == made_of and not before.get("failed"):
            log.info("evaluate: %s is scored at step %s already, nothing to do", before["name"], before["step"])
            storage.write_json(storage.join(evals, RESULTS), before)
            return before
    work, device = score, settings.device
    if settings.task_names() and os.environ.get("RAY_ADDRESS"):
        work, device = score_by_copies, "cpu"
    return keep(place(work, settings, sys.stdout.write, device, settings.cpus) | {"made_of": made_of})


def keep(results: dict[str, Any]) -> dict[str, Any]:
    """Write the results of ``score`` into the folder of their checkpoint, and as the newest; returns what was written.

    What was measured of the same weights before, on the same kind of device, stays beside it, also what another
    evaluation measures meanwhile: each adds a line of its own, and whoever writes last has read them all.
    """
    folder = results.pop("folder")
    own = StoredRun(storage.join(folder, step_folder(results["step"])))
    if not own.lines(_EACH) and (before := own.read_json(RESULTS)):  # of an Ingot that kept no lines
        own.append_line(_EACH, json.dumps(before))
    before = _merged([line for line in own.lines(_EACH) if line.get("fingerprint") == results["fingerprint"]])
    for told in _replaced(before.get("scores", []), results.get("scores", [])):
        log.warning("evaluate: %s", told)
    own.append_line(_EACH, json.dumps(results))
    merged, read = {}, 0
    while len(lines := own.lines(_EACH)) > read:  # again, since what we wrote may lack what came meanwhile
        read = len(lines)
        merged = _merged([line for line in lines if line.get("fingerprint") == results["fingerprint"]])
        for uri in {own.uri(RESULTS), storage.join(folder, RESULTS)}:
            storage.write_json(uri, merged)
    log.info("evaluate: results are in %s", own.folder)
    return merged


def _replaced(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[str]:
    """Which tasks were scored before on other questions, or with other examples."""
    earlier = {row["task"]: row for row in before}
    told = {}
    for row in after:
        old = earlier.get(row["task"], row)
        if row["group"] is None and any(old.get(fact) != row.get(fact) for fact in ("items", "n_shot")):
            was, now = ((one.get("items"), one.get("n_shot")) for one in (old, row))
            told[row["task"]] = (
                f"{row['task']} of {now[0]} questions with {now[1]} examples takes the place of that of {was[0]} with "
                f"{was[1]}"
            )
    return list(told.values())


def _merged(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Results of the same weights as one: the last ones, and of earlier ones what those did not measure."""
    whole: dict[str, Any] = {}
    for one in results:
        scores = one.get("scores", [])
        again = {row["task"] for row in scores}
        before = [row for row in whole.get("scores", []) if row["task"] not in again]
        cut = {task: told for task, told in whole.get("cut", {}).items() if task not in again} | one.get("cut", {})
        validation = {name: value for name, value in whole.items() if name.startswith("validation_")}
        whole = validation | one | {"scores": before + scores} | ({"cut": cut} if cut else {})
    return whole


def evals_folder(workspace: str, name: str) -> str:
    """The folder of everything that was measured of a run."""
    return storage.join(workspace, "evals", name)


def step_folder(step: int | None) -> str:
    """Name of the folder, in that of a run, of what was measured of one checkpoint; empty for what is no run."""
    return "" if step is None else f"step-{step:08d}"


def _made_of(settings: EvaluateJob) -> dict[str, Any]:
    """What the results of a run follow from."""
    entry = find(settings)[2]
    measured = [field.name for field in dataclasses.fields(Scoring)] + ["validation_samples", "device"]
    made_of = {
        "checkpoint": [entry.step, entry.time, run_fingerprint(settings)],
        "settings": {name: getattr(settings, name) for name in measured} | {"tasks": settings.task_names()},
        "version": ingot_version(),
        "meaning": MEANING,
    }
    if settings.validation_samples:
        tokens = require_manifest(storage.join(settings.workspace, "tokens/validation"), "tokenize")
        made_of["tokens"] = tokens["fingerprint"]
    if settings.task_names():
        made_of |= {"harness": version("lm_eval"), "files": _files(settings)}
    return made_of


def _files(settings: EvaluateJob) -> str:
    """Tells apart what the local files of the tasks were, by their sizes and times."""
    folders = [storage.join(settings.data_dir, name) for name in DATA] if settings.data_dir is not None else []
    found: list[Any] = []
    for uri in [*folders, *(name for name in settings.task_names() if name.endswith((".yaml", ".yml")))]:
        with contextlib.suppress(FileNotFoundError):  # a task that reads it says so
            found += storage.list_files(uri)
    return xxhash.xxh3_128_hexdigest(json.dumps(found).encode())


def score(settings: EvaluateJob, device: str, write: Write) -> dict[str, Any]:
    """The results of one model, measured on ``device``; those of tasks go into its folder as they are done.

    Raises:
        SettingsError: there is no such task, or a file of it is missing.
    """
    from jobs.eval_workers import open_model

    if not settings.task_names():  # one copy is enough for the validation loss
        settings = dataclasses.replace(settings, workers=1)
    return _score(settings, open_model(settings, device), write)


def score_by_copies(settings: EvaluateJob, device: str, write: Write) -> dict[str, Any]:
    """As ``score``, by copies of the model on a cluster: this process prepares and counts, and needs no GPU itself."""
    from jobs.eval_workers import open_on_cluster

    return _score(settings, open_on_cluster(settings), write)


def _score(settings: EvaluateJob, opened: contextlib.AbstractContextManager[Any], write: Write) -> dict[str, Any]:
    harness = None
    if settings.task_names():
        from jobs import eval_harness  # brings lm_eval, which takes seconds

        harness = eval_harness.Harness(settings)  # before the model, so that a wrong name or path costs no time
    with opened as model:
        results = scored(settings, model, harness)
    write(results.pop("table", ""))
    return results


def scored(settings: EvaluateJob, model: Any, harness: Any | None) -> dict[str, Any]:
    """The results of a model that is loaded, and the folder of what is measured of it.

    Args:
        settings: which.
        model: a ``Model`` or ``ManyModels`` of `jobs.eval_workers`.
        harness: a ``Harness`` of `jobs.eval_harness`, None without tasks.
    """
    known = model.facts()
    # Other models may be called alike.
    own = known.name if known.step is not None else f"{known.name}-{known.fingerprint[:8]}"
    folder = evals_folder(settings.workspace, own)
    results: dict[str, Any] = {"name": known.name, "step": known.step, "fingerprint": known.fingerprint}
    if settings.validation_samples and settings.model is None:
        results |= model.validation(settings.workspace, settings.validation_samples, settings.batch)
        log.info(
            "evaluate: run %s at step %d, validation loss %.4f, %.4f bits per byte (%d sequences)",
            known.name,
            known.step,
            results["validation_loss"],
            results["validation_bits_per_byte"],
            settings.validation_samples,
        )
    if harness is not None:
        results |= harness.run(model, known, folder, step_folder(known.step))
    return results | {"folder": folder, "time": time.time()}
