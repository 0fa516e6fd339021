"""The backward passes and the loss that a compiler leaves slow, and what inference runs without a compiler, as Triton
kernels; all are bound by memory traffic.

torch.compile makes one pass of most chains of elementwise work, but not of these: a gradient that is two halves of one
tensor (SwiGLU, rotary embedding of joined queries, keys and values), a row's norm together with a sum over rows
(RMSNorm), and rows too long for one block (the loss). Each kernel here reads its inputs once and writes its results
once. Where nothing is compiled, as when prompts of any length are read, SwiGLU and the rotary embedding have kernels of
their own. Without CUDA or Triton, the same functions are plain PyTorch.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.distributed.tensor import DTensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for the CPU comes without
    triton = None
    loss_and_gradient_ = rotate_ = None


_NORM_PROGRAMS = 1056  # eight for each of an H100's processors


def on_gpu(*tensors: Tensor) -> bool:
    """Whether the kernels can work on these tensors: on CUDA, with Triton, and not sharded."""
    return triton is not None and all(t.is_cuda and not isinstance(t, DTensor) for t in tensors)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of both side by side, (..., 2·d_ff), to (..., d_ff) (Shazeer 2020)."""
    if on_gpu(gate_up):
        return _SwiGLU.apply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum x + delta, and its RMSNorm (Zhang & Sennrich 2019), computed in fp32; all (..., d_model) in x's dtype.

    Args:
        x: residual stream.
        delta: what is added to it.
        weight: of the norm, (d_model,).
        eps: added to the mean square.
    """
    if on_gpu(x, weight):
        return _AddNorm.apply(x, delta, weight, eps)
    x = x + delta
    return x, F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast x to a dtype; x itself when it has it.

    A cast that changes nothing at the end of an autograd.Function makes torch 2.11's compiler take its incoming
    gradient for zero.
    """
    return x if x.dtype == dtype else x.to(dtype)


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + head_dim/2) of x, (..., heads, head_dim), by angles of (..., 1, head_dim/2)."""
    first, second = x.chunk(2, dim=-1)
    return as_dtype(torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1), x.dtype)


def split_and_rotate(qkv: Tensor, rotary: Tensor, n_heads: int, n_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys turned by their positions' angles, and values, of all three side by side.

    Args:
        qkv: (batch, T, (n_heads + 2·n_kv_heads) · head_dim).
        rotary: cosines and sines, (2, T, head_dim / 2), fp32.
        n_heads: of the queries.
        n_kv_heads: of the keys, and of the values.

    Returns:
        (batch, T, heads, head_dim) each.
    """
    if on_gpu(qkv):
        return _SplitAndRotate.apply(qkv, rotary, n_heads, n_kv_heads)
    return _split_and_rotate(qkv, rotary, n_heads, n_kv_heads)


