"""``ingot tune``: a search over training settings; each trial is a Ray Train run in the sweep's folder.

The sweep writes ``trials.jsonl`` as it goes and the page ``report.html``; at its end ``results.json``, the recipe
``best.yaml``, and for a wider model ``target.yaml``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import yaml

from jobs.inputs import check_fits
from jobs.lease import lease
from jobs.pretrain import finished, pretrain, require_gpus
from jobs.run_folder import StoredRun, valid_steps
from jobs.session import ray_session
from jobs.settings import PretrainJob, SettingsError, TuneJob, with_setting
from jobs.sweep_report import draw_report
from jobs.sweep_search import Plan
from jobs.sweep_space import Dimension, Settings, space_of
from jobs.sweep_trials import METRIC, Trial, Trials
from pipelines import storage

if TYPE_CHECKING:
    from jobs.sweep_runner import Objective, Task

log = logging.getLogger("ingot")

RESULTS = "results.json"

# What may change between two starts of a sweep: where it runs, how far it goes, and what its best is for.
_FREE = ("workspace", "concurrent_trials", "trials", "budget_hours", "transfer_to")


def run(settings: TuneJob) -> list[dict[str, Any]]:
    """Run the sweep, going on where it was; returns its table, best trial first.

    Raises:
        SettingsError: the sweep of this name searched something else, or another command runs it.
        RuntimeError: no trial got as far as a validation.
    """
    settings = replace(settings, workspace=storage.absolute(settings.workspace))
    base = replace(settings.pretrain, workspace=settings.workspace)
    manifest, _ = check_fits(base)
    every = max(base.steps // settings.comparisons, 1)
    base = replace(base, validate_every=every, checkpoint_every=every, keep_checkpoints=1, report_every=0)
    return sweep(settings, TrainTrial(base, settings.workspace), manifest["fingerprint"])


def sweep(settings: TuneJob, objective: Objective, tokens: str = "") -> list[dict[str, Any]]:
    """``run`` with any objective.

    Args:
        settings: of the sweep; its workspace is an absolute path or a URI.
        objective: what a trial does.
        tokens: fingerprint of what it trains on.
    """
    folder = storage.join(settings.workspace, "sweeps", settings.name)
    with lease(StoredRun(folder), settings.name):
        _remember(folder, settings, tokens)
        space, trials = space_of(settings.dimensions(), settings.pretrain), Trials(folder)
        before = StoredRun(folder).read_json(RESULTS)
        if before is not None and _over(Plan(settings, space, trials, before["share"])):
            log.info("tune: sweep %s is done already, nothing to do", settings.name)
            share = before["share"]
        else:
            share = _run(settings, space, trials, folder, objective)
        _write_results(settings, folder, trials, share)
        table = rows(trials)
        _tell(table, list(settings.dimensions()), trials)
        return table


def _run(settings: TuneJob, space: list[Dimension], trials: Trials, folder: str, objective: Objective) -> float:
    """Run the trials that are left; returns the GPUs, or CPU cores, that each of them took."""
    base = settings.pretrain
    with ray_session(math.ceil(base.workers * base.cpus_per_worker)) as only_this_machine:
        if only_this_machine:
            require_gpus(base)
        from jobs.sweep_runner import Resources, run_trials  # imports Tune

        room = Resources(base)
        plan = Plan(settings, space, trials, room.share)
        concurrent = settings.concurrent_trials or room.concurrent
        ended = trials.count("finished", "stopped", "diverged")
        facts = settings.name, settings.trials, base.steps, ended, concurrent
        log.info("tune: sweep %s, %d trials of %d steps, %d ended before, %d at a time", *facts)

        def draw(live: bool = True) -> None:
            draw_report(settings, space, trials, room.share, room.unit, live)

        run_trials(settings, plan, folder, concurrent, objective, draw)
        draw(live=False)
        if plan.spent():
            log.warning("tune: the budget of %g %s hours is spent", settings.budget_hours, room.unit)
        return room.share


def _over(plan: Plan) -> bool:
    """Whether nothing is left to do."""
    if plan.interrupted or plan.failed:
        return False
    states = [trial.state for trial in plan.trials.all.values()]
    return plan.spent() or (len(states) >= plan.settings.trials and "waiting" not in states)


def _remember(folder: str, settings: TuneJob, tokens: str) -> None:
    """Refuse to go on with a sweep that searched something else, or trained on other tokens.

    Raises:
        SettingsError: it did.
    """
    uri = storage.join(folder, "sweep.json")
    now = {**json.loads(json.dumps(dataclasses.asdict(settings))), "tokens": tokens}
    for free in _FREE:
        now.pop(free)
    if settings.scheduler == "pbt":
        now["trials"] = settings.trials  # a population is of one size
    if storage.exists(uri) and storage.read_json(uri) != now:
        raise SettingsError(
            f"the sweep {settings.name} in {folder} was started with other settings or tokens; choose another "
            "--name, or delete that folder"
        )
    storage.write_json(uri, now)


@dataclass
class TrainTrial:
    """The objective of a sweep: a pretraining run.

    Attributes:
        base: what every trial trains.
        workspace: of the sweep.
    """

    base: PretrainJob
    workspace: str

    def __call__(self, task: Task) -> None:
        """Train the task's steps; what an attempt before has come to is not trained again."""
        from ray.tune.integration.ray_train import TuneReportCallback

        settings = _with(self.base, task.settings)
        # The learning rate moves over the whole run, also where a trial trains it stretch by stretch.
        schedule = replace(settings.schedule, over_steps=settings.schedule.over_steps or settings.steps)
        if task.end < settings.steps or task.start:
            settings = replace(settings, steps=task.end, schedule=schedule)
        run = StoredRun(task.folder)
        known = {step for step, _ in task.told}
        for step, row in valid_steps(run.metrics(), METRIC).items():
            # A killed sweep has not taken down the last that its trials told.
            if step > task.start and step not in known:
                task.report(step, row[METRIC])
        if finished(run, settings.steps):
            return
        if task.origin is not None:
            _go_on_from(StoredRun(task.origin), run, task.start)
        if task.done_with is not None:
            StoredRun(task.done_with).delete("checkpoints")
        pretrain(
            replace(settings, name=task.name),
            folder_name=task.folder.removeprefix(self.workspace.rstrip("/") + "/"),
            callbacks=[TuneReportCallback()],
            watch=False,
        )


