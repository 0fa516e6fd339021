"""What a sweep draws, which trial comes next, and that a sweep that was killed goes on as if it had not been."""

import math
from random import Random

import pytest

from jobs.settings import ModelSettings, PretrainJob, SearchDimension, SettingsError, TuneJob, checked
from jobs.sweep_search import Plan
from jobs.sweep_space import Dice, draw, moved, space_of
from jobs.sweep_trials import Trials
from jobs.tune import lineage, rows

SPACE = {
    "optimizer.kind": SearchDimension(values=["adamw", "muon"]),
    "optimizer.lr": SearchDimension(low=1e-5, high=1e-1),
    "optimizer.momentum": SearchDimension(low=0.8, high=0.99, scale="linear", when={"optimizer.kind": ["muon"]}),
    "optimizer.weight_decay": SearchDimension(low=0.0, high=0.3, step=0.1, scale="linear"),
    "global_batch": SearchDimension(low=8, high=512, step=8),
    "seed": SearchDimension(low=0, high=3, scale="linear"),
    "schedule.warmup_steps": SearchDimension(low=1, high=1000),
}
PBT_SPACE = {"optimizer.lr": SearchDimension(low=1e-5, high=1e-1)}


def job(**changes):
    given = {"space": SPACE, "pretrain": PretrainJob(steps=1000), "scheduler": "none", "comparisons": 4} | changes
    settings = TuneJob(**given)
    checked(settings)
    return settings


def plan_of(settings, folder, share=1.0):
    return Plan(settings, space_of(settings.dimensions(), settings.pretrain), Trials(str(folder)), share)


def planted(settings):
    """Nats above the optimum, which lies at Muon, lr 10^-2.5, momentum 0.95, batch 64."""
    off = abs(math.log10(settings["optimizer.lr"]) + 2.5) + abs(math.log2(settings["global_batch"] / 64)) / 8
    return off + (2 * abs(settings["optimizer.momentum"] - 0.95) if settings["optimizer.kind"] == "muon" else 0.3)


def play(plan, loss=planted, trials=None, seconds=1.0):
    """Run what the plan has, one after the other, at most so many trials; those that are bad at half way stop there."""
    for _ in range(trials or 10**6):
        trial = plan.next()
        if trial == "done":
            return
        for step in (500, 1000):
            plan.trials.result(trial.name, step, loss(trial.settings) + 1000 / step, seconds)
            if loss(trial.settings) > 1:
                break
        plan.trials.end(trial.name, "finished" if step == 1000 else "stopped", seconds)


def test_each_kind_of_dimension_gives_what_it_promises():
    space = space_of(SPACE, PretrainJob())
    drawn = [draw(space, Dice(seed)) for seed in range(2000)]
    assert {s["optimizer.weight_decay"] for s in drawn} == {0.0, 0.1, 0.2, 0.3}
    assert {s["seed"] for s in drawn} == {0, 1, 2, 3}
    assert all(s["global_batch"] % 8 == 0 and 8 <= s["global_batch"] <= 512 for s in drawn)
    assert {type(s["global_batch"]) for s in drawn} == {type(s["schedule.warmup_steps"]) for s in drawn} == {int}
    rates = sorted(s["optimizer.lr"] for s in drawn)
    assert rates[0] >= 1e-5
    assert rates[-1] <= 1e-1
    assert rates[1000] == pytest.approx(1e-3, rel=0.3)  # log-uniform
    assert sum(s["schedule.warmup_steps"] <= 31 for s in drawn) == pytest.approx(1000, rel=0.1)
    for settings in drawn:
        assert ("optimizer.momentum" in settings) == (settings["optimizer.kind"] == "muon")
        for dimension in space:
            if dimension.given.values is None and dimension.name in settings:
                value = settings[dimension.name]
                assert dimension.value(dimension.unit(value)) == pytest.approx(value, rel=1e-3)


def test_settings_are_moved_a_little_and_stay_in_the_space():
    space, random = space_of(SPACE, PretrainJob()), Random(0)
    settings = draw(space, Dice(1))
    near = 0
    for _ in range(300):
        before, settings = settings, moved(space, settings, random)
        assert settings != before
        assert ("optimizer.momentum" in settings) == (settings["optimizer.kind"] == "muon")
        assert 1e-5 <= settings["optimizer.lr"] <= 1e-1
        assert settings["global_batch"] in range(8, 513, 8)
        assert settings["optimizer.weight_decay"] in (0.0, 0.1, 0.2, 0.3)
        near += 0.79 < settings["optimizer.lr"] / before["optimizer.lr"] < 1.26
    assert 180 < near < 270  # three quarters, and some of those that are drawn anew


