"""Causal scaled-dot-product attention: for training, within packed documents, and for generation with a cache.

The training path passes `is_causal` and no mask, because an explicit mask shuts out the flash and cuDNN kernels. Masks
of documents are blocks of FlexAttention on CUDA (Dong et al. 2024), which leaves out what lies between documents, and
explicit elsewhere.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

# cuDNN's kernel is the fastest on Hopper; those behind it serve other hardware, and shapes it declines
_CUDA_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

DocumentMask = Tensor | BlockMask
"""Of `document_mask`."""

# uncompiled, they hold a number for each pair of positions
_create_block_mask = torch.compile(create_block_mask, dynamic=False)
_flex_attention = torch.compile(flex_attention, dynamic=False)


def document_index(tokens: Tensor, eos_id: int) -> Tensor:
    """Which document each token belongs to, counted from 0 in each sequence, (B, T), int32.

    Args:
        tokens: ids, (B, T); each document ends with `eos_id`, which belongs to it.
        eos_id: the token that ends documents.
    """
    ends = (tokens == eos_id).int()
    return (ends.cumsum(1) - ends).int()


def document_mask(documents: Tensor) -> DocumentMask:
    """What `causal_attention` needs to keep attention within documents.

    Args:
        documents: (B, T), int32, of `document_index`.

    Returns:
        On CUDA the blocks of pairs of positions that attend at all; elsewhere (B, 1, T, T), True where attention is.
    """
    batch, length = documents.shape

    def visible(b: Any, h: Any, query: Any, key: Any) -> Any:
        return (query >= key) & (documents[b, query] == documents[b, key])

    if documents.is_cuda:
        return _create_block_mask(visible, batch, None, length, length, device=documents.device)
    position = torch.arange(length, device=documents.device)
    same = documents[:, :, None] == documents[:, None, :]
    return (same & (position[:, None] >= position))[:, None]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask | None = None) -> Tensor:
    """Attention of each query to the keys up to its own position.

    Args:
        q: queries, (batch, n_heads, T, head_dim); they are the last T of the S positions.
        k: keys, (batch, n_kv_heads, S, head_dim), S >= T.
        v: values, as k. With n_kv_heads < n_heads, each serves n_heads / n_kv_heads neighbouring query heads.
        mask: of `document_mask`, for S = T; None is all keys up to the query.

    Returns:
        (batch, n_heads, T, head_dim), dtype of q.
    """
    gqa = q.shape[1] != k.shape[1]
    if isinstance(mask, BlockMask):
        return _flex_attention(q, k, v, block_mask=mask, enable_gqa=gqa)
    if mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
    if q.is_cuda:
        with sdpa_kernel(_CUDA_BACKENDS, set_priority=True):
            return _attend(q, k, v, gqa)
    return _attend(q, k, v, gqa)


def _attend(q: Tensor, k: Tensor, v: Tensor, gqa: bool) -> Tensor:
    n_queries, n_keys = q.shape[2], k.shape[2]
    if n_queries == n_keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    if n_queries == 1:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)
    # is_causal aligns at the top left; a cached prefix needs the bottom right
    mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device).tril(n_keys - n_queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
