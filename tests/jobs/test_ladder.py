"""The ladder's shapes, its budget and its recipe; tests/cluster/test_ladder_runs.py trains one."""

import dataclasses
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import yaml

from jobs import ladder
from jobs.cli import main, parse
from jobs.scaling_law import Law, fit_with_uncertainty
from jobs.settings import LadderJob, ModelSettings, PretrainJob, SettingsError, checked
from models.config import PRESETS, OptimizerConfig, ScheduleConfig

LAW = Law(1.8, 480.0, 2100.0, 0.35, 0.37)
TARGET = dataclasses.replace(PRESETS["350m"], vocab_size=32768, n_heads=16, n_kv_heads=8, max_seq_len=1024)
BASE = PretrainJob(
    model=ModelSettings(preset="350m", vocab_size=32768, n_heads=16, n_kv_heads=8, base_width=256),
    steps=10_000,
    global_batch=64,
    sequence_length=1024,
    optimizer=OptimizerConfig(lr=3e-3),
    schedule=ScheduleConfig(warmup_steps=500),
)


def job(**changes):
    return LadderJob(**{"pretrain": BASE, **changes})


def test_rungs_are_the_target_in_narrow_with_tokens_in_proportion():
    rungs = ladder.plan(job(widths=[128, 512]), BASE, TARGET, 32768)
    assert len(rungs) == 6
    assert [r.name for r in rungs][:3] == ["w128-l24-t10", "w128-l24-t20", "w128-l24-t40"]
    for rung in rungs:
        config = rung.config
        assert config.head_dim == TARGET.head_dim
        assert config.n_heads // config.n_kv_heads == TARGET.n_heads // TARGET.n_kv_heads
        assert config.d_ff / config.d_model == TARGET.d_ff / TARGET.d_model
        assert (config.base_width, rung.settings.optimizer.lr) == (256, 3e-3)
        ratio = float(rung.name.rpartition("t")[2])
        assert rung.tokens / config.n_matmul_params() == pytest.approx(ratio, rel=0.01)
        assert rung.settings.schedule.warmup_steps / rung.settings.steps == pytest.approx(0.05, rel=0.02)
        checked(rung.settings)


def test_four_widths_are_found_whose_sizes_go_up_to_a_quarter_of_the_target():
    widths = ladder.default_widths(TARGET)
    sizes = np.array([ladder.shaped(TARGET, w).n_matmul_params() for w in widths]) / TARGET.n_matmul_params()
    assert sizes == pytest.approx([1 / 32, 1 / 16, 1 / 8, 1 / 4], rel=0.35)
    with pytest.raises(SettingsError, match=r"4 of 32 in groups of 2, allow only the widths \[64\]; give widths"):
        ladder.default_widths(PRESETS["nano"])
    with pytest.raises(SettingsError, match="widths has 200; it has to be a multiple of 128, the target's heads"):
        ladder.plan(job(widths=[200]), BASE, TARGET, 32768)


def measured_rungs():
    rungs = ladder.plan(job(), BASE, TARGET, 32768)
    return [
        {
            "name": r.name,
            "d_model": r.config.d_model,
            "n_layers": r.config.n_layers,
            "parameters": r.parameters,
            "tokens": r.tokens,
            "flops": r.config.flops_per_token(1024) * r.tokens,
            "loss": float(LAW.loss(r.parameters, r.tokens)),
            "tokens_per_second": 1e6,
            "flops_per_second_and_worker": 1e14 * (1 + r.parameters / 1e9),
            "mfu": None,
        }
        for r in rungs
    ]


def fitted_to(rows):
    return fit_with_uncertainty(*(np.array([r[k] for r in rows]) for k in ("parameters", "tokens", "loss")), draws=20)


