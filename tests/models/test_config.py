"""Parameter counts and costs against published numbers and formulas worked by hand."""

from dataclasses import replace

import pytest

from models.config import PRESETS, ModelConfig, OptimizerConfig, ScheduleConfig
from models.transformer import Transformer


@pytest.mark.parametrize(
    ("preset", "published"),
    [("3b", 3_212_749_824), ("8b", 8_030_261_248)],  # the model cards of Llama 3.2 3B and Llama 3 8B
)
def test_llama_shapes_have_the_published_number_of_parameters(preset, published):
    assert PRESETS[preset].n_params() == published


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_counts_follow_the_hand_formula(preset):
    c = PRESETS[preset]
    c.validate()
    kv = c.d_model * c.n_kv_heads // c.n_heads
    block = c.d_model * (c.d_model + kv + kv + c.d_model) + 3 * c.d_model * c.d_ff + 2 * c.d_model
    tables = c.vocab_size * c.d_model * (1 if c.tied_embeddings else 2)
    assert c.n_params() == c.n_layers * block + tables + c.d_model
    matmul = c.n_layers * (block - 2 * c.d_model) + c.vocab_size * c.d_model
    assert c.n_matmul_params() == matmul
    assert c.flops_per_token(100) == 6 * matmul + 12 * c.n_layers * c.d_model * 100


@pytest.mark.parametrize(
    ("preset", "low", "high"),
    [("nano", 0.9e6, 1.2e6), ("124m", 123e6, 125e6), ("350m", 340e6, 370e6), ("1b", 1.0e9, 1.2e9)],
)
def test_presets_are_as_large_as_their_names(preset, low, high):
    assert low <= PRESETS[preset].n_params() <= high


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_count_equals_the_built_model(tied, qk_norm):
    config = replace(PRESETS["nano"], vocab_size=100, tied_embeddings=tied, qk_norm=qk_norm)
    assert config.n_params() == sum(p.numel() for p in Transformer(config).parameters())


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"n_heads": 3}, "n_heads is 3"),
        ({"n_kv_heads": 3}, "n_kv_heads is 3"),
        ({"d_model": 12, "n_heads": 4, "n_kv_heads": 4}, "even"),
        ({"n_layers": 0}, "n_layers is 0"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"base_width": 0}, "base_width is 0"),
    ],
)
def test_impossible_shapes_are_refused_by_name(change, name):
    with pytest.raises(ValueError, match=name):
        replace(ModelConfig(), **change).validate()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (OptimizerConfig(lr=0.0), "optimizer.lr is 0.0"),
        (OptimizerConfig(betas=(0.9, 1.0)), "optimizer.betas"),
        (OptimizerConfig(weight_decay=-1.0), "optimizer.weight_decay"),
        (OptimizerConfig(grad_clip=-1.0), "optimizer.grad_clip"),
        (OptimizerConfig(kind="sgd"), "optimizer.kind is 'sgd'"),
        (OptimizerConfig(momentum=1.0), "optimizer.momentum"),
        (ScheduleConfig(kind="linear"), "schedule.kind is 'linear'"),
        (ScheduleConfig(warmup_steps=-1), "schedule.warmup_steps"),
        (ScheduleConfig(decay_fraction=0.0), "schedule.decay_fraction"),
        (ScheduleConfig(decay="cubic"), "schedule.decay is 'cubic'"),
        (ScheduleConfig(min_ratio=1.5), "schedule.min_ratio"),
    ],
)
def test_impossible_optimizer_settings_are_refused_by_name(settings, name):
    with pytest.raises(ValueError, match=name):
        settings.validate()