def _go_on_from(origin: StoredRun, run: StoredRun, step: int) -> None:
    """Make the last checkpoint of a run the first of another one, which then goes on from it.

    Raises:
        FileNotFoundError: the origin has no checkpoint of this step.
    """
    from models.training.ledger import LEDGER, Ledger

    if run.read_json(LEDGER) is not None:
        return
    ledger = Ledger.from_dict(origin.read_json(LEDGER))
    entry = next((entry for entry in ledger.usable() if entry.step == step), None)
    if entry is None:
        raise FileNotFoundError(f"{origin.folder}: no usable checkpoint of step {step}")
    source = origin.uri(entry.folder)
    for file in storage.list_files(source, hidden=True):
        target = storage.join(run.uri(entry.folder), file.uri[len(source) :])
        with storage.open_input(file.uri) as whole, storage.open_output(target) as copy:
            shutil.copyfileobj(whole, copy, 1 << 24)
    # last: it says that the checkpoint is whole
    run.write_json(LEDGER, Ledger([replace(entry, status="clean")], ledger.skips).to_dict())


def _with(base: PretrainJob, settings: Settings) -> PretrainJob:
    for name, value in settings.items():
        base = with_setting(base, name, value)
    return base


def rows(trials: Trials) -> list[dict[str, Any]]:
    """The sweep's table: a row for every trial with its settings, last step and loss; the furthest and best first.

    With PBT ``lineage`` tells for each exploitation the step, the trial that was copied, and the settings before.
    """
    ranked = trials.ranked()
    table = []
    for trial in [*ranked, *(other for other in trials.all.values() if other not in ranked)]:
        row = {"trial": trial.name, **trial.settings, "step": trial.step, METRIC: None, "state": trial.state}
        row |= {METRIC: trial.loss} if trial in ranked else {}
        row |= {"hours": round(trial.seconds / 3600, 4)}
        row |= {"error": trial.error} if trial.error else {}
        if moves := lineage(trial):
            row["lineage"] = moves
        table.append(row)
    return table


