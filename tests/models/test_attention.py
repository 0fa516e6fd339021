"""Attention against the textbook formula, softmax(QKᵀ/√d)V with a mask, written out."""

import itertools
import math

import pytest
import torch

from models.attention import causal_attention, document_index, document_mask


def textbook(q, k, v):
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                visible = i + 1
                scores = k[b, h // group, :visible] @ q[b, h, i] / math.sqrt(q.shape[3])
                out[b, h, i] = scores.softmax(0) @ v[b, h // group, :visible]
    return out


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("length", [7, 1])
def test_causal_attention_equals_the_textbook(n_kv_heads, length):
    generator = torch.Generator().manual_seed(n_kv_heads)
    q = torch.randn(2, 4, length, 8, generator=generator)
    k, v = (torch.randn(2, n_kv_heads, length, 8, generator=generator) for _ in range(2))
    torch.testing.assert_close(causal_attention(q, k, v), textbook(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_gradients_equal_the_textbook(n_kv_heads):
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(1, heads, 5, 8, generator=generator) for heads in (4, n_kv_heads, n_kv_heads)]
    upstream = torch.randn(1, 4, 5, 8, generator=generator)
    gradients = []
    for attention in (causal_attention, textbook):
        leaves = [t.clone().requires_grad_() for t in tensors]
        attention(*leaves).backward(upstream)
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_documents_end_with_their_end_token():
    tokens = torch.tensor([[5, 6, 0, 7, 0, 0, 8], [0, 1, 2, 3, 4, 5, 6]])
    assert document_index(tokens, eos_id=0).tolist() == [[0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_attention_within_documents_is_that_of_each_document_alone(n_kv_heads):
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(2, 4, 9, 8, generator=generator)
    k, v = (torch.randn(2, n_kv_heads, 9, 8, generator=generator) for _ in range(2))
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1], [3, 4, 4, 4, 4, 4, 4, 4, 9]], dtype=torch.int32)
    together = causal_attention(q, k, v, document_mask(documents))
    for row, cuts in enumerate([[0, 4, 9], [0, 1, 8, 9]]):
        for first, end in itertools.pairwise(cuts):
            one = (slice(row, row + 1), slice(None), slice(first, end))
            torch.testing.assert_close(together[one], causal_attention(q[one], k[one], v[one]))
