"""A sweep on Ray Tune: its trials side by side, stopped by Tune's schedulers, told to the sweep's own memory.

Tune is given a new experiment at each start; what happened before comes from ``trials.jsonl``: the plan takes it into
account, and a scheduler is told the results of trials that have ended, as if it had seen them. Trials that had not
ended tell theirs again and go on.

ASHA: Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning". Median stopping: Golovin et al. 2017,
"Google Vizier", section 3.2.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from pyarrow.fs import PyFileSystem
from ray import tune
from ray._private.state import state as cluster_state
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule
from ray.tune.search import ConcurrencyLimiter, Searcher

from jobs.ray_storage import PatientStorage
from jobs.run_folder import StoredRun
from jobs.settings import PretrainJob, TuneJob
from jobs.sweep_search import Plan
from jobs.sweep_space import Settings
from jobs.sweep_trials import METRIC
from pipelines import storage

log = logging.getLogger("ingot")

_OUTCOME = "outcome.json"
_LOST = 3  # times that a trial is started again when the node with its process is lost


@dataclass
class Task:
    """What one trial is to do now; handed to the objective in the trial's own process.

    Attributes:
        name: of the trial.
        settings: to train with, by their dotted names.
        folder: where it trains; what lies there is gone on with.
        end: step at which it is over.
        start: step that the weights in ``origin`` have.
        origin: folder of the training that this one goes on from; None at the beginning.
        told: steps and losses of an attempt before.
        done_with: folder of an earlier stretch, whose weights nobody will want any more.
    """

    name: str
    settings: Settings
    folder: str
    end: int
    start: int = 0
    origin: str | None = None
    told: tuple[tuple[int, float], ...] = ()
    done_with: str | None = None

    def report(self, step: int, loss: float) -> None:
        """Tell the sweep the validation loss of a step; it may end the process here."""
        tune.report({"step": step, METRIC: loss})


Objective = Callable[[Task], None]
"""Trains a task and reports its losses; raises TrainingStoppedError where the settings cannot work."""


class Resources:
    """What a trial takes, and how many the cluster has room for."""

    def __init__(self, base: PretrainJob) -> None:
        there = ray.cluster_resources()
        could = (
            cluster_state.get_max_resources_from_cluster_config() or {}
        )  # with an autoscaler; it may have no node yet
        most = {kind: max(there.get(kind, 0), could.get(kind, 0)) for kind in ("CPU", "GPU")}
        on_gpu = base.device == "gpu" or (base.device == "auto" and there.get("GPU", 0) >= base.workers)
        takes = {"CPU": base.workers * base.cpus_per_worker}
        if on_gpu:
            takes["GPU"] = base.workers * base.gpus_per_worker
        self.concurrent = max(min(int(most[kind] / need + 1e-6) for kind, need in takes.items() if need), 1)
        self.share, self.unit = (takes["GPU"], "GPU") if on_gpu else (takes["CPU"], "CPU core")


def run_trials(
    settings: TuneJob, plan: Plan, folder: str, concurrent: int, objective: Objective, draw: Callable[[], None]
) -> None:
    """Run what the plan has, to its end.

    Args:
        settings: of the sweep.
        plan: what to run.
        folder: of the sweep.
        concurrent: trials at the same time.
        objective: what a trial does.
        draw: called now and then when there is something new to be seen.
    """
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its table of the search settings says nothing new
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # A checkpoint before a preemption is reported without a loss.
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # it would go on as if all were done
    storage.delete(storage.join(folder, "tune"))
    # The trial's own process only waits for its Ray Train workers, which reserve what they need: it takes no core.
    trainable = tune.with_resources(tune.with_parameters(_trial, objective=objective), {"memory": 2**26})
    tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            num_samples=-1,  # as many as the plan has
            search_alg=ConcurrencyLimiter(_PlanSearcher(plan, folder), max_concurrent=concurrent),
            scheduler=_scheduler(settings, plan),
            trial_dirname_creator=lambda trial: f"{trial.config['task'].name}-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=storage.filesystem(folder)[1],
            storage_filesystem=PyFileSystem(PatientStorage(folder)),
            verbose=0,
            callbacks=[_Notes(plan, draw)],
            failure_config=tune.FailureConfig(max_failures=_LOST),
        ),
    ).fit()


def _trial(config: dict[str, Any], objective: Objective) -> None:
    """In the trial's process: what the objective does, and how it ended where that is not to be seen from its losses.

    An error of the objective would come again: it is written down, and the trial ends. Tune sees an error only where
    the process is lost, and starts it again.
    """
    task: Task = config["task"]
    try:
        for step, loss in task.told:  # the scheduler compares the others with it
            task.report(step, loss)
        objective(task)
    except Exception as error:
        from models.training.state import TrainingStoppedError  # with PyTorch, for which other trials need not wait

        line = (str(error).strip().splitlines() or [""])[0][:500]
        if isinstance(error, TrainingStoppedError):
            StoredRun(task.folder).write_json(_OUTCOME, {"state": "diverged", "error": line})
            return
        log.exception("tune: trial %s failed", task.name)
        told = f"{type(error).__name__}: {line}"
        StoredRun(task.folder).write_json(_OUTCOME, {"state": "failed", "error": told})


class _PlanSearcher(Searcher):
    """The plan, as Tune asks for it.

    Args:
        plan: what to run.
        folder: of the sweep.
    """

    def __init__(self, plan: Plan, folder: str) -> None:
        super().__init__(metric=METRIC, mode="min")
        self.plan, self.folder = plan, folder

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec: Any) -> bool:
        """The plan knows its space."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The task that is next."""
        found = self.plan.next()
        if found == "wait":
            return None
        if found == "done":
            return Searcher.FINISHED
        stretch, trials = found.stretches[-1], self.plan.trials
        where = storage.join(self.folder, trials.run_folder(found))
        StoredRun(where).delete(_OUTCOME)
        told = tuple((step, loss) for step, loss in found.losses.items() if step > stretch.start)
        origin = None
        if stretch.parent is not None:
            parent = trials.all[stretch.parent]
            before = [other.end for other in parent.stretches].index(stretch.start)
            origin = storage.join(self.folder, trials.run_folder(parent, before))
        # All have gone on from where this one was two stretches ago.
        old = storage.join(self.folder, trials.run_folder(found, -3)) if len(found.stretches) > 2 else None
        return {"task": Task(found.name, stretch.settings, where, stretch.end, stretch.start, origin, told, old)}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """What happened stands in the trials already."""

    def save(self, checkpoint_path: str) -> None:
        """There is nothing to remember."""

    def restore(self, checkpoint_path: str) -> None:
        """Nor to forget."""


