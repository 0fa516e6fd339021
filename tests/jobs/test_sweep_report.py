"""A sweep's page shows every trial, and its recipes are those of the best one, also for a wider model."""

import dataclasses
import re
from xml.etree import ElementTree as ET

import pytest
import yaml
from test_sweep_search import PBT_SPACE, Members, job, plan_of, play, population

from jobs.cli import parse
from jobs.settings import ModelSettings, PretrainJob, SearchDimension, checked
from jobs.sweep_report import draw_report
from jobs.sweep_trials import Stretch, Trials
from jobs.tune import best_recipe, target_recipe
from models.widths import scales


def page_of(settings, plan, live=False):
    """The page, after its pictures have been read as XML."""
    draw_report(settings, plan.space, plan.trials, 1.0, "GPU", live)
    with open(f"{settings.workspace}/sweeps/{settings.name}/report.html") as file:
        page = file.read()
    for svg in re.findall(r"<svg.*?</svg>", page):
        ET.fromstring(svg)
    return page


def test_the_page_shows_every_trial_its_state_and_its_error(tmp_path):
    settings = job(trials=9, workspace=str(tmp_path), scheduler="asha", budget_hours=7.0)
    plan = plan_of(settings, tmp_path)
    play(plan, trials=7)
    plan.trials.end(plan.next().name, "failed", 1.0, "ValueError: <planted>")
    plan.next()
    page = page_of(settings, plan, live=True)
    assert page.count("<svg") == 3
    assert 'http-equiv="refresh"' in page
    for trial in plan.trials.all.values():
        assert f"<td>{trial.name}</td>" in page or f'<td class="number">{trial.name}</td>' in page
        assert len(re.findall(f"<title>trial {trial.name}, {trial.state}", page)) == (
            3 + len(trial.settings) if trial.losses else 0
        )
    assert "ValueError: &lt;planted&gt;" in page
    assert " of 7</b><span>GPU hours" in page


def test_a_page_can_be_drawn_of_no_trial_of_one_and_of_some_that_are_all_alike(tmp_path):
    settings = job(trials=2, workspace=str(tmp_path), space={"seed": SearchDimension(values=[3])})
    plan = plan_of(settings, tmp_path)
    assert page_of(settings, plan).count("<svg") == 0
    for count in (1, 2):
        play(plan, loss=lambda settings: 0.5, trials=1)
        assert page_of(settings, plan).count("<svg") == 3
        assert len(plan.trials.ranked()) == count


def test_the_page_of_a_population_has_an_arrow_for_each_that_was_copied(tmp_path):
    settings = population(workspace=str(tmp_path))
    plan = plan_of(settings, tmp_path)
    Members(tmp_path).play(plan)
    page = page_of(settings, plan)
    assert page.count('<path class="line rollback"') == 8
    assert page.count(" → ") == 8


def best_of(settings, tmp_path, values, stretches=1):
    trials = Trials(str(tmp_path))
    for i in range(stretches):
        trial = trials.begin(Stretch(500 * i, 500 * (i + 1), values, "001" if i else None), "000")
    trials.result(trial.name, 500 * stretches, 2.5, 1.0)
    return trial


def recipe_of(text, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    return parse("pretrain", ["--config", str(tmp_path / "recipe.yaml")])


def test_the_best_recipe_is_the_base_with_the_best_settings(tmp_path):
    base = PretrainJob(steps=1000, validate_every=77)
    settings = job(workspace="w", pretrain=base, space=PBT_SPACE)
    text = best_recipe(settings, best_of(settings, tmp_path, {"optimizer.lr": 0.02}, stretches=2))
    expected = dataclasses.replace(base, workspace="w", name="best")
    expected.optimizer.lr = 0.02
    assert recipe_of(text, tmp_path) == expected
    assert "validation loss 2.5000 after 1000 steps" in text
    assert "PBT" in text


def test_the_recipe_for_a_wider_model_keeps_the_rate_and_names_the_width_it_was_tuned_at(tmp_path):
    narrow = ModelSettings(preset="124m", d_model=192, n_heads=3, n_kv_heads=3, d_ff=512)
    base = PretrainJob(steps=1000, model=narrow)
    settings = job(workspace="w", pretrain=base, space=PBT_SPACE, transfer_to=ModelSettings(preset="124m"))
    target = recipe_of(target_recipe(settings, best_of(settings, tmp_path, {"optimizer.lr": 0.02})), tmp_path)
    checked(target)
    assert target.model == ModelSettings(preset="124m", base_width=192)
    assert (target.optimizer.lr, target.steps, target.name) == (0.02, 1000, "target")
    wide = target.model.config(50304, target.length())
    assert scales(wide, "layers.0.attention.w_q.weight", "adamw").lr == pytest.approx(192 / 768)
    assert scales(narrow.config(50304), "layers.0.attention.w_q.weight", "adamw").lr == 1
    assert yaml.safe_load(target_recipe(settings, best_of(settings, tmp_path / "b", {"optimizer.lr": 1.0})))