def test_a_model_of_the_losses_finds_the_planted_optimum(tmp_path):
    space = {name: SPACE[name] for name in ("optimizer.kind", "optimizer.lr", "global_batch")}

    def mean_best(search):
        found = []
        for seed in range(6):
            plan = plan_of(job(search=search, trials=36, seed=seed, space=space), tmp_path / search / str(seed))
            play(plan, lambda settings: planted({"optimizer.momentum": 0.95} | settings))
            found.append(plan.trials.ranked()[0].loss - 1)
        return sum(found) / len(found)

    at_random = mean_best("random")
    assert mean_best("tpe") < 0.7 * at_random
    assert mean_best("bohb") < 0.9 * at_random


@pytest.mark.parametrize("search", ["random", "tpe", "bohb"])
def test_a_killed_sweep_draws_what_it_would_have_drawn(tmp_path, search):
    settings = job(search=search, trials=14)
    whole, torn = plan_of(settings, tmp_path / "whole"), plan_of(settings, tmp_path / "torn")
    play(whole)
    play(torn, trials=9)
    interrupted = torn.next()  # killed now
    again = plan_of(settings, tmp_path / "torn")
    assert again.interrupted == [interrupted.name]
    play(again)
    assert again.interrupted == []
    drawn = [{t.name: (t.settings, t.losses) for t in plan.trials.all.values()} for plan in (whole, again)]
    assert drawn[0] == drawn[1]


def test_a_line_that_a_kill_cut_short_is_as_if_it_had_not_been_written(tmp_path):
    plan = plan_of(job(trials=3), tmp_path)
    play(plan)
    file = tmp_path / "trials.jsonl"
    file.write_text(file.read_text()[:-20])  # within the end of the last trial
    again = plan_of(job(trials=3), tmp_path)
    assert again.interrupted == ["002"]
    assert again.trials.all["002"].losses == plan.trials.all["002"].losses


def test_failed_trials_are_tried_once_more_and_those_that_diverged_are_not(tmp_path):
    plan = plan_of(job(trials=3), tmp_path)
    for state in ("failed", "diverged", "finished"):
        plan.trials.end(plan.next().name, state, 1.0, "" if state == "finished" else "planted")
    assert plan.next() == "done"
    again = plan_of(job(trials=3), tmp_path)
    assert again.next().name == "000"
    assert again.next() == "done"


def test_a_sweep_all_of_whose_first_trials_fail_ends_and_may_be_started_again(tmp_path):
    for _ in range(2):
        plan = plan_of(job(trials=10), tmp_path)
        for name in ("000", "001", "002"):
            assert plan.next().name == name
            plan.trials.end(name, "failed", 1.0, "planted")
        assert plan.next() == "done"


def test_more_trials_may_be_asked_for_later(tmp_path):
    play(plan_of(job(trials=3), tmp_path))
    more = plan_of(job(trials=5), tmp_path)
    assert [more.next().name, more.next().name, more.next()] == ["003", "004", "done"]


def test_no_trial_starts_once_the_budget_is_spent(tmp_path):
    settings = job(trials=10, budget_hours=4.0)
    plan = plan_of(settings, tmp_path, share=2.0)  # each trial takes 2 GPUs for 2 thousand seconds or 3
    play(plan, loss=lambda settings: 0.5, seconds=1000.0)
    assert len(plan.trials.all) == 3  # 2 · 3000 s · 2 are less than 4 hours
    assert plan.spent()


# Population based training


class Members:
    """A population whose weights are how much each has learned: the nearer the learning rate to 10^-2.5, the more."""

    def __init__(self, folder):
        self.folder, self.learned = folder, {}

    def play(self, plan, stretches=10**6):
        for _ in range(stretches):
            trial = plan.next()
            if trial == "done":
                return
            stretch = trial.stretches[-1]
            weights = 0.0 if stretch.parent is None else self.learned[stretch.parent, stretch.start]
            weights += max(2 - abs(math.log10(stretch.settings["optimizer.lr"]) + 2.5), 0)
            self.learned[trial.name, stretch.end] = weights
            plan.trials.result(trial.name, stretch.end, 10 - weights, 1.0)
            plan.trials.end(trial.name, "finished" if stretch.end == 1000 else "waiting", 0.0)


def population(**changes):
    return job(**{"scheduler": "pbt", "trials": 8, "space": PBT_SPACE, "comparisons": 5} | changes)