def _scheduler(settings: TuneJob, plan: Plan) -> Any:
    """Tune's scheduler, which has been told of trials that ended in an earlier start."""
    steps = settings.pretrain.steps
    common = {"metric": METRIC, "mode": "min", "time_attr": "step", "grace_period": plan.comparisons[0]}
    if settings.scheduler == "asha":
        asha = _mild(ASHAScheduler, steps)
        scheduler = asha(max_t=steps, reduction_factor=settings.reduction_factor, **common)
    elif settings.scheduler == "median":
        # It would pause trials, which then start again, until there are enough to compare them with.
        scheduler = _mild(MedianStoppingRule, steps)(min_samples_required=2, min_time_slice=math.inf, **common)
    else:  # with pbt, the plan decides who goes on with what
        return _mild(FIFOScheduler, steps)()
    ended = {name: _Ended(name) for name, trial in plan.trials.all.items() if trial.state not in ("running", "failed")}
    for trial in ended.values():
        scheduler.on_trial_add(None, trial)
    for name, step, loss in plan.trials.told:
        if name in ended and scheduler.on_trial_result(_Nobody(), ended[name], {"step": step, METRIC: loss}) == "STOP":
            del ended[name]
    return scheduler


class _Ended:
    """A trial of an earlier start, as far as schedulers look at it."""

    def __init__(self, name: str) -> None:
        self.trial_id = name


class _Nobody:
    """Tune's controller before it has any trials."""

    def get_live_trials(self) -> list:
        """None."""
        return []


def _mild(kind: Any, steps: int) -> Any:
    """A scheduler that lets trials come to their own end, so that the last checkpoint is whole, and no NaN go on."""

    class Mild(kind):
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
            loss = result.get(METRIC)
            if loss is None:
                return kind.CONTINUE
            if not math.isfinite(loss):
                return kind.STOP
            decision = super().on_trial_result(tune_controller, trial, result)
            return kind.CONTINUE if result["step"] >= steps else decision

    return Mild


_DRAW_EVERY = 10.0  # seconds
_FREE_EVERY = 1.0


class _Notes(tune.Callback):
    """Takes down what Tune tells of trials.

    Args:
        plan: that they come from.
        draw: called now and then.
    """

    def __init__(self, plan: Plan, draw: Callable[[], None]) -> None:
        self.plan, self.draw = plan, draw
        self.clocks: dict[str, float] = {}
        self.drawn = self.freed = 0.0

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        """Free what the Ray Train runs of trials that were stopped have held.

        Ray Train does so itself only where a dashboard runs that answers.
        """
        from jobs.trainer import free_what_the_dead_held  # with PyTorch, which trials' processes need not import

        if time.monotonic() - self.freed > _FREE_EVERY:
            free_what_the_dead_held()
            self.freed = time.monotonic()

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Its clock runs."""
        self.clocks[trial.config["task"].name] = time.monotonic()

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        """A loss, unless an attempt before has told it."""
        task, loss = trial.config["task"], result.get(METRIC)
        known = self.plan.trials.all[task.name].losses
        if loss is None or result["step"] in known:
            return
        self.plan.trials.result(task.name, result["step"], loss, self._since(task.name))
        facts = task.name, result["step"], task.end, loss, task.settings
        log.info("tune: trial %s, step %d/%d, validation loss %.4f, %s", *facts)
        self._draw()

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """It has come to its end, or was stopped."""
        task = trial.config["task"]
        outcome = StoredRun(task.folder).read_json(_OUTCOME) or self._outcome(task)
        self._end(task, **outcome)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """It was lost for good."""
        self._end(trial.config["task"], "failed", f"its process was lost {_LOST + 1} times")

    def _outcome(self, task: Task) -> dict[str, str]:
        known = self.plan.trials.all[task.name]
        if known.losses and not math.isfinite(known.loss):
            return {"state": "diverged", "error": f"the validation loss of step {known.step} is not a number"}
        if known.step < task.end:
            return {"state": "stopped", "error": ""}
        return {"state": "finished" if task.end == self.plan.settings.pretrain.steps else "waiting", "error": ""}

    def _end(self, task: Task, state: Any, error: str = "") -> None:
        self.plan.trials.end(task.name, state, self._since(task.name), error)
        if error:
            log.warning("tune: trial %s %s, the others go on: %s", task.name, state, error)
        self._draw(now=True)

    def _since(self, name: str) -> float:
        before = self.clocks.get(name, time.monotonic())
        self.clocks[name] = time.monotonic()
        return self.clocks[name] - before

    def _draw(self, now: bool = False) -> None:
        if now or time.monotonic() - self.drawn > _DRAW_EVERY:
            self.draw()
            self.drawn = time.monotonic()
