"""A Llama-class decoder (Touvron et al. 2023): pre-RMSNorm, rotary embedding, grouped-query attention, SwiGLU.

Parallelism and precision are applied from outside (`models.parallel`); this file is plain PyTorch.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models import float8
from models.attention import DocumentMask, causal_attention, document_mask
from models.config import ModelConfig, RopeScaling
from models.kernels import add_norm, on_gpu, rotate_half, split_and_rotate, swiglu
from models.loss import Reduction, cross_entropy
from models.widths import initial_std, output_multiplier

if TYPE_CHECKING:
    from models.hugging_face import StoredTensor


class Linear(nn.Linear):
    """A matrix without bias whose values are set by `Transformer.init_weights` alone."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def reset_parameters(self) -> None:
        """Leave the memory as it is: initialising a billion weights twice takes tens of seconds."""


def joinable(x: Tensor, *linears: Linear) -> bool:
    """Whether matrices that read the same input are joined, so that they are one product.

    It pays in training on a GPU: the input is read once, its gradient is one product instead of several and their
    sum, and joining is part of the cast to the compute dtype. Matrices that are split over workers stay apart.
    """
    return x.is_cuda and torch.is_grad_enabled() and not any(isinstance(m.weight, DTensor) for m in linears)


def joined(x: Tensor, *linears: Linear) -> Tensor:
    """The results of several matrices side by side, (..., sum of d_out), of one input, (..., d_in)."""
    kind = x.device.type
    x = x.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype)
    return _Joined.apply(x, *(linear.weight for linear in linears))


class _Joined(torch.autograd.Function):
    """What autocast does, but weights' gradients leave the product in fp32, not rounded, and need no pass to cast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        weight = torch.cat([w.to(x.dtype) for w in weights])
        ctx.save_for_backward(x, weight)
        ctx.sizes, ctx.dtype = [len(w) for w in weights], weights[0].dtype
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        rows, inputs = grad.flatten(0, -2), x.flatten(0, -2)
        if x.is_cuda and ctx.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16):
            of_weights = torch.mm(rows.t(), inputs, out_dtype=torch.float32)
        else:
            of_weights = (rows.t() @ inputs).to(ctx.dtype)
        return (rows @ weight).view_as(x), *of_weights.split(ctx.sizes)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, (..., dim); the result has x's dtype."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)

    def add(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The sum x + delta, and that normalised; on a GPU as one pass."""
        if on_gpu(x, self.weight):
            return add_norm(x, delta, self.weight, self.eps)
        x = x + delta
        return x, self(x)


