"""Norm, rotation and the whole model against transformers' Llama and Qwen3, and against arithmetic written out."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from models.attention import document_index
from models.config import ModelConfig
from models.transformer import Linear, RMSNorm, Transformer, joined, rotary_table, rotate

TINY = ModelConfig(vocab_size=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=32)


def test_rms_norm_equals_the_formula_and_llama():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 16, generator=generator) * 7
    norm, reference = RMSNorm(16, 1e-5), LlamaRMSNorm(16, 1e-5)
    weight = torch.randn(16, generator=generator)
    for module in (norm, reference):
        module.weight.data.copy_(weight)
    written_out = torch.stack([row / math.sqrt((row**2).mean() + 1e-5) for row in x.view(-1, 16)]).view_as(x) * weight
    torch.testing.assert_close(norm(x), written_out)
    torch.testing.assert_close(norm(x), reference(x))


def test_rms_norm_of_bf16_is_computed_in_fp32():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = torch.nn.functional.rms_norm(x.double(), (64,), eps=1e-5).bfloat16()
    ours = RMSNorm(64, 1e-5)(x)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, expected, rtol=1e-2, atol=0)


def test_rotation_is_a_complex_product():
    head_dim, length, theta = 8, 11, 500.0
    x = torch.randn(2, length, 3, head_dim, generator=torch.Generator().manual_seed(0))
    rotated = rotate(x, rotary_table(head_dim, length, theta))
    for position in range(length):
        for pair in range(head_dim // 2):
            angle = position * theta ** (-2 * pair / head_dim)
            z = torch.complex(x[:, position, :, pair], x[:, position, :, pair + head_dim // 2])
            z = z * complex(math.cos(angle), math.sin(angle))
            torch.testing.assert_close(rotated[:, position, :, pair], z.real)
            torch.testing.assert_close(rotated[:, position, :, pair + head_dim // 2], z.imag)


def test_rotation_equals_llama():
    x = torch.randn(2, 9, 3, 8, generator=torch.Generator().manual_seed(0))
    table = rotary_table(8, 9, 10000.0)
    cos, sin = (torch.cat([half, half], dim=-1)[None] for half in table)
    reference, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    torch.testing.assert_close(rotate(x, table).transpose(1, 2), reference)


def test_rotated_products_depend_on_distance_only():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(8, generator=generator).expand(1, 20, 1, 8) for _ in range(2))
    table = rotary_table(8, 20, 10000.0)
    products = rotate(q, table)[0, :, 0] @ rotate(k, table)[0, :, 0].T
    for distance in range(5):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-5)


def test_no_token_sees_a_later_one():
    model = Transformer(TINY, seed=1)
    tokens = torch.randint(0, 61, (1, 12), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 61
    difference = (model(tokens) - model(changed)).abs().sum(-1)[0]
    assert difference[:7].max() == 0
    assert difference[7:].min() > 0


@pytest.mark.parametrize("tied", [False, True])
def test_loss_is_the_cross_entropy_of_the_logits(tied):
    model = Transformer(replace(TINY, tied_embeddings=tied), seed=1)
    tokens = torch.randint(0, 61, (3, 13), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, :4] = -100
    for reduction in ("mean", "sum", "none"):
        model.zero_grad()
        reference = torch.nn.functional.cross_entropy(model(inputs).transpose(1, 2), targets, reduction=reduction)
        reference.sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        loss = model(inputs, targets, reduction=reduction, loss_chunk=5)
        loss.sum().backward()
        torch.testing.assert_close(loss, reference)
        torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, gradients)


def test_initial_weights_have_the_stated_spread_and_depend_on_the_seed_only():
    config = replace(TINY, d_model=128, d_ff=512, n_layers=8, vocab_size=2000)
    first, again, other = Transformer(config, seed=1), Transformer(config, seed=None), Transformer(config, seed=2)
    again.init_weights(1)
    torch.testing.assert_close(first.state_dict(), again.state_dict(), rtol=0, atol=0)
    assert not torch.equal(first.output.weight, other.output.weight)
    block = first.layers[3]
    assert first.tok_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.attention.w_q.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.attention.w_o.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert block.feed_forward.w_down.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert (block.ffn_norm.weight == 1).all()


def test_tied_output_is_the_embedding():
    model = Transformer(replace(TINY, tied_embeddings=True), seed=1)
    assert model.output.weight is model.tok_embeddings.weight


def test_too_long_a_sequence_is_refused():
    with pytest.raises(ValueError, match=r"33 tokens, but model\.max_seq_len is 32"):
        Transformer(TINY)(torch.zeros(1, 33, dtype=torch.long))


def test_bf16_compute_is_close_to_fp32():
    model = Transformer(TINY, seed=1)
    tokens = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(0))
    exact = model(tokens, tokens)
    model.compute_dtype = torch.bfloat16
    loss = model(tokens, tokens)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
    assert model(tokens).dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_packed_documents_have_the_logits_of_each_alone():
    model = Transformer(TINY, seed=1)
    tokens = torch.randint(1, 61, (2, 20), generator=torch.Generator().manual_seed(0))
    tokens[0, [6, 7]] = tokens[1, 12] = 0
    logits = model(tokens, documents=document_index(tokens, eos_id=0))
    for row, cuts in enumerate([[0, 7, 8, 20], [0, 13, 20]]):
        for first, end in itertools.pairwise(cuts):  # the rotary embedding is relative: where one starts is no matter
            alone = model(tokens[row : row + 1, first:end])[0]
            torch.testing.assert_close(logits[row, first:end], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits[0, 10:], model(tokens)[0, 10:])


def test_token_losses_sum_to_the_loss_and_cost_no_gradient():
    model = Transformer(TINY, seed=1)
    tokens = torch.randint(0, 61, (3, 13), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, :4] = -100
    loss, losses = model(inputs, targets, reduction="sum", token_losses=True)
    torch.testing.assert_close(losses, model(inputs, targets, reduction="none").detach())
    torch.testing.assert_close(loss, losses.sum())
    assert losses.shape == targets.shape
    assert not losses.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(model(inputs, targets, token_losses=True)[1], losses)


def test_joined_matrices_compute_what_each_does():
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    matrices = [Linear(8, n) for n in (6, 3)]
    for matrix in matrices:
        torch.nn.init.normal_(matrix.weight, generator=torch.Generator().manual_seed(1))
    found = []
    for compute in (lambda x: joined(x, *matrices), lambda x: torch.cat([m(x) for m in matrices], -1)):
        leaf = x.clone().requires_grad_()
        out = compute(leaf)
        gradients = torch.autograd.grad(out.square().sum(), [leaf, *(m.weight for m in matrices)])
        found.append((out.detach(), gradients))
    torch.testing.assert_close(*found)
