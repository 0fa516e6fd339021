"""What Ray Tune is told: schedulers that know of trials before a kill, and how many trials there is room for."""

import math
from types import SimpleNamespace

import pytest
from test_sweep_search import PBT_SPACE, job, plan_of

from jobs import sweep_runner
from jobs.settings import PretrainJob
from jobs.sweep_runner import Resources, _Nobody, _scheduler
from jobs.sweep_trials import METRIC, Trials


class Live:
    """A trial of Tune's, as far as schedulers look at it."""

    trial_id = "live"


def decide(scheduler, losses):
    """What a scheduler says to each loss of a new trial at steps 250, 500, 750, 1000."""
    trial = Live()
    scheduler.on_trial_add(None, trial)
    steps = (250, 500, 750, 1000)
    told = [{"step": step, METRIC: loss} for step, loss in zip(steps, losses, strict=False)]
    return [scheduler.on_trial_result(_Nobody(), trial, result) for result in told]


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_a_scheduler_compares_with_the_trials_before_a_kill(tmp_path, kind):
    settings = job(scheduler=kind, trials=10, space=PBT_SPACE)
    plan = plan_of(settings, tmp_path)
    assert decide(_scheduler(settings, plan), [9.0, 9.0]) == ["CONTINUE", "CONTINUE"]  # nobody to compare with
    for loss in (5.0, 4.0, 3.0):  # each better than those before: none is stopped
        trial = plan.next()
        for step in (250, 500, 750, 1000):
            plan.trials.result(trial.name, step, loss, 1.0)
        plan.trials.end(trial.name, "finished", 1.0)
    for again in (plan, plan_of(settings, tmp_path)):
        assert decide(_scheduler(settings, again), [3.5, 3.5, 3.5]) == ["CONTINUE"] * 3
        assert decide(_scheduler(settings, again), [4.5]) == ["STOP"]
        # At its last step a trial comes to its own end.
        assert decide(_scheduler(settings, again), [3.5, 3.5, 3.5, 9.0])[-1] == "CONTINUE"


@pytest.mark.parametrize("kind", ["asha", "median", "pbt", "none"])
def test_what_is_not_a_number_is_stopped_and_a_checkpoint_without_a_loss_is_not(tmp_path, kind):
    settings = job(scheduler=kind, space=PBT_SPACE)
    assert decide(_scheduler(settings, plan_of(settings, tmp_path)), [None, math.nan]) == ["CONTINUE", "STOP"]


def test_a_loss_that_is_not_a_number_is_told_and_remembered_as_the_worst(tmp_path):
    plan = plan_of(job(), tmp_path)
    plan.trials.result(plan.next().name, 250, math.nan, 1.0)
    assert Trials(str(tmp_path)).all["000"].loss == math.inf
    assert Trials(str(tmp_path)).ranked() == []


@pytest.mark.parametrize(
    ("there", "could", "base", "concurrent", "share"),
    [
        ({"CPU": 2.0}, None, PretrainJob(), 2, 1.0),
        ({"CPU": 1.0}, None, PretrainJob(workers=2), 1, 2.0),
        ({"CPU": 16.0, "GPU": 2.0}, None, PretrainJob(), 2, 1.0),
        ({"CPU": 16.0, "GPU": 2.0}, None, PretrainJob(gpus_per_worker=0.25), 8, 0.25),
        ({"CPU": 4.0, "GPU": 2.0}, None, PretrainJob(gpus_per_worker=0.25), 4, 0.25),  # cores are what lacks
        ({"CPU": 16.0, "GPU": 2.0}, None, PretrainJob(device="cpu"), 16, 1.0),
        ({"CPU": 4.0}, {"CPU": 64, "GPU": 8}, PretrainJob(device="gpu", workers=2), 4, 2.0),  # nodes yet to start
    ],
)
def test_as_many_trials_run_as_there_is_or_can_be_room_for(monkeypatch, there, could, base, concurrent, share):
    monkeypatch.setattr(sweep_runner.ray, "cluster_resources", lambda: there)
    state = SimpleNamespace(get_max_resources_from_cluster_config=lambda: could)
    monkeypatch.setattr(sweep_runner, "cluster_state", state)
    room = Resources(base)
    assert (room.concurrent, room.share) == (concurrent, share)
