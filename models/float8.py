"""Matrix products of the blocks in fp8 (Micikevicius et al. 2022), on torch._scaled_mm; attention and the head are not.

Weights stay fp32 masters. Weights and activations are rounded to e4m3, gradients to e5m2, with one scale for each
tensor, a power of two. What a scale has to do is to keep values from overflowing: as these formats are floating, a
tensor that lies a few powers of two lower keeps its relative precision. So activations, whose largest value would take
another pass over memory to find, get their scales from bounds that follow from the weights: a normalised vector is no
longer than sqrt(d_model) times the norm's largest weight, what a matrix makes of it no larger than that times the
longest row (Cauchy-Schwarz), and attention only averages values. Scales therefore depend neither on the data nor on the
history, and a resumed run, or one on other workers, computes the same.

On Hopper the products want both operands to be contiguous along the summed dimension, so each tensor is rounded
together with its transpose, in one pass. Without CUDA the same values are computed by rounding to fp8 and multiplying
in fp32: slow, but enough to test with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from models.kernels import on_gpu

if TYPE_CHECKING:
    from models.transformer import Transformer

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for the CPU comes without
    triton = None

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_LARGEST = {E4M3: 448.0, E5M2: 57344.0}
# Where a gradient's largest value is put: what follows from it may be larger by the rest, or smaller by 2^22, and keep
# its precision.
_GRADIENT_TOP = 256.0


def convert(model: Transformer) -> None:
    """Have the linear layers of the model's blocks compute in fp8 when it is trained; names and weights stay.

    Raises:
        ValueError: a dimension is not a multiple of 16, which the products need.
    """
    config = model.config
    for name in ("d_model", "d_ff"):
        if getattr(config, name) % 16:
            raise ValueError(f"model.{name} is {getattr(config, name)}, but fp8 needs a multiple of 16")
    for heads in ("n_heads", "n_kv_heads"):
        if (width := getattr(config, heads) * config.head_dim) % 16:
            raise ValueError(f"{heads} · head_dim is {width}, not a multiple of 16 (fp8)")
    for block in model.layers:
        block.float8 = True


# Bounds


def longest_row(weight: Tensor) -> Tensor:
    """The largest 2-norm of a row, a scalar, fp32."""
    return _row_lengths(weight).amax()


def _row_lengths(weight: Tensor) -> Tensor:
    return weight.detach().float().square().sum(1).sqrt()


def length_bound(norm_weight: Tensor) -> Tensor:
    """The largest 2-norm that a row has after RMSNorm, a scalar, fp32; also the largest value."""
    return norm_weight.detach().float().abs().amax() * norm_weight.numel() ** 0.5


def swiglu_bound(length: Tensor, w_gate: Tensor, w_up: Tensor) -> Tensor:
    """What silu(w_gate x) · w_up x does not exceed, for x of this length, a scalar, fp32.

    A quarter of what Cauchy-Schwarz allows, for which a row of both matrices would have to be x's direction.
    """
    return length.square() * (_row_lengths(w_gate) * _row_lengths(w_up)).amax() / 4


def _scale(largest: Tensor, target: float) -> Tensor:
    """The power of two that brings `largest` to at most `target`, a scalar, fp32."""
    return torch.exp2(torch.floor(torch.log2(target / largest.float().clamp(min=2.0**-80))))


# Layers


def linear(x: Tensor, bound: Tensor, *weights: Tensor) -> Tensor:
    """The products of x and each weight, (d_out, d_in), transposed, side by side, (..., sum of d_out), in x's dtype.

    Args:
        x: (..., d_in).
        bound: what x's values do not exceed; those that do are clipped.
        weights: of any float dtype; their gradients are fp32 sums rounded once.
    """
    return _Linear.apply(_checked(x), bound, *weights)


def feed_forward(x: Tensor, length: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """SwiGLU with all three matrices; x (..., d_model), of rows no longer than `length`."""
    x = _checked(x)
    return _FeedForward.apply(x, length, swiglu_bound(length, w_gate, w_up), w_gate, w_up, w_down)


def _checked(x: Tensor) -> Tensor:
    if x.is_cuda and x[..., 0].numel() % 16:
        raise ValueError(f"a microbatch has {x[..., 0].numel()} tokens, but with fp8 it has to be a multiple of 16")
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: Tensor, *weights: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        x_scale, w_scale = _scale(bound, _LARGEST[E4M3]), _weight_scale(*weights)
        x8, x8_t = _round(rows, x_scale, E4M3)
        w8, w8_t = _round_joined(weights, w_scale)
        ctx.save_for_backward(x8_t, w8_t, x_scale, w_scale)
        ctx.weights = [(len(w), w.dtype) for w in weights]
        return _product(x8, w8, x_scale, w_scale, x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x8_t, w8_t, x_scale, w_scale = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        g_scale = _scale(rows.abs().amax(), _GRADIENT_TOP)
        g8, g8_t = _round(rows, g_scale, E5M2)
        grad_x = _product(g8, w8_t, g_scale, w_scale, grad.dtype).view(*grad.shape[:-1], -1)
        grads = _sum_over_tokens(g8_t, x8_t, g_scale, x_scale, _gradient_dtype(ctx.weights))
        grads = grads.split([n for n, _ in ctx.weights])
        return grad_x, None, *(g.to(dtype) for g, (_, dtype) in zip(grads, ctx.weights, strict=True))


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, length: Tensor, hidden: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor
    ) -> Tensor:
        rows = x.flatten(0, -2)
        x_scale, h_scale = (_scale(bound, _LARGEST[E4M3]) for bound in (length, hidden))
        in_scale, out_scale = _weight_scale(w_gate, w_up), _weight_scale(w_down)
        x8, x8_t = _round(rows, x_scale, E4M3)
        in8, in8_t = _round_joined((w_gate, w_up), in_scale)
        gate_up = _product(x8, in8, x_scale, in_scale, x.dtype)
        h8, h8_t = _round_swiglu(gate_up, h_scale)
        out8, out8_t = _round_joined((w_down,), out_scale)
        ctx.save_for_backward(x8_t, in8_t, gate_up, h8_t, out8_t, x_scale, h_scale, in_scale, out_scale)
        ctx.weights = [(len(w), w.dtype) for w in (w_gate, w_up, w_down)]
        return _product(h8, out8, h_scale, out_scale, x.dtype).view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x8_t, in8_t, gate_up, h8_t, out8_t, x_scale, h_scale, in_scale, out_scale = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        # the same scale serves the gradient before the nonlinearity, for which e5m2 has range enough
        g_scale = _scale(rows.abs().amax(), _GRADIENT_TOP)
        g8, g8_t = _round(rows, g_scale, E5M2)
        dtype = _gradient_dtype(ctx.weights)
        grad_down = _sum_over_tokens(g8_t, h8_t, g_scale, h_scale, dtype)
        grad_hidden = _product(g8, out8_t, g_scale, out_scale, grad.dtype)
        g8, g8_t = _round_swiglu_backward(gate_up, grad_hidden, g_scale)
        grad_x = _product(g8, in8_t, g_scale, in_scale, grad.dtype).view_as(grad)
        grads = _sum_over_tokens(g8_t, x8_t, g_scale, x_scale, dtype).split([n for n, _ in ctx.weights[:2]])
        grads = (g.to(dtype) for g, (_, dtype) in zip((*grads, grad_down), ctx.weights, strict=True))
        return grad_x, None, None, *grads


def _gradient_dtype(weights: list[tuple[int, torch.dtype]]) -> torch.dtype:
    return weights[0][1]


def _weight_scale(*weights: Tensor) -> Tensor:
    # by rows first: a compiler makes that one pass over a matrix together with the lengths of its rows
    return _scale(torch.stack([w.float().abs().amax(1).amax() for w in weights]).amax(), 256.0)


# Rounding and products


def _product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool = True) -> Tensor:
    """a, (m, k), times the transpose of b, (n, k), without their scales; fast keeps sums in fewer bits on the way."""
    if a.is_cuda:
        return torch._scaled_mm(
            a, b.t(), scale_a=1 / a_scale, scale_b=1 / b_scale, out_dtype=dtype, use_fast_accum=fast
        )
    return ((a.float() @ b.float().t()) / (a_scale * b_scale)).to(dtype)


def _sum_over_tokens(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`_product` with all tokens of a microbatch as k.

    Hopper's fast sums keep some 14 bits on the way (DeepSeek-AI 2024, section 3.3.2), too few for that many.
    """
    return _product(a, b, a_scale, b_scale, dtype, fast=False)


