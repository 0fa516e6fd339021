"""Causal scaled-dot-product attention for training and for generation with a cache.

The training path passes `is_causal` and no mask, because an explicit mask shuts out the flash and cuDNN kernels.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# cuDNN's kernel is the fastest on Hopper; those behind it serve other hardware, and shapes it declines
_CUDA_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of each query to the keys up to its own position.

    Args:
        q: queries, (batch, n_heads, T, head_dim); they are the last T of the S positions.
        k: keys, (batch, n_kv_heads, S, head_dim), S >= T.
        v: values, as k. With n_kv_heads < n_heads, each serves n_heads / n_kv_heads neighbouring query heads.

    Returns:
        (batch, n_heads, T, head_dim), dtype of q.
    """
    if q.is_cuda:
        with sdpa_kernel(_CUDA_BACKENDS, set_priority=True):
            return _attend(q, k, v)
    return _attend(q, k, v)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n_queries, n_keys = q.shape[2], k.shape[2]
    gqa = q.shape[1] != k.shape[1]
    if n_queries == n_keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    if n_queries == 1:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)
    # is_causal aligns at the top left; a cached prefix needs the bottom right
    mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device).tril(n_keys - n_queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