def test_the_worst_quarter_goes_on_from_the_best_with_other_settings(tmp_path):
    members = Members(tmp_path)
    plan = plan_of(population(), tmp_path)
    members.play(plan)
    trials = plan.trials.all
    assert len(trials) == 8
    assert all(t.state == "finished" and list(t.losses) == [200, 400, 600, 800, 1000] for t in trials.values())
    for step in (200, 400, 600, 800):
        losses = {t.name: t.losses[step] for t in trials.values()}
        by_loss = sorted(losses, key=losses.get)
        now = {t.name: next(s for s in t.stretches if s.start == step) for t in trials.values()}
        assert {name for name in now if now[name].parent != name} == set(by_loss[-2:])
        for name in by_loss[-2:]:
            parent = now[name].parent
            assert parent in by_loss[:2]
            there = next(s for s in trials[parent].stretches if s.end == step)
            assert now[name].settings != there.settings
    alone = plan_of(population(scheduler="none"), tmp_path / "alone")
    best_alone = max(5 * max(2 - abs(math.log10(alone.next().settings["optimizer.lr"]) + 2.5), 0) for _ in range(8))
    assert 10 - plan.trials.ranked()[0].loss > best_alone  # it goes where no first setting was


def test_the_table_tells_a_members_lineage(tmp_path):
    plan = plan_of(population(), tmp_path)
    Members(tmp_path).play(plan)
    told = {row["trial"]: row.get("lineage", []) for row in rows(plan.trials)}
    assert sum(map(len, told.values())) == 8
    name, moves = next((name, moves) for name, moves in told.items() if moves)
    stretches = plan.trials.all[name].stretches
    at = next(i for i, s in enumerate(stretches) if s.start == moves[0]["step"])
    assert moves == lineage(plan.trials.all[name])
    assert moves[0]["from"] == stretches[at].parent != name
    assert (moves[0]["before"], moves[0]["after"]) == (stretches[at - 1].settings, stretches[at].settings)


def test_a_killed_population_goes_on_with_the_same_lineage(tmp_path):
    whole, torn = plan_of(population(), tmp_path / "whole"), plan_of(population(), tmp_path / "torn")
    Members(tmp_path).play(whole)
    members = Members(tmp_path)
    members.play(torn, stretches=19)
    torn.next()  # killed now
    again = plan_of(population(), tmp_path / "torn")
    members.play(again)
    assert {n: vars(t) for n, t in again.trials.all.items()} == {n: vars(t) for n, t in whole.trials.all.items()}


def test_members_wait_for_each_other_and_those_that_failed_or_diverged_hold_nobody_up(tmp_path):
    plan = plan_of(population(trials=4), tmp_path)
    names = [plan.next().name for _ in range(4)]
    assert plan.next() == "wait"
    for name, loss in zip(names[:2], (3.0, 2.0), strict=True):
        plan.trials.result(name, 200, loss, 1.0)
        plan.trials.end(name, "waiting", 0.0)
    assert plan.next() == "wait"
    plan.trials.end(names[2], "failed", 0.0, "planted")
    plan.trials.end(names[3], "diverged", 0.0, "planted")
    second = [plan.next() for _ in range(3)]
    assert [trial.name for trial in second] == [names[0], names[1], names[3]]
    assert second[2].stretches[-1].parent == names[1]  # the one that diverged takes the best's weights
    assert plan.next() == "wait"


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"seed": SearchDimension([1], when={"steps": [1]})}}, "when in the space of seed is"),
        (
            {"space": {"seed": SearchDimension([1]), "z_loss": SearchDimension([0.0], when={"seed": [2]})}},
            "when in the space of z_loss is .*values in the lists of dimensions before it",
        ),
        ({"space": {"seed": SearchDimension(low=1, high=2, step=3)}}, "step in the space of seed is 3"),
        ({"space": {"seed": SearchDimension([1], step=3)}}, "step in the space of seed is 3; .*null beside values"),
        ({"scheduler": "pbt", "search": "tpe"}, "search is 'tpe'; it has to be random with pbt"),
        ({"scheduler": "pbt", "space": {"seed": SearchDimension([1])}}, "space is 'seed'; .*with pbt one of optimizer"),
        ({"budget_hours": 0.0}, "budget_hours is 0.0; it has to be above 0"),
        ({"pretrain": PretrainJob(gpus_per_worker=0.5, workers=2)}, "pretrain.gpus_per_worker is 0.5"),
        ({"transfer_to": ModelSettings(preset="124m")}, "such as {'d_model': 128, 'n_heads': 2, 'n_kv_heads': 2"),
        (
            {"transfer_to": ModelSettings(d_model=256, n_heads=8, n_kv_heads=4, d_ff=512, n_layers=8)},
            "pretrain.model is .*'n_layers': 8",
        ),
        ({"transfer_to": ModelSettings(d_model=64, n_heads=2, n_kv_heads=1, d_ff=128)}, "transfer_to.d_model is 64"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused(changes, message):
    with pytest.raises(SettingsError, match=message):
        job(**({"space": PBT_SPACE} | changes))
