"""Chunked cross-entropy against torch's own over whole logits: values and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import ModelConfig
from models.loss import IGNORE, cross_entropy, default_chunk, inputs_and_targets
from models.transformer import Transformer

TOKENS, D_MODEL, VOCAB = 37, 8, 50


def sample(ignored: float, seed: int = 0, scale: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, D_MODEL, generator=generator) * scale
    head = torch.randn(VOCAB, D_MODEL, generator=generator)
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    targets[torch.rand(TOKENS, generator=generator) < ignored] = -100
    return hidden.requires_grad_(), head.requires_grad_(), targets


def value_and_gradients(loss, hidden, head, upstream):
    hidden.grad = head.grad = None
    loss.backward(upstream)
    return loss.detach(), hidden.grad.clone(), head.grad.clone()


@settings(max_examples=40, deadline=None)
@given(
    chunk=st.integers(1, TOKENS + 5),
    ignored=st.sampled_from([0.0, 0.3, 0.9]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 1000),
)
def test_value_and_gradients_equal_torch_for_any_chunk(chunk, ignored, reduction, seed):
    hidden, head, targets = sample(ignored, seed)
    targets[0] = 3  # torch's mean of nothing is not a number
    upstream = torch.rand(TOKENS if reduction == "none" else (), generator=torch.Generator().manual_seed(seed))
    expected = value_and_gradients(
        F.cross_entropy(hidden @ head.T, targets, reduction=reduction), hidden, head, upstream
    )
    ours = value_and_gradients(
        cross_entropy(hidden, head, targets, chunk=chunk, reduction=reduction), hidden, head, upstream
    )
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_gradients_the_value_is_the_same(reduction):
    hidden, head, targets = sample(0.3)
    with torch.no_grad():
        loss = cross_entropy(hidden, head, targets, chunk=10, reduction=reduction)
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ head.T, targets, reduction=reduction).detach())
    assert not loss.requires_grad


def test_equal_logits_cost_the_logarithm_of_the_vocabulary():
    loss = cross_entropy(torch.zeros(5, D_MODEL), torch.ones(VOCAB, D_MODEL), torch.arange(5))
    assert loss.item() == pytest.approx(math.log(VOCAB))


def test_logits_far_apart_stay_finite():
    hidden, head, targets = sample(0.0, scale=1e4)
    loss = cross_entropy(hidden, head, targets, chunk=7)
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ head.T, targets))
    assert hidden.grad.isfinite().all()
    assert head.grad.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_target_that_counts_gives_zero_loss_and_gradient(reduction):
    hidden, head, _ = sample(0.0)
    loss = cross_entropy(hidden, head, torch.full((TOKENS,), -100), chunk=10, reduction=reduction)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.abs().sum() == 0
    assert head.grad.abs().sum() == 0


def test_bf16_is_as_close_as_bf16_can_be():
    hidden, head, targets = sample(0.2)
    expected = value_and_gradients(F.cross_entropy(hidden @ head.T, targets), hidden, head, None)
    half = hidden.detach().bfloat16().requires_grad_()
    loss = cross_entropy(half, head, targets, chunk=8)
    head.grad = None
    loss.backward()
    assert (loss.dtype, half.grad.dtype, head.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    ours = (loss.detach(), half.grad.float(), head.grad)
    for mine, reference in zip(ours, expected, strict=True):
        assert (mine - reference).norm() <= 0.02 * reference.norm()


def test_disagreeing_lengths_are_refused():
    with pytest.raises(ValueError, match="3 tokens but targets has 4"):
        cross_entropy(torch.zeros(3, D_MODEL), torch.zeros(VOCAB, D_MODEL), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="chunk is 0"):
        cross_entropy(torch.zeros(3, D_MODEL), torch.zeros(VOCAB, D_MODEL), torch.zeros(3).long(), chunk=0)


def test_padding_at_the_end_of_a_sample_costs_nothing():
    config = ModelConfig(vocab_size=64, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, d_ff=32, max_seq_len=8)
    model = Transformer(config, seed=0)
    whole = torch.randint(0, 64, (1, 9))
    padded = torch.cat([whole[:, :6], torch.full((1, 3), IGNORE)], 1)
    torch.testing.assert_close(model(*inputs_and_targets(padded)), model(*inputs_and_targets(whole[:, :6])))
    assert torch.equal(inputs_and_targets(whole)[0], whole[:, :-1])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_z_loss_is_in_the_gradient_alone(reduction):
    hidden, head, targets = sample(0.3)
    losses = F.cross_entropy(hidden @ head.T, targets, reduction="none")
    penalty = 0.01 * (hidden @ head.T).logsumexp(1).square() * (targets != IGNORE)
    divisor = (targets != IGNORE).sum() if reduction == "mean" else 1
    expected = value_and_gradients((losses + penalty).sum() / divisor, hidden, head, None)
    loss = cross_entropy(hidden, head, targets, chunk=8, reduction=reduction, z_loss=0.01)
    ours = value_and_gradients(loss, hidden, head, None)
    torch.testing.assert_close(ours[0], losses.sum().detach() / divisor)
    torch.testing.assert_close(ours[1:], expected[1:], rtol=1e-4, atol=1e-5)


def test_z_loss_of_losses_whose_weights_come_later_is_refused():
    hidden, head, targets = sample(0.0)
    with pytest.raises(ValueError, match=r"z_loss is 0\.1"):
        cross_entropy(hidden, head, targets, reduction="none", z_loss=0.1)


def test_chunks_on_an_accelerator_hold_few_bytes_of_logits():
    for vocab in (4096, 32768, 50304, 128256):
        chunk = default_chunk(torch.device("cuda"), vocab)
        assert chunk & (chunk - 1) == 0
        assert 2**31 < chunk * vocab * 4 <= 2**32