def _round(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What x · scale, (m, n), is in fp8, and its transpose."""
    if on_gpu(x):
        return _cast(x if x.stride(1) == 1 else x.contiguous(), scale, dtype)
    return _both(x.float() * scale, dtype)


def _round_joined(weights: tuple[Tensor, ...], scale: Tensor) -> tuple[Tensor, Tensor]:
    """Weights below each other, times scale, in e4m3, and their transpose."""
    if on_gpu(*weights):
        return _cast_joined(list(weights), scale)
    return _both(torch.cat([w.float() for w in weights]) * scale, E4M3)


def _round_swiglu(gate_up: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """SwiGLU of (m, 2·n), times scale, in e4m3, and its transpose."""
    if on_gpu(gate_up):
        return _cast_swiglu(gate_up, scale)
    gate, up = gate_up.float().chunk(2, dim=1)
    return _both(F.silu(gate) * up * scale, E4M3)


def _round_swiglu_backward(gate_up: Tensor, grad: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of (m, 2·n) by SwiGLU's, (m, n), times scale, in e5m2, and its transpose."""
    if on_gpu(gate_up):
        return _cast_swiglu_backward(gate_up, grad, scale)
    gate, up = gate_up.float().chunk(2, dim=1)
    sigmoid = gate.sigmoid()
    grad_gate = grad.float() * up * sigmoid * (1 + gate * (1 - sigmoid))
    return _both(torch.cat([grad_gate, grad.float() * gate * sigmoid], dim=1) * scale, E5M2)


def _both(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rounded = x.clamp(-_LARGEST[dtype], _LARGEST[dtype]).to(dtype)
    return rounded, rounded.t().contiguous()


if triton is not None:
    # The kernels work on pairs of neighbouring rows: two values in fp8 make the 16 bits that are turned. With Triton
    # 3.6, values of 8 bits that were turned, or stored and packed too, came out in a wrong order.

    @triton.jit
    def _at(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # noqa: N803
        pair = tl.program_id(1).to(tl.int64) * (ROWS // 2) + tl.arange(0, ROWS // 2)
        column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        return pair, column, (pair < rows // 2)[:, None] & (column < columns)[None, :]

    @triton.jit
    def _read(pointer, row, column, inside, stride):
        value = tl.load(pointer + row[:, None] * stride + column[None, :], mask=inside, other=0.0)
        return value.to(tl.float32)

    @triton.jit
    def _store_both(first, second, out, out_t, pair, column, inside, stride, stride_t, IS_E4M3: tl.constexpr):  # noqa: N803
        # the conversion saturates, and keeps what is not a number
        at = out + pair[:, None] * (2 * stride) + column[None, :]
        tl.store(at, first.to(out.dtype.element_ty), mask=inside)
        tl.store(at + stride, second.to(out.dtype.element_ty), mask=inside)
        if IS_E4M3:
            both = tl.inline_asm_elementwise(
                "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;", "=h,f,f", [first, second], tl.uint16, is_pure=True, pack=1
            )
        else:
            both = tl.inline_asm_elementwise(
                "cvt.rn.satfinite.e5m2x2.f32 $0, $2, $1;", "=h,f,f", [first, second], tl.uint16, is_pure=True, pack=1
            )
        at = out_t.to(tl.pointer_type(tl.uint16)) + column[:, None] * (stride_t // 2) + pair[None, :]
        tl.store(at, tl.trans(both), mask=tl.trans(inside))

    @triton.jit
    def _cast_kernel(
        x, scale, out, out_t, rows, columns, x_stride, stride, stride_t, start,
        IS_E4M3: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        pair, column, inside = _at(rows, columns, ROWS, COLUMNS)
        s = tl.load(scale)
        first = _read(x, 2 * pair, column, inside, x_stride) * s
        second = _read(x, 2 * pair + 1, column, inside, x_stride) * s
        _store_both(first, second, out, out_t, pair + start // 2, column, inside, stride, stride_t, IS_E4M3)

    @triton.jit
    def _swiglu(gate_up, row, column, inside, columns):
        gate = _read(gate_up, row, column, inside, 2 * columns)
        return gate * tl.sigmoid(gate) * _read(gate_up, row, column + columns, inside, 2 * columns)

    @triton.jit
    def _swiglu_kernel(
        gate_up, scale, out, out_t, rows, columns,
        IS_E4M3: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        pair, column, inside = _at(rows, columns, ROWS, COLUMNS)
        s = tl.load(scale)
        first = _swiglu(gate_up, 2 * pair, column, inside, columns) * s
        second = _swiglu(gate_up, 2 * pair + 1, column, inside, columns) * s
        _store_both(first, second, out, out_t, pair, column, inside, columns, rows, IS_E4M3)

    @triton.jit
    def _swiglu_gradients(gate_up, grad, s, row, column, inside, columns):
        gate = _read(gate_up, row, column, inside, 2 * columns)
        up = _read(gate_up, row, column + columns, inside, 2 * columns)
        g = _read(grad, row, column, inside, columns) * s
        sigmoid = tl.sigmoid(gate)
        return g * up * sigmoid * (1 + gate * (1 - sigmoid)), g * gate * sigmoid

    @triton.jit
    def _swiglu_backward_kernel(
        gate_up, grad, scale, out, out_t, rows, columns,
        IS_E4M3: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        pair, column, inside = _at(rows, columns, ROWS, COLUMNS)
        s = tl.load(scale)
        gate, up = _swiglu_gradients(gate_up, grad, s, 2 * pair, column, inside, columns)
        gate_2, up_2 = _swiglu_gradients(gate_up, grad, s, 2 * pair + 1, column, inside, columns)
        _store_both(gate, gate_2, out, out_t, pair, column, inside, 2 * columns, rows, IS_E4M3)
        _store_both(up, up_2, out, out_t, pair, column + columns, inside, 2 * columns, rows, IS_E4M3)

    def _launch(kernel: Any, rows: int, columns: int, *arguments: Any, dtype: torch.dtype, tile: int) -> None:
        grid = (triton.cdiv(columns, tile), triton.cdiv(rows, 128))
        torch.library.wrap_triton(kernel)[grid](*arguments, IS_E4M3=dtype == E4M3, ROWS=128, COLUMNS=tile, num_warps=8)

    @torch.library.triton_op("ingot::cast_float8", mutates_args={})
    def _cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rows, columns = x.shape
        out, out_t = x.new_empty((rows, columns), dtype=dtype), x.new_empty((columns, rows), dtype=dtype)
        _launch(
            _cast_kernel, rows, columns, x, scale, out, out_t, rows, columns, x.stride(0), columns, rows, 0,
            dtype=dtype, tile=128,
        )  # fmt: skip
        return out, out_t

    @torch.library.triton_op("ingot::cast_joined_float8", mutates_args={})
    def _cast_joined(weights: list[Tensor], scale: Tensor) -> tuple[Tensor, Tensor]:
        columns, total = weights[0].shape[1], sum(w.shape[0] for w in weights)
        out = weights[0].new_empty((total, columns), dtype=E4M3)
        out_t = weights[0].new_empty((columns, total), dtype=E4M3)
        start = 0  # a number, not a view of the results: a compiler that copies what is written would lose its strides
        for weight in weights:
            rows = weight.shape[0]
            _launch(
                _cast_kernel, rows, columns, weight, scale, out, out_t, rows, columns, weight.stride(0), columns,
                total, start, dtype=E4M3, tile=128,
            )  # fmt: skip
            start += rows
        return out, out_t

    @torch.library.triton_op("ingot::swiglu_float8", mutates_args={})
    def _cast_swiglu(gate_up: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
        out, out_t = gate_up.new_empty((rows, columns), dtype=E4M3), gate_up.new_empty((columns, rows), dtype=E4M3)
        _launch(_swiglu_kernel, rows, columns, gate_up, scale, out, out_t, rows, columns, dtype=E4M3, tile=64)
        return out, out_t

    @torch.library.triton_op("ingot::swiglu_backward_float8", mutates_args={})
    def _cast_swiglu_backward(gate_up: Tensor, grad: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = grad.shape
        out, out_t = gate_up.new_empty(gate_up.shape, dtype=E5M2), gate_up.new_empty((2 * columns, rows), dtype=E5M2)
        _launch(
            _swiglu_backward_kernel, rows, columns, gate_up, grad, scale, out, out_t, rows, columns,
            dtype=E5M2, tile=64,
        )  # fmt: skip
        return out, out_t