def rotary_table(head_dim: int, length: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Cosines and sines of the rotary embedding (Su et al. 2021).

    Returns:
        (2, length, head_dim / 2), fp32: cosines, then sines, of position · theta^(-2i / head_dim), or of what `scaling`
        makes of these frequencies.
    """
    frequencies = _frequencies(head_dim, theta)
    if scaling is not None:
        frequencies = _stretched(frequencies, scaling)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()])


def frequency_factors(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """What `scaling` divides each rotary frequency by, (head_dim / 2,), fp32."""
    frequencies = _frequencies(head_dim, theta)
    return frequencies / _stretched(frequencies, scaling)


def _frequencies(head_dim: int, theta: float) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def _stretched(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Rotary frequencies for longer sequences, as Llama 3.1 has them (Grattafiori et al. 2024, section 3.4.2)."""
    length, low, high = scaling.original_max_seq_len, scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    kept = (length / wavelengths - low) / (high - low)  # 0 where the whole factor applies, 1 where none does
    between = (1 - kept) * frequencies / scaling.factor + kept * frequencies
    scaled = torch.where(wavelengths > length / low, frequencies / scaling.factor, between)
    return torch.where(wavelengths < length / high, frequencies, scaled)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn each pair (i, i + head_dim/2) of x by its position's angle: the half-split layout of Hugging Face's Llama.

    Args:
        x: (batch, T, heads, head_dim).
        rotary: (2, T, head_dim / 2), rows of `rotary_table` for these T positions.
    """
    return rotate_half(x, *rotary.unsqueeze(2))


class Attention(nn.Module):
    """Causal self-attention with `n_kv_heads` shared key and value heads (Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.attend = causal_attention
        kv_dim = config.n_kv_heads * config.head_dim
        self.w_q = Linear(config.d_model, config.q_dim)
        self.w_k = Linear(config.d_model, kv_dim)
        self.w_v = Linear(config.d_model, kv_dim)
        self.w_o = Linear(config.q_dim, config.d_model)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        rotary: Tensor,
        mask: DocumentMask | None = None,
        length: Tensor | None = None,
    ) -> Tensor:
        """Attend within x, (B, T, d_model), where `mask` allows it.

        With `length`, which the rows of x do not exceed, matrix products are in fp8.
        """
        matrices = (self.w_q, self.w_k, self.w_v)
        sizes = [len(matrix.weight) for matrix in matrices]
        together = None
        if length is not None:
            together = float8.linear(x, length, *(matrix.weight for matrix in matrices))
        elif joinable(x, *matrices):
            together = joined(x, *matrices)
        if together is not None and not self.qk_norm:
            q, k, v = split_and_rotate(together, rotary, sizes[0] // self.head_dim, sizes[1] // self.head_dim)
        else:
            parts = [w(x) for w in matrices] if together is None else together.split(sizes, dim=-1)
            q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
            if self.qk_norm:
                q, k = self.q_norm(q), self.k_norm(k)
            q, k = rotate(q, rotary), rotate(k, rotary)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mixed = self.attend(q, k, v, mask).transpose(1, 2).flatten(2)
        if length is None:
            return joined(mixed, self.w_o) if joinable(mixed, self.w_o) else self.w_o(mixed)
        # attention averages values, which are no larger than the longest row of w_v makes them
        return float8.linear(mixed, length * float8.longest_row(self.w_v.weight), self.w_o.weight)


class FeedForward(nn.Module):
    """SwiGLU: w_down(silu(w_gate x) · w_up x) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w_gate = Linear(config.d_model, config.d_ff)
        self.w_up = Linear(config.d_model, config.d_ff)
        self.w_down = Linear(config.d_ff, config.d_model)

    def forward(self, x: Tensor, length: Tensor | None = None) -> Tensor:
        """Map x, (B, T, d_model), to the same shape; with `length`, which its rows do not exceed, in fp8."""
        if length is not None:
            return float8.feed_forward(x, length, self.w_gate.weight, self.w_up.weight, self.w_down.weight)
        if joinable(x, self.w_gate, self.w_up):
            return joined(swiglu(joined(x, self.w_gate, self.w_up)), self.w_down)
        return self.w_down(F.silu(self.w_gate(x)) * self.w_up(x))


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.float8 = False  # set by models.float8.convert

    def forward(
        self,
        x: Tensor,
        delta: Tensor,
        rotary: Tensor,
        mask: DocumentMask | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Map the residual stream, which is x + delta, (B, T, d_model) each, to one of the same form.

        A sum is left to the norm that reads it, which does both in one pass over memory.
        """
        # in fp8 to train, but not to validate: what counts is the model that is exported
        in_float8 = self.float8 and torch.is_grad_enabled()
        lengths = [float8.length_bound(n.weight) if in_float8 else None for n in (self.attention_norm, self.ffn_norm)]
        x, normed = self.attention_norm.add(x, delta)
        x, normed = self.ffn_norm.add(x, self.attention(normed, rotary, mask, lengths[0]))
        return x, self.feed_forward(normed, lengths[1])


class Transformer(nn.Module):
    """Token ids to logits, or to the loss.

    Args:
        config: the shape; validated here.
        seed: of the initial weights; None leaves the matrices' memory as it is, for weights that are loaded next.

    Attributes:
        compute_dtype: dtype of matrix products and of the residual stream, by autocast; None is the weights' own.
            Set by `models.parallel.parallelize`.
        z_loss: weight of the squared log-normalizer in the loss's gradient, see `models.loss.cross_entropy`.
    """

    rotary: Tensor

    def __init__(self, config: ModelConfig, seed: int | None = 0):
        super().__init__()
        config.validate()
        self.config = config
        self.tok_embeddings = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.d_model), freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.output = Linear(config.d_model, config.vocab_size)
        if config.tied_embeddings:
            self.output.weight = self.tok_embeddings.weight
        # fp32 and computed, so neither cast with the weights nor saved with them
        self.register_buffer("rotary", self._rotary_table(), persistent=False)
        self.compute_dtype: torch.dtype | None = None
        self.output_multiplier = output_multiplier(config)
        self.loss = cross_entropy
        self.z_loss = 0.0
        if seed is not None:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal with the standard deviations of `models.widths`; norms are 1.

        Each matrix is drawn as a whole on its device, from a generator of its own, and this worker's part kept: weights
        are equal for a seed on devices of a kind however they are sharded, and one matrix at a time is whole.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0)
                continue
            name_hash = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
            generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(name_hash, "little"))
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            whole.normal_(0.0, initial_std(self.config, name), generator=generator)
            _local(parameter).copy_(_part(whole, parameter))
        self.rotary.copy_(self._rotary_table())

    @torch.no_grad()
    def read_weights(self, stored: Mapping[str, "StoredTensor"]) -> None:
        """Take weights from files: of each this worker reads its part alone, one after another.

        Args:
            stored: by parameter name, such as `models.hugging_face.Pretrained.tensors`.
        """
        for name, parameter in self.named_parameters():
            _local(parameter).copy_(_part(stored[name], parameter).read())
        self.rotary.copy_(self._rotary_table())

    def _rotary_table(self) -> Tensor:
        config = self.config
        return rotary_table(config.head_dim, config.max_seq_len, config.rope_theta, config.rope_scaling)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: Reduction = "mean",
        loss_chunk: int | None = None,
        start: int = 0,
        documents: Tensor | None = None,
        token_losses: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or the loss when there are targets.

        The loss is computed in here, not by the caller, because only inside forward does FSDP hold the whole
        output matrix.

        Args:
            tokens: ids, (B, T), int64.
            targets: the token that follows each, (B, T), int64; -100 is ignored.
            reduction: of the loss: "mean", "sum" or "none".
            loss_chunk: tokens whose logits exist at one time; None suits the device.
            start: position of the first token, where others come before it (context parallel).
            documents: which document each token belongs to, (B, T), int32, see `models.attention.document_index`:
                attention stays within documents. None is plain causal attention, which is faster.
            token_losses: return each token's loss too, (B, T), fp32, without gradient.

        Returns:
            Logits (B, T, vocab) in the compute dtype; or the loss in nats, fp32, a scalar or (B, T) for "none"; or a
            pair of that and the tokens' losses.

        Raises:
            ValueError: the sequence is longer than max_seq_len.
        """
        stop = start + tokens.shape[1]
        if stop > self.config.max_seq_len:
            raise ValueError(f"the sequence has {stop} tokens, but model.max_seq_len is {self.config.max_seq_len}")
        rotary = self.rotary[:, start:stop]
        mask = None if documents is None else document_mask(documents)
        dtype = self.compute_dtype
        with torch.autocast(tokens.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            x, delta = self.embed(tokens)
            for block in self.layers:
                x, delta = block(x, delta, rotary, mask)
            if targets is None:
                return self.output(self.last_norm(x, delta))
            loss = self.loss_of(x, delta, targets.flatten(), loss_chunk, reduction, token_losses)
        loss, *losses = loss if token_losses else (loss,)
        loss = loss.view(targets.shape) if reduction == "none" else loss
        return (loss, losses[0].view(targets.shape)) if token_losses else loss

    def embed(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream that the first block reads, as two halves, so that it is in the form of the others'."""
        x = self.tok_embeddings(tokens)
        if self.compute_dtype is not None:
            x = x.to(self.compute_dtype)
        half = x * 0.5  # exact
        return half, x - half

    def last_norm(self, x: Tensor, delta: Tensor) -> Tensor:
        """What the output layer reads, (B, T, d_model)."""
        _, x = self.norm.add(x, delta)
        return x if self.output_multiplier == 1 else x * self.output_multiplier  # muP

    def loss_of(
        self, x: Tensor, delta: Tensor, targets: Tensor, chunk: int | None, reduction: Reduction, token_losses: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`models.loss.cross_entropy` of the last block's result."""
        return self.loss(
            self.last_norm(x, delta).flatten(0, 1), self.output.weight, targets, chunk=chunk, reduction=reduction,
            z_loss=self.z_loss, token_losses=token_losses,
        )  # fmt: skip


def _local(parameter: Tensor) -> Tensor:
    """What this worker holds of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


Whole = TypeVar("Whole", Tensor, "StoredTensor")


def _part(whole: Whole, parameter: Tensor) -> Whole:
    """Of a tensor, what this worker holds of a parameter of its shape."""
    if not isinstance(parameter, DTensor):
        return whole
    # FSDP2 cuts what tensor parallelism has cut already, and stands before it in the mesh: so the last is first
    mesh = parameter.device_mesh
    for dimension, placement in reversed(list(enumerate(parameter.placements))):
        if not placement.is_replicate():
            size = -(-whole.shape[placement.dim] // mesh.size(dimension))
            first = min(mesh.get_local_rank(dimension) * size, whole.shape[placement.dim])
            whole = whole.narrow(placement.dim, first, min(size, whole.shape[placement.dim] - first))
    return whole
