"""fp8 layers against fp32 ones: values and gradients within the formats' rounding; bounds that hold; training."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from models import float8
from models.config import ModelConfig
from models.transformer import Transformer

SMALL = ModelConfig(vocab_size=61, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=96, max_seq_len=64)


def relative(ours, reference):
    return ((ours - reference).norm() / reference.norm()).item()


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def gradients(function, *tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    out.backward(normal(*out.shape, seed=9))
    return out.detach(), [leaf.grad for leaf in leaves]


def test_linear_and_its_gradients_are_as_close_as_fp8_can_be():
    x, first, second = normal(3, 20, 64), normal(48, 64, seed=1, scale=0.1), normal(16, 64, seed=2, scale=0.1)
    ours, our_gradients = gradients(lambda x, *w: float8.linear(x, x.detach().abs().amax(), *w), x, first, second)
    reference, expected = gradients(lambda x, *w: F.linear(x, torch.cat(w)), x, first, second)
    assert ours.dtype == reference.dtype
    assert relative(ours, reference) < 0.05  # two roundings to 3 bits
    for mine, theirs in zip(our_gradients, expected, strict=True):
        assert relative(mine, theirs) < 0.09  # one to 2 bits, one to 3


def test_feed_forward_and_its_gradients_are_as_close_as_fp8_can_be():
    x = F.rms_norm(normal(2, 30, 64), (64,))
    weights = [normal(*shape, seed=i, scale=0.1) for i, shape in enumerate([(96, 64), (96, 64), (64, 96)])]
    length = torch.tensor(8.0)
    ours, our_gradients = gradients(lambda x, *w: float8.feed_forward(x, length, *w), x, *weights)
    reference, expected = gradients(lambda x, g, u, d: F.linear(F.silu(x @ g.T) * (x @ u.T), d), x, *weights)
    assert relative(ours, reference) < 0.08
    for mine, theirs in zip(our_gradients, expected, strict=True):
        assert relative(mine, theirs) < 0.15


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e8])
def test_the_size_of_gradients_does_not_matter(scale):
    x, weight, upstream = normal(20, 64), normal(48, 64, seed=1), normal(20, 48, seed=2)
    found = []
    for factor in (1.0, scale):
        leaf = x.clone().requires_grad_()
        float8.linear(leaf, torch.tensor(8.0), weight).backward(upstream * factor)
        found.append(leaf.grad / factor)
    assert relative(found[1], found[0]) < 0.12  # each is rounded to 2 bits, at other places


def test_zero_gradients_stay_zero():
    x = normal(4, 64).requires_grad_()
    float8.linear(x, torch.tensor(8.0), normal(16, 64)).backward(torch.zeros(4, 16))
    assert (x.grad == 0).all()


def test_bounds_hold():
    generator = torch.Generator().manual_seed(0)
    for seed in range(5):
        norm = normal(64, seed=seed) + 1
        x = F.rms_norm(normal(200, 64, seed=seed, scale=3.0) ** 3, (64,)) * norm
        length = float8.length_bound(norm)
        assert x.norm(dim=1).max() <= length * 1.0001
        w_value, w_gate, w_up = (torch.randn(32, 64, generator=generator) for _ in range(3))
        assert (x @ w_value.T).abs().max() <= length * float8.longest_row(w_value)
        assert (F.silu(x @ w_gate.T) * (x @ w_up.T)).abs().max() <= float8.swiglu_bound(length, w_gate, w_up)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_model_computes_nearly_the_same_and_only_when_it_trains(qk_norm):
    config = replace(SMALL, qk_norm=qk_norm)
    exact, model = Transformer(config, seed=1), Transformer(config, seed=1)
    float8.convert(model)
    assert model.state_dict().keys() == exact.state_dict().keys()
    tokens = torch.randint(0, 61, (4, 65), generator=torch.Generator().manual_seed(0))
    losses = [m(tokens[:, :-1], tokens[:, 1:]) for m in (exact, model)]
    for loss in losses:
        loss.backward()
    assert losses[1].item() != losses[0].item()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=2e-3)
    for mine, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        assert relative(mine.grad, theirs.grad) < 0.25
    with torch.no_grad():
        torch.testing.assert_close(model(tokens[:, :-1]), exact(tokens[:, :-1]), rtol=0, atol=0)


def test_training_in_fp8_reaches_the_loss_of_fp32():
    generator = torch.Generator().manual_seed(0)
    text = (torch.arange(4000) * 7 % 53 + torch.randint(0, 3, (4000,), generator=generator)) % 61
    reached = []
    for convert in (lambda model: None, float8.convert):
        model = Transformer(SMALL, seed=1)
        convert(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        generator.manual_seed(1)
        losses = []
        for _ in range(60):
            starts = torch.randint(0, 3900, (8, 1), generator=generator)
            sample = text[starts + torch.arange(33)]
            loss = model(sample[:, :-1], sample[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        reached.append(sum(losses[-10:]) / 10)
    assert reached[0] < 2.0
    assert reached[1] == pytest.approx(reached[0], rel=0.02)


def test_dimensions_that_the_products_cannot_have_are_refused():
    with pytest.raises(ValueError, match=r"model\.d_ff is 100, but fp8 needs a multiple of 16"):
        float8.convert(Transformer(replace(SMALL, d_ff=100), seed=None))