def _split_and_rotate(qkv: Tensor, rotary: Tensor, n_heads: int, n_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    head_dim = 2 * rotary.shape[-1]
    q, k, v = (
        part.unflatten(-1, (-1, head_dim))
        for part in qkv.split([n_heads * head_dim, n_kv_heads * head_dim, n_kv_heads * head_dim], dim=-1)
    )
    cos, sin = rotary.unsqueeze(2)
    return rotate_half(q, cos, sin), rotate_half(k, cos, sin), v


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        if not torch.compiler.is_compiling():
            out = _swiglu(gate_up.flatten(0, -2).contiguous())
            return out.view(*gate_up.shape[:-1], out.shape[-1])
        gate, up = gate_up.chunk(2, dim=-1)
        return as_dtype(F.silu(gate.float()) * up.float(), gate_up.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        out = _swiglu_backward(*(t.flatten(0, -2).contiguous() for t in (gate_up, grad)))
        return out.view_as(gate_up)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        rows = (t.flatten(0, -2).contiguous() for t in (x, delta))
        total, scale, normed = _add_norm(*rows, weight, eps)
        ctx.save_for_backward(total, scale, weight)
        return total.view_as(x), normed.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_normed: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, scale, weight = ctx.saved_tensors
        rows = (t.flatten(0, -2).contiguous() for t in (grad_normed, grad_x))
        out, partial = _norm_backward(x, scale, weight, *rows)
        out = out.view_as(grad_x)
        return out, out, partial.sum(0).to(weight.dtype), None


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rotary: Tensor, n_heads: int, n_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(rotary)
        return _split_and_rotate(qkv, rotary, n_heads, n_kv_heads)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor, None, None, None]:
        (rotary,) = ctx.saved_tensors
        grads = (g if g.stride(-1) == 1 else g.contiguous() for g in (grad_q, grad_k, grad_v))
        return _rotary_backward(*grads, rotary), None, None, None


if triton is not None:

    @triton.jit
    def _swiglu_kernel(gate_up, out, width, BLOCK: tl.constexpr):  # noqa: N803
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * width + column, gate * tl.sigmoid(gate) * up, mask=inside)

    @triton.jit
    def _rotate_kernel(
        x, cos, sin, row_stride, head_stride, cos_stride, sin_stride,
        HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        head, i = tl.arange(0, BLOCK)[:, None], tl.arange(0, WIDTH)[None, :]
        inside = (head < HEADS) & (i < HALF)
        c = tl.load(cos + row * cos_stride + i, mask=i < HALF, other=0.0)
        s = tl.load(sin + row * sin_stride + i, mask=i < HALF, other=0.0)
        at = x + row * row_stride + head * head_stride + i
        first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
        tl.store(at, first * c - second * s, mask=inside)
        tl.store(at + HALF, second * c + first * s, mask=inside)

    @triton.jit
    def _swiglu_backward_kernel(gate_up, grad, out, width, BLOCK: tl.constexpr):  # noqa: N803
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + row * width + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        grad_gate = g * up * sigmoid * (1 + gate * (1 - sigmoid))
        tl.store(out + row * 2 * width + column, grad_gate, mask=inside)
        tl.store(out + row * 2 * width + width + column, g * gate * sigmoid, mask=inside)

    @triton.jit
    def _rotary_backward_kernel(
        grad_q, grad_k, grad_v, cos_sin, out, length, q_batch, q_token, q_head, k_batch, k_token, k_head,
        v_batch, v_token, v_head, sin_offset, angle_stride,
        N_HEADS: tl.constexpr, N_KV_HEADS: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,  # noqa: N803
        KV_HEADS: tl.constexpr, WIDTH: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        batch, position = token // length, token % length
        i = tl.arange(0, WIDTH)
        angles = cos_sin + position * angle_stride + i
        cos = tl.load(angles, mask=i < HALF, other=0.0)[None, :]
        sin = tl.load(angles + sin_offset, mask=i < HALF, other=0.0)[None, :]
        row = out + token * (N_HEADS + 2 * N_KV_HEADS) * 2 * HALF
        heads = tl.arange(0, HEADS)
        inside = (heads < N_HEADS)[:, None] & (i < HALF)[None, :]
        at = grad_q + batch * q_batch + position * q_token + heads[:, None] * q_head + i[None, :]
        first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
        to = row + heads[:, None] * 2 * HALF + i[None, :]
        tl.store(to, first * cos + second * sin, mask=inside)
        tl.store(to + HALF, second * cos - first * sin, mask=inside)
        heads = tl.arange(0, KV_HEADS)
        inside = (heads < N_KV_HEADS)[:, None] & (i < HALF)[None, :]
        at = grad_k + batch * k_batch + position * k_token + heads[:, None] * k_head + i[None, :]
        first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
        to = row + (N_HEADS + heads[:, None]) * 2 * HALF + i[None, :]
        tl.store(to, first * cos + second * sin, mask=inside)
        tl.store(to + HALF, second * cos - first * sin, mask=inside)
        at = grad_v + batch * v_batch + position * v_token + heads[:, None] * v_head + i[None, :]
        to = to + N_KV_HEADS * 2 * HALF
        tl.store(to, tl.load(at, mask=inside, other=0.0), mask=inside)
        tl.store(to + HALF, tl.load(at + HALF, mask=inside, other=0.0), mask=inside)

    @triton.jit
    def _add_norm_kernel(
        x, delta, weight, total, scale, normed, width, eps: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < width
        at = row * width + column
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        value += tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        value = value.to(total.dtype.element_ty)
        tl.store(total + at, value, mask=inside)
        value = value.to(tl.float32)  # of what is stored, which is what the backward pass sees
        s = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
        tl.store(scale + row, s)
        w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(normed + at, value * s * w, mask=inside)

    @triton.jit
    def _norm_backward_kernel(
        x, scale, weight, grad_normed, grad_x, out, partial, rows, width, BLOCK: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        # a program takes every n-th row, and sums the weight's gradient over them in registers
        program, programs = tl.program_id(0), tl.num_programs(0)
        column = tl.arange(0, BLOCK)
        inside = column < width
        w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for turn in range((rows - program + programs - 1) // programs):
            row = (program + turn * programs).to(tl.int64)
            start = row * width
            s = tl.load(scale + row)
            xs = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32) * s
            g = tl.load(grad_normed + start + column, mask=inside, other=0.0).to(tl.float32)
            r = tl.load(grad_x + start + column, mask=inside, other=0.0).to(tl.float32)
            total += g * xs
            g *= w
            mean = tl.sum(g * xs, 0) / width
            tl.store(out + start + column, r + s * (g - xs * mean), mask=inside)
        tl.store(partial + program * width + column, total, mask=inside)

    @triton.jit
    def _loss_kernel(
        logits, targets, losses, vocab, z_loss: tl.constexpr, ignore: tl.constexpr, BLOCK: tl.constexpr  # noqa: N803
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        row = logits + token * vocab
        target = tl.load(targets + token)
        column = tl.arange(0, BLOCK)
        # a running maximum and sum (Milakov & Gimelshein 2018), in powers of 2
        largest, total = float("-inf"), 0.0
        for start in range(0, vocab, BLOCK):
            value = tl.load(row + start + column, mask=start + column < vocab, other=float("-inf"))
            value = value.to(tl.float32) * 1.4426950408889634
            new = tl.maximum(largest, tl.max(value, 0))
            total = total * tl.exp2(largest - new) + tl.sum(tl.exp2(value - new), 0)
            largest = new
        normalizer = largest + tl.log2(total)
        counts = target != ignore
        index = tl.where(counts, target, 0)
        own = tl.load(row + index).to(tl.float32)
        in_nats = normalizer * 0.6931471805599453
        tl.store(losses + token, tl.where(counts, in_nats - own, 0.0))
        factor = tl.where(counts, 1 + 2 * z_loss * in_nats, 0.0)
        one = tl.where(counts, 1.0, 0.0)
        tl.debug_barrier()  # the target's logit has been read by all before it is overwritten
        # the row again, now from the cache: few rows are in flight at a time
        for start in range(0, vocab, BLOCK):
            inside = start + column < vocab
            value = tl.load(row + start + column, mask=inside, other=float("-inf")).to(tl.float32)
            gradient = tl.exp2(value * 1.4426950408889634 - normalizer) * factor
            gradient = tl.where(start + column == index, gradient - one, gradient)
            tl.store(row + start + column, gradient, mask=inside)

    @torch.library.triton_op("ingot::swiglu", mutates_args={})
    def _swiglu(gate_up: Tensor) -> Tensor:
        rows, width = len(gate_up), gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, width)
        block = min(2048, triton.next_power_of_2(width))
        torch.library.wrap_triton(_swiglu_kernel)[(rows, triton.cdiv(width, block))](
            gate_up, out, width, BLOCK=block, num_warps=8 if block == 2048 else 4
        )
        return out

    def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`rotate_half` in place, without gradients.

        Args:
            x: (N, heads, head_dim) on CUDA, the last dimension contiguous.
            cos: of each token's angles, (N, head_dim / 2), fp32, the last dimension contiguous.
            sin: as cos.
        """
        rows, heads, head_dim = x.shape
        _rotate_kernel[(rows,)](
            x, cos, sin, *x.stride()[:2], cos.stride(0), sin.stride(0), HEADS=heads, HALF=head_dim // 2,
            BLOCK=triton.next_power_of_2(heads), WIDTH=triton.next_power_of_2(head_dim // 2), num_warps=4,
        )  # fmt: skip
        return x

    @torch.library.triton_op("ingot::swiglu_backward", mutates_args={})
    def _swiglu_backward(gate_up: Tensor, grad: Tensor) -> Tensor:
        rows, width = grad.shape
        out = torch.empty_like(gate_up)
        block = min(2048, triton.next_power_of_2(width))
        torch.library.wrap_triton(_swiglu_backward_kernel)[(rows, triton.cdiv(width, block))](
            gate_up, grad, out, width, BLOCK=block, num_warps=8 if block == 2048 else 4
        )
        return out

    @torch.library.triton_op("ingot::rotary_backward", mutates_args={})
    def _rotary_backward(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, rotary: Tensor) -> Tensor:
        batch, length, heads, head_dim = grad_q.shape
        kv_heads = grad_k.shape[2]
        out = grad_q.new_empty(batch, length, (heads + 2 * kv_heads) * head_dim)
        torch.library.wrap_triton(_rotary_backward_kernel)[(batch * length,)](
            grad_q, grad_k, grad_v, rotary, out, length, *grad_q.stride()[:3], *grad_k.stride()[:3],
            *grad_v.stride()[:3], rotary.stride(0), rotary.stride(1),
            N_HEADS=heads, N_KV_HEADS=kv_heads, HALF=head_dim // 2, HEADS=triton.next_power_of_2(heads),
            KV_HEADS=triton.next_power_of_2(kv_heads), WIDTH=triton.next_power_of_2(head_dim // 2), num_warps=4,
        )  # fmt: skip
        return out

    @torch.library.triton_op("ingot::add_norm", mutates_args={})
    def _add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        rows, width = x.shape
        total, normed = torch.empty_like(x), torch.empty_like(x)
        scale = x.new_empty(rows, dtype=torch.float32)
        block = triton.next_power_of_2(width)
        torch.library.wrap_triton(_add_norm_kernel)[(rows,)](
            x, delta, weight, total, scale, normed, width, eps=eps, BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
        return total, scale, normed

    @torch.library.triton_op("ingot::norm_backward", mutates_args={})
    def _norm_backward(
        x: Tensor, scale: Tensor, weight: Tensor, grad_normed: Tensor, grad_x: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows, width = x.shape
        programs = min(rows, _NORM_PROGRAMS)
        out = torch.empty_like(x)
        partial = x.new_empty((programs, width), dtype=torch.float32)
        block = triton.next_power_of_2(width)
        torch.library.wrap_triton(_norm_backward_kernel)[(programs,)](
            x, scale, weight, grad_normed, grad_x, out, partial, rows, width, BLOCK=block,
            num_warps=min(16, max(1, block // 256)),
        )  # fmt: skip
        return out, partial

    @torch.library.triton_op("ingot::loss_and_gradient_", mutates_args={"logits"})
    def loss_and_gradient_(logits: Tensor, targets: Tensor, z_loss: float, ignore: int) -> Tensor:
        """Each token's loss, (tokens,), fp32; the logits, (tokens, vocab), become the gradient of their sum."""
        tokens, vocab = logits.shape
        losses = logits.new_empty(tokens, dtype=torch.float32)
        torch.library.wrap_triton(_loss_kernel)[(tokens,)](
            logits, targets, losses, vocab, z_loss=z_loss, ignore=ignore,
            BLOCK=min(8192, triton.next_power_of_2(vocab)), num_warps=32 if vocab > 4096 else 4,
        )  # fmt: skip
        return losses
