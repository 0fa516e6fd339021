"""A Llama-class decoder (Touvron et al. 2023): pre-RMSNorm, rotary embedding, grouped-query attention, SwiGLU.

Parallelism and precision are applied from outside (`models.parallel`); this file is plain PyTorch.
"""

import hashlib
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.attention import causal_attention
from models.config import ModelConfig
from models.loss import Reduction, cross_entropy
from models.widths import initial_std, output_multiplier

if TYPE_CHECKING:
    from models.generate import KVCache, LayerCache


class Linear(nn.Linear):
    """A matrix without bias whose values are set by `Transformer.init_weights` alone."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def reset_parameters(self) -> None:
        """Leave the memory as it is: initialising a billion weights twice takes tens of seconds."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, (..., dim); the result has x's dtype."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def rotary_table(head_dim: int, length: int, theta: float) -> Tensor:
    """Cosines and sines of the rotary embedding (Su et al. 2021).

    Returns:
        (2, length, head_dim / 2), fp32: cosines, then sines, of position · theta^(-2i / head_dim).
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn each pair (i, i + head_dim/2) of x by its position's angle: the half-split layout of Hugging Face's Llama.

    Args:
        x: (batch, T, heads, head_dim).
        rotary: (2, T, head_dim / 2), rows of `rotary_table` for these T positions.
    """
    cos, sin = rotary.unsqueeze(2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with `n_kv_heads` shared key and value heads (Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.attend = causal_attention
        kv_dim = config.n_kv_heads * config.head_dim
        self.w_q = Linear(config.d_model, config.d_model)
        self.w_k = Linear(config.d_model, kv_dim)
        self.w_v = Linear(config.d_model, kv_dim)
        self.w_o = Linear(config.d_model, config.d_model)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, rotary: Tensor, cache: "LayerCache | None" = None) -> Tensor:
        """Attend within x, (B, T, d_model), and to what `cache` holds."""
        shape = (*x.shape[:2], -1, self.head_dim)
        q, k, v = self.w_q(x).view(shape), self.w_k(x).view(shape), self.w_v(x).view(shape)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = rotate(q, rotary).transpose(1, 2), rotate(k, rotary).transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(k, v)
        return self.w_o(self.attend(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: w_down(silu(w_gate x) · w_up x) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w_gate = Linear(config.d_model, config.d_ff)
        self.w_up = Linear(config.d_model, config.d_ff)
        self.w_down = Linear(config.d_ff, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Map x, (B, T, d_model), to the same shape."""
        return self.w_down(F.silu(self.w_gate(x)) * self.w_up(x))


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, rotary: Tensor, cache: "LayerCache | None" = None) -> Tensor:
        """Map the residual stream x, (B, T, d_model), to the same shape."""
        x = x + self.attention(self.attention_norm(x), rotary, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """Token ids to logits, or to the loss.

    Args:
        config: the shape; validated here.
        seed: of the initial weights; None leaves the matrices' memory as it is, for weights that are loaded next.

    Attributes:
        compute_dtype: dtype of matrix products and of the residual stream, by autocast; None is the weights' own.
            Set by `models.parallel.parallelize`.
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
        table = rotary_table(config.head_dim, config.max_seq_len, config.rope_theta)
        self.register_buffer("rotary", table, persistent=False)
        self.compute_dtype: torch.dtype | None = None
        self.output_multiplier = output_multiplier(config)
        self.loss = cross_entropy
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
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.copy_(_part(whole, parameter))
        config = self.config
        self.rotary.copy_(rotary_table(config.head_dim, config.max_seq_len, config.rope_theta))

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        cache: "KVCache | None" = None,
        positions: Tensor | None = None,
        reduction: Reduction = "mean",
        loss_chunk: int | None = None,
        start: int = 0,
    ) -> Tensor:
        """Logits, or the loss when there are targets.

        The loss is computed in here, not by the caller, because only inside forward does FSDP hold the whole
        output matrix.

        Args:
            tokens: ids, (B, T), int64.
            targets: the token that follows each, (B, T), int64; -100 is ignored.
            cache: keys and values of the positions before these tokens; extended by them.
            positions: one place in each sequence, (B,), int64: logits are made of these alone.
            reduction: of the loss: "mean", "sum" or "none".
            loss_chunk: tokens whose logits exist at one time; None suits the device.
            start: position of the first token, where others come before it (context parallel).

        Returns:
            Logits (B, T, vocab), or (B, vocab) at `positions`, in the compute dtype; or the loss in nats, fp32, a
            scalar or (B, T) for "none".

        Raises:
            ValueError: the sequence, with what is cached, is longer than max_seq_len; or both targets and positions
                are given.
        """
        if targets is not None and positions is not None:
            raise ValueError("positions choose logits, but with targets the loss of all positions is computed")
        start = start if cache is None else cache.length
        stop = start + tokens.shape[1]
        if stop > self.config.max_seq_len:
            raise ValueError(f"the sequence has {stop} tokens, but model.max_seq_len is {self.config.max_seq_len}")
        rotary = self.rotary[:, start:stop]
        dtype = self.compute_dtype
        with torch.autocast(tokens.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            x = self.tok_embeddings(tokens)
            if dtype is not None:
                x = x.to(dtype)
            for i, block in enumerate(self.layers):
                x = block(x, rotary, None if cache is None else cache.layers[i])
            x = self.norm(x)
            if self.output_multiplier != 1:  # muP
                x = x * self.output_multiplier
            if positions is not None:
                x = x[torch.arange(len(x), device=x.device), positions]
            if targets is None:
                return self.output(x)
            loss = self.loss(
                x.flatten(0, 1), self.output.weight, targets.flatten(), chunk=loss_chunk, reduction=reduction
            )
        return loss.view(targets.shape) if reduction == "none" else loss


def _part(whole: Tensor, parameter: Tensor) -> Tensor:
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
