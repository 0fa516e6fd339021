"""AdamW, clipping and schedules against torch's own, a hand-written update, and closed forms."""

import math

import pytest
import torch
from torch import nn

from models.config import ModelConfig, OptimizerConfig, ScheduleConfig
from models.optimizer import build_optimizer, clip_grad_norm, learning_rate, param_groups
from models.transformer import Transformer

TINY = ModelConfig(vocab_size=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=32)
TOKENS = torch.randint(0, 61, (4, 17), generator=torch.Generator().manual_seed(0))


def loss_of(model):
    return model(TOKENS[:, :-1], TOKENS[:, 1:])


@pytest.mark.parametrize("tied", [False, True])
def test_only_matrices_of_linear_layers_decay(tied):
    model = Transformer(ModelConfig(**{**vars(TINY), "tied_embeddings": tied, "qk_norm": True}))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, others = ({names[id(p)] for p in group["params"]} for group in param_groups(model, 0.1))
    assert decayed | others == set(names.values())
    assert not decayed & others
    assert all("norm" in name or name == "tok_embeddings.weight" for name in others)
    assert not any("norm" in name or "embeddings" in name for name in decayed)
    assert [group["weight_decay"] for group in param_groups(model, 0.1)] == [0.1, 0.0]


def test_updates_equal_the_paper_written_out():
    config = OptimizerConfig(lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    model = Transformer(TINY, seed=1)
    optimizer = build_optimizer(model, config)
    names = [name for name, _ in model.named_parameters()]
    weights = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    first, second = ({n: torch.zeros_like(weights[n]) for n in names} for _ in range(2))
    for step in range(1, 6):
        optimizer.zero_grad()
        loss_of(model).backward()
        for name, parameter in model.named_parameters():
            g = parameter.grad.double()
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.9 * second[name] + 0.1 * g**2
            decay = 0.0 if "norm" in name or "embeddings" in name else 0.3
            weights[name] *= 1 - 0.01 * decay
            update = (first[name] / (1 - 0.8**step)) / ((second[name] / (1 - 0.9**step)).sqrt() + 1e-6)
            weights[name] -= 0.01 * update
        optimizer.step()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.double(), weights[name], rtol=1e-5, atol=1e-6)


def test_updates_equal_torch_unfused():
    config = OptimizerConfig(lr=3e-3)
    ours, reference = Transformer(TINY, seed=1), Transformer(TINY, seed=1)
    optimizer = build_optimizer(ours, config)
    plain = torch.optim.AdamW(
        param_groups(reference, 0.1), lr=3e-3, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False
    )
    assert optimizer.defaults["fused"]
    for _ in range(5):
        for model, opt in ((ours, optimizer), (reference, plain)):
            opt.zero_grad()
            loss_of(model).backward()
            opt.step()
    torch.testing.assert_close(ours.state_dict(), reference.state_dict(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("max_norm", [0.01, 0.5, 1e6])
def test_clipping_equals_torch(max_norm):
    ours, reference = Transformer(TINY, seed=1), Transformer(TINY, seed=1)
    for model in (ours, reference):
        loss_of(model).backward()
    norm = clip_grad_norm(ours, max_norm)
    expected = nn.utils.clip_grad_norm_(reference.parameters(), max_norm)
    torch.testing.assert_close(norm, expected)
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_norm_is_the_root_of_all_squares_and_zero_only_measures():
    model = Transformer(TINY, seed=1)
    loss_of(model).backward()
    before = [p.grad.clone() for p in model.parameters()]
    squares = sum((g.double() ** 2).sum().item() for g in before)
    assert clip_grad_norm(model, 0.0).item() == pytest.approx(math.sqrt(squares), rel=1e-6)
    torch.testing.assert_close([p.grad for p in model.parameters()], before, rtol=0, atol=0)


def test_one_bad_gradient_shows_in_the_norm():
    model = Transformer(TINY, seed=1)
    loss_of(model).backward()
    model.layers[1].attention.w_k.weight.grad[0, 0] = math.nan
    assert not clip_grad_norm(model, 1.0).isfinite()


def test_norm_without_gradients_is_zero():
    assert clip_grad_norm(Transformer(TINY), 1.0).item() == 0


def test_cosine_follows_its_closed_form():
    schedule = ScheduleConfig(kind="cosine", warmup_steps=10, min_ratio=0.1)
    rates = [learning_rate(step, 110, 2.0, schedule) for step in range(111)]
    assert rates[:10] == pytest.approx([2.0 * (step + 1) / 10 for step in range(10)])
    for step in range(10, 111):
        assert rates[step] == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi * (step - 10) / 100)) / 2)
    assert rates[9] == rates[10] == 2.0
    assert rates[60] == pytest.approx(1.1)
    assert rates[110] == pytest.approx(0.2)
    assert learning_rate(500, 110, 2.0, schedule) == pytest.approx(0.2)


def test_warmup_stable_decay_follows_its_closed_form():
    schedule = ScheduleConfig(kind="wsd", warmup_steps=5, decay_fraction=0.25, min_ratio=0.2)
    rates = [learning_rate(step, 100, 1.0, schedule) for step in range(101)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:76] == [1.0] * 71
    assert rates[75:101] == pytest.approx([1.0 - 0.8 * i / 25 for i in range(26)])
    assert learning_rate(500, 100, 1.0, schedule) == pytest.approx(0.2)


def test_no_warmup_starts_at_the_peak():
    for kind in ("cosine", "wsd"):
        assert learning_rate(0, 10, 3.0, ScheduleConfig(kind=kind, warmup_steps=0)) == 3.0
