"""The width-transfer table, the coordinate check of Yang et al. 2022 (appendix D.1), and the export of such models."""

import math

import pytest
import torch

from models.config import ModelConfig, OptimizerConfig
from models.hugging_face import load_pretrained, save_pretrained
from models.optimizer import build_optimizer, param_groups
from models.transformer import Transformer
from models.widths import initial_std, output_multiplier


def shape(width, base_width, **changes):
    """A shape whose heads stay 16 wide, while all else grows with the width."""
    heads = {"n_heads": width // 16, "n_kv_heads": width // 32}
    settings = {"vocab_size": 64, "d_model": width, "n_layers": 2, "d_ff": 2 * width, "max_seq_len": 32, **heads}
    return ModelConfig(**settings, base_width=base_width, **changes)


def changes(config, kind, steps=3):
    """How much a few steps on one batch change what layers put out, and the logits, as root mean squares by name."""
    model = Transformer(config, seed=0)
    optimizer = build_optimizer(model, OptimizerConfig(kind=kind, lr=3e-3))
    batch = torch.randint(0, 64, (8, 17), generator=torch.Generator().manual_seed(0))
    outputs = {}
    for name, module in model.named_modules():
        if name.endswith((".attention", ".feed_forward")):
            module.register_forward_hook(lambda _, inputs, output, name=name: outputs.update({name: output.detach()}))

    def look():
        with torch.no_grad():
            return {"logits": model(batch[:, :-1]), **outputs}

    before = look()
    for _ in range(steps):
        model(batch[:, :-1], batch[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: (value - before[name]).square().mean().sqrt().item() for name, value in look().items()}


def slopes(widths, base_width, kind, **settings):
    """Exponents of the width with which the changes grow: least squares in log-log."""
    rows = [changes(shape(width, base_width, **settings), kind) for width in widths]
    x = torch.tensor(widths).double().log()
    x -= x.mean()
    return {name: (x @ torch.tensor([row[name] for row in rows]).double().log() / (x @ x)).item() for name in rows[0]}


@pytest.mark.parametrize(
    ("kind", "widths", "tied"),
    [("adamw", (64, 128, 256, 512), False), ("adamw", (64, 128, 256), True), ("muon", (64, 128, 256), False)],
)
def test_what_a_step_changes_is_the_same_at_all_widths(kind, widths, tied):
    flat = slopes(widths, 64, kind, tied_embeddings=tied)
    assert all(abs(slope) < 0.2 for slope in flat.values()), flat
    grows = slopes(widths, None, kind, tied_embeddings=tied)
    assert all(slope > 0.4 for slope in grows.values()), grows


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_base_width_itself_is_the_standard_parametrization(kind):
    models = [Transformer(shape(64, base), seed=3) for base in (None, 64)]
    for name, parameter in models[0].named_parameters():
        assert torch.equal(parameter, models[1].get_parameter(name))
    settings = [
        [{key: value for key, value in group.items() if key != "params"} for group in param_groups(model, config)]
        for model, config in ((m, OptimizerConfig(kind=kind)) for m in models)
    ]
    assert settings[0] == settings[1]
    tokens = torch.arange(20)[None]
    assert torch.equal(models[0](tokens), models[1](tokens))


@pytest.mark.parametrize(("kind", "matrix_lr"), [("adamw", 1 / 4), ("muon", 1 / 2)])
def test_four_times_the_width_by_the_table(kind, matrix_lr):
    config = shape(256, 64)
    model = Transformer(config)
    names = {id(p): name for name, p in model.named_parameters()}
    settings = OptimizerConfig(kind=kind, lr=1.0, weight_decay=0.1, eps=1e-8)
    for group in param_groups(model, settings):
        for name in (names[id(p)] for p in group["params"]):
            matrix = name.startswith("layers") and "norm" not in name
            assert group["lr_scale"] == (matrix_lr if matrix else 1.0), name
            # lr · weight_decay does not depend on the width
            decays = matrix or name == "output.weight"
            assert group["lr"] * group["weight_decay"] == pytest.approx(0.1 if decays else 0.0), name
            assert group["eps"] == pytest.approx(1e-8 / 4)
    assert output_multiplier(config) == 1 / 4
    expected = {"tok_embeddings": 0.02, "output": 0.02, "w_q": 0.01, "w_gate": 0.01, "w_o": 0.005, "w_down": 0.005}
    for name, parameter in model.named_parameters():
        std = expected.get(name.split(".")[-2])
        if std is not None:
            assert initial_std(config, name) == pytest.approx(std)
            assert parameter.std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("tied", [False, True])
def test_exported_model_has_equal_logits_without_a_multiplier(tied, tmp_path):
    config = shape(96, 32, tied_embeddings=tied)  # times 1/3, which is not exact in binary
    model = Transformer(config, seed=0)
    with torch.no_grad():
        model.norm.weight.normal_(1.0, 0.1, generator=torch.Generator().manual_seed(0))
    save_pretrained(model.state_dict(), config, str(tmp_path))
    loaded, weights = load_pretrained(str(tmp_path))
    assert loaded.base_width is None
    plain = Transformer(loaded, seed=None)
    plain.load_state_dict(weights)
    tokens = torch.arange(32)[None]
    torch.testing.assert_close(plain(tokens), model(tokens), rtol=1e-5, atol=1e-6)
    assert not math.isclose(plain.norm.weight[0].item(), model.norm.weight[0].item())