def lineage(trial: Trial) -> list[dict[str, Any]]:
    """Where a trial has taken weights and settings of another one."""
    pairs = zip(trial.stretches, trial.stretches[1:], strict=False)
    return [
        {"step": now.start, "from": now.parent, "before": before.settings, "after": now.settings}
        for before, now in pairs
        if now.parent != trial.name
    ]


def _write_results(settings: TuneJob, folder: str, trials: Trials, share: float) -> None:
    """Recipes, and ``results.json`` at last: it says that the sweep came to its end.

    Raises:
        RuntimeError: no trial got as far as a validation.
    """
    ranked = trials.ranked()
    if not ranked:
        errors = [trial.error for trial in trials.all.values() if trial.error]
        raise RuntimeError(f"{folder}: no trial got as far as a validation; the first error: {errors[:1]}")
    storage.write_bytes(storage.join(folder, "best.yaml"), best_recipe(settings, ranked[0]).encode())
    log.info("tune: best settings in %s", storage.join(folder, "best.yaml"))
    if settings.transfer_to is not None:
        storage.write_bytes(storage.join(folder, "target.yaml"), target_recipe(settings, ranked[0]).encode())
        log.info("tune: the recipe for the wider model is %s", storage.join(folder, "target.yaml"))
    space, failed = list(settings.dimensions()), trials.count("failed")
    storage.write_json(
        storage.join(folder, RESULTS), {"space": space, "trials": rows(trials), "failed": failed, "share": share}
    )


def best_recipe(settings: TuneJob, best: Trial) -> str:
    """A recipe for ``ingot pretrain --config``: the base settings with those of the best trial."""
    recipe = replace(_with(settings.pretrain, best.settings), workspace=settings.workspace, name="best")
    return _yaml(recipe, [f"Found by a sweep: validation loss {best.loss:.4f} after {best.step} steps.", *_moves(best)])


def target_recipe(settings: TuneJob, best: Trial) -> str:
    """A recipe for the wider model of ``transfer_to``, for which the learning rate of the best trial is right too."""
    proxy = settings.pretrain.model
    shape = proxy.config(256, settings.pretrain.length())
    model = replace(settings.transfer_to, base_width=proxy.base_width or shape.d_model)
    tuned = _with(settings.pretrain, best.settings)
    # Presets have lengths of their own.
    recipe = replace(tuned, model=model, sequence_length=tuned.length(), name="target", workspace=settings.workspace)
    head = [
        f"Found by a sweep at width {shape.d_model}: validation loss {best.loss:.4f} after {best.step} steps.",
        *_moves(best),
        "model.base_width makes the learning rate serve this width too (muP). It does not know of other numbers of",
        "steps, batches or depths: those stay as they were in the sweep.",
    ]
    return _yaml(recipe, head)


def _moves(trial: Trial) -> list[str]:
    if len(trial.stretches) == 1:
        return []
    told = "; ".join(f"from step {stretch.start} {_short(stretch.settings)}" for stretch in trial.stretches)
    return [f"Its settings changed on the way (PBT): {told}."]


def _short(settings: Settings) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _yaml(recipe: PretrainJob, head: list[str]) -> str:
    plain = json.loads(json.dumps(dataclasses.asdict(recipe)))
    return "".join(f"# {line}\n" for line in head) + yaml.safe_dump(plain, sort_keys=False)


def _tell(table: list[dict[str, Any]], space: list[str], trials: Trials) -> None:
    header = ["trial", *space, "step", METRIC, "state"]
    if any("lineage" in row for row in table):
        header.append("lineage")
    lines = [header] + [[_cell(row.get(key)) for key in header] for row in table]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for trial in trials.all.values():
        if trial.state == "failed":
            print(f"trial {trial.name} failed: {trial.error}")
    if failed := trials.count("failed"):
        print(f"{failed} trials failed; run the same command again to try them once more")


def _cell(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return ", ".join(f"{move['from']} at {move['step']}" for move in value)
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
