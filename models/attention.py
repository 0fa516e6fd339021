"""Causal scaled-dot-product attention, also within packed documents.

The training path passes `is_causal` and no mask, because an explicit mask shuts out the flash and cuDNN kernels. On
Hopper, FlashAttention-4's kernels (Dao et al., the package flash-attn-4) are used where they are installed: forward and
backward pass together take 14 % less time than cuDNN's with heads of 64 and 7 % less with heads of 128. Masks
of documents are blocks of FlexAttention on CUDA (Dong et al. 2024), which leaves out what lies between documents, and
explicit elsewhere.
"""

import functools
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


@torch.compiler.assume_constant_result
def flash_4_serves(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether FlashAttention-4 is installed and is the fastest for this."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim in (64, 128)
        and torch.cuda.get_device_capability(device)[0] == 9
        and _flash_4_installed()
    )


@functools.cache
def _flash_4_installed() -> bool:
    try:
        from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd  # noqa: F401
    except ImportError:
        return False
    return True


@torch.library.custom_op("ingot::flash_attention", mutates_args=())
def _flash_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention, (batch, T, heads, head_dim), and the logarithms of its normalizers, (batch, heads, T)."""
    from flash_attn.cute.interface import _flash_attn_fwd

    return tuple(_flash_attn_fwd(q, k, v, causal=True, return_lse=True)[:2])


@_flash_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=torch.float32)


@torch.library.custom_op("ingot::flash_attention_backward", mutates_args=())
def _flash_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, normalizers: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    grads = [x.new_empty(x.shape) for x in (q, k, v)]
    _flash_attn_bwd(q, k, v, out, grad, normalizers, causal=True, dq=grads[0], dk=grads[1], dv=grads[2])
    return tuple(grads)


@_flash_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, normalizers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _flash_attention_backward(grad.contiguous(), *ctx.saved_tensors)


_flash_attention.register_autograd(_backward, setup_context=_save_for_backward)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask | None = None) -> Tensor:
    """Attention of each query to the keys up to its own position.

    Args:
        q: queries, (batch, n_heads, T, head_dim).
        k: keys, (batch, n_kv_heads, T, head_dim).
        v: values, as k. With n_kv_heads < n_heads, each serves n_heads / n_kv_heads neighbouring query heads.
        mask: of `document_mask`; None is all keys up to the query.

    Returns:
        (batch, n_heads, T, head_dim), dtype of q.
    """
    gqa = q.shape[1] != k.shape[1]
    if isinstance(mask, BlockMask):
        # below 128 queries it would take the kernel for decoding, which does not compile for all numbers of heads
        options = {"FORCE_USE_FLEX_ATTENTION": True} if q.shape[2] < 128 else None
        return _flex_attention(q, k, v, block_mask=mask, enable_gqa=gqa, kernel_options=options)
    if mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
    if flash_4_serves(q.device, q.dtype, q.shape[3]):
        return _flash_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))[0].transpose(1, 2)
    if q.is_cuda:
        with sdpa_kernel(_CUDA_BACKENDS, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