def test_a_budget_buys_the_shape_with_the_lowest_loss():
    rows = measured_rungs()
    fitted = fitted_to(rows)
    best = ladder.best_for(job(gpu_hours=100.0), fitted, TARGET, rows, 1024)
    biggest = max(rows, key=lambda r: r["flops"])
    assert best["flops_per_second"] == biggest["flops_per_second_and_worker"]
    assert best["flops"] == pytest.approx(100 * 3600 * best["flops_per_second"])
    # The closed form takes 6 FLOP a weight and token, attention makes them a few more; all planted but the shape.
    config = ladder.shaped(TARGET, best["d_model"])
    n, _ = LAW.optimum(best["flops"], config.flops_per_token(1024) / config.n_matmul_params())
    assert best["parameters"] == pytest.approx(float(n), rel=0.15)
    low, high = best["parameters_interval"]
    assert low <= best["parameters"] <= high
    given = ladder.best_for(job(gpu_hours=50.0, flops_per_second=2e14), fitted, TARGET, rows, 1024)
    assert (given["flops"], given["measured_speed"]) == (pytest.approx(50 * 3600 * 2e14), False)
    assert not best["at_the_edge"]


def test_the_recipe_trains_what_was_found(tmp_path):
    rows = measured_rungs()
    fitted = fitted_to(rows)
    result = {"rungs": rows, "target": ladder.predict(fitted, TARGET, ladder.tokens_of(BASE))}
    assert result["target"]["loss"] == pytest.approx(
        float(LAW.loss(TARGET.n_matmul_params(), 10_000 * 65_536)), rel=2e-3
    )
    (tmp_path / "target.yaml").write_text(ladder.recipe(BASE, result))
    expected = dataclasses.replace(BASE, name="best", model=dataclasses.replace(BASE.model, d_model=1024, n_layers=24))
    expected.model.d_ff = TARGET.d_ff
    assert parse("pretrain", ["--config", str(tmp_path / "target.yaml")]) == expected
    result["budget"] = ladder.best_for(job(gpu_hours=100.0), fitted, TARGET, rows, 1024)
    (tmp_path / "best.yaml").write_text(ladder.recipe(BASE, result))
    best = parse("pretrain", ["--config", str(tmp_path / "best.yaml")])
    checked(best)
    assert (best.model.d_model, best.model.base_width) == (result["budget"]["d_model"], 256)
    assert ladder.tokens_of(best) == pytest.approx(result["budget"]["tokens"], rel=0.01)
    assert best.schedule.warmup_steps == round(best.steps * 0.05)


def test_pictures_and_page_are_well_formed():
    rows = measured_rungs()
    fitted = fitted_to(rows)
    result = {
        "rungs": rows,
        "failed": [],
        "law": {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.35, "beta": 0.37},
        "free": fitted.form.value,
        "target": ladder.predict(fitted, TARGET, ladder.tokens_of(BASE)),
        "budget": ladder.best_for(job(gpu_hours=100.0), fitted, TARGET, rows, 1024),
    }
    svg = ladder.draw(fitted, result, TARGET, 1024)
    root = ET.fromstring(svg)
    dots = [e for e in root.iter() if e.get("class") == "dot validation"]
    assert len(dots) == len(rows)
    assert "NaN" not in svg.upper().replace("TRANSFORM", "")
    html = ladder.report(job(name="steps"), fitted, result, svg)
    assert "w128-l24-t10" in html
    assert "best for 100 GPU hours" in html


def test_settings_that_make_no_ladder_are_refused(capsys):
    for arguments, message in (
        (["--widths", "[64, 128]", "--layers", "[2]"], "layers is [2]; it has to be null, or as many numbers"),
        (["--tokens_per_parameter", "[20, 20]"], "tokens_per_parameter is [20.0, 20.0]"),
        (["--gpu_hours", "0"], "gpu_hours is 0.0; it has to be above 0"),
    ):
        assert main(["tune", "ladder", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_tune_ladder_is_the_job_ladder(capsys):
    with pytest.raises(SystemExit):
        main(["tune", "ladder", "--print_config"])
    assert set(yaml.safe_load(capsys.readouterr().out)) == {f.name for f in dataclasses.fields(LadderJob)}
