"""What a model is and how it is optimised: shapes, presets, and the settings of the optimizer and of the learning rate.

Nothing heavy is imported here, so that `--help` stays quick.
"""

from dataclasses import dataclass
from typing import Literal


def _require(condition: bool, setting: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{setting} is {value!r}, but must be {allowed}")


@dataclass
class RopeScaling:
    """How the rotary frequencies were stretched for longer sequences, as Llama 3.1 has it (Grattafiori et al. 2024).

    Wavelengths above original_max_seq_len / low_freq_factor grow by `factor`, those below original_max_seq_len /
    high_freq_factor stay, and in between the frequency is interpolated.
    """

    factor: float
    """By how much the longest wavelengths grow."""
    low_freq_factor: float
    """Turns within the original length below which a frequency is divided by the whole factor."""
    high_freq_factor: float
    """Turns within the original length above which a frequency stays as it is."""
    original_max_seq_len: int
    """Longest sequence before the stretch, in tokens."""

    def validate(self) -> None:
        """Check the values.

        Raises:
            ValueError: with the setting's name, its value, and what is allowed.
        """
        low, high = self.low_freq_factor, self.high_freq_factor
        _require(self.factor >= 1, "model.rope_scaling.factor", self.factor, "at least 1")
        _require(
            0 < low < high, "model.rope_scaling.low_freq_factor", low, f"above 0 and below high_freq_factor {high}"
        )
        length = self.original_max_seq_len
        _require(length >= 1, "model.rope_scaling.original_max_seq_len", length, "at least 1")


@dataclass
class ModelConfig:
    """Shape of a Llama-class decoder (Touvron et al. 2023): pre-RMSNorm, rotary embedding, SwiGLU, no biases."""

    vocab_size: int = 4096
    """Tokens in the vocabulary; not less than the tokenizer's."""
    d_model: int = 128
    """Width of the residual stream."""
    n_layers: int = 4
    """Transformer blocks."""
    n_heads: int = 4
    """Query heads; each is d_model / n_heads wide."""
    n_kv_heads: int = 2
    """Key and value heads: n_heads is multi-head, 1 is multi-query, in between is grouped-query attention."""
    d_ff: int = 256
    """Width of the SwiGLU feed-forward layer."""
    max_seq_len: int = 512
    """Longest sequence, in tokens."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies; larger for longer sequences."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    qk_norm: bool = False
    """Normalise queries and keys per head before the rotation (exported as Qwen3 instead of Llama)."""
    tied_embeddings: bool = False
    """Use the token embedding as the output layer too."""
    base_width: int | None = None
    """d_model at which the learning rate was tuned: it then serves this width too (muP, `models.widths`); null is the
    standard parametrization."""
    head_width: int | None = None
    """Width of one attention head where it is not d_model / n_heads, as in many Qwen3 models; null is that."""
    rope_scaling: RopeScaling | None = None
    """Stretched rotary frequencies of a model that was made so; null is none."""

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, dict):  # read from JSON
            self.rope_scaling = RopeScaling(**self.rope_scaling)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads if self.head_width is None else self.head_width

    @property
    def q_dim(self) -> int:
        """Width of all query heads together."""
        return self.n_heads * self.head_dim

    def validate(self) -> None:
        """Check the shape.

        Raises:
            ValueError: with the setting's name, its value, and what is allowed.
        """
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "max_seq_len"):
            _require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "at least 1")
        _require(
            self.head_width is not None or self.d_model % self.n_heads == 0,
            "model.n_heads",
            self.n_heads,
            f"a divisor of d_model {self.d_model}",
        )
        _require(
            self.head_width is not None or self.head_dim % 2 == 0,
            "model.n_heads",
            self.n_heads,
            f"such that d_model / n_heads is even (rotary embedding turns pairs); d_model is {self.d_model}",
        )
        _require(self.head_dim >= 2 and self.head_dim % 2 == 0, "model.head_width", self.head_width, "even, or null")
        _require(
            self.n_heads % self.n_kv_heads == 0,
            "model.n_kv_heads",
            self.n_kv_heads,
            f"a divisor of n_heads {self.n_heads}",
        )
        _require(self.base_width is None or self.base_width >= 1, "model.base_width", self.base_width, "at least 1")
        _require(self.rope_theta > 0, "model.rope_theta", self.rope_theta, "above 0")
        _require(self.norm_eps > 0, "model.norm_eps", self.norm_eps, "above 0")
        if self.rope_scaling is not None:
            self.rope_scaling.validate()

    def _n_block_matmul_params(self) -> int:
        attention = 2 * self.d_model * self.q_dim + 2 * self.d_model * self.n_kv_heads * self.head_dim
        return attention + 3 * self.d_model * self.d_ff

    def n_matmul_params(self) -> int:
        """Weights that take part in a matrix product for every token: linear layers and the output head."""
        return self.n_layers * self._n_block_matmul_params() + self.vocab_size * self.d_model

    def n_params(self) -> int:
        """All trainable numbers; a tied embedding counts once."""
        norms = self.n_layers * 2 * self.d_model + self.d_model
        if self.qk_norm:
            norms += self.n_layers * 2 * self.head_dim
        embedding = 0 if self.tied_embeddings else self.vocab_size * self.d_model
        return self.n_matmul_params() + norms + embedding

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of one training step per token: 6·N + 12·L·H·Q·T.

        N is `n_matmul_params`, H·Q the heads' width, mostly d_model; attention is counted in full, not halved for
        causality, as PaLM does (Chowdhery et al. 2022, appendix B).
        """
        return 6 * self.n_matmul_params() + 12 * self.n_layers * self.q_dim * seq_len


PRESETS: dict[str, ModelConfig] = {
    # about a million parameters: trains on a laptop's CPU in minutes
    "nano": ModelConfig(
        vocab_size=4096, d_model=128, n_layers=4, n_heads=4, n_kv_heads=2, d_ff=256, max_seq_len=512,
        tied_embeddings=True,
    ),
    # the size of GPT-2 small
    "124m": ModelConfig(
        vocab_size=50304, d_model=768, n_layers=12, n_heads=12, n_kv_heads=12, d_ff=2048, max_seq_len=1024,
        tied_embeddings=True,
    ),
    # the size of GPT-2 medium, with heads of 128, the width that attention kernels like best
    "350m": ModelConfig(
        vocab_size=50304, d_model=1024, n_layers=24, n_heads=8, n_kv_heads=8, d_ff=2816, max_seq_len=2048,
        tied_embeddings=True,
    ),
    "1b": ModelConfig(
        vocab_size=32768, d_model=2048, n_layers=16, n_heads=32, n_kv_heads=8, d_ff=8192, max_seq_len=4096,
        rope_theta=500000.0,
    ),
    # the shape of Llama 3.2 3B
    "3b": ModelConfig(
        vocab_size=128256, d_model=3072, n_layers=28, n_heads=24, n_kv_heads=8, d_ff=8192, max_seq_len=8192,
        rope_theta=500000.0, tied_embeddings=True,
    ),
    # the shape of Llama 3 8B
    "8b": ModelConfig(
        vocab_size=128256, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, d_ff=14336, max_seq_len=8192,
        rope_theta=500000.0,
    ),
}  # fmt: skip
"""Shapes by name. Take one with `dataclasses.replace(PRESETS[name], ...)`: the entries are shared."""


@dataclass
class OptimizerConfig:
    """AdamW with decoupled weight decay (Loshchilov & Hutter 2019), or Muon (Jordan et al. 2024) with it."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon: matrices of the blocks by Muon, embedding, head and norms by AdamW; one learning rate suits both."""
    lr: float = 3e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW: decay of the running means of the gradient and of its square."""
    eps: float = 1e-8
    """AdamW: added to the denominator of the update."""
    momentum: float = 0.95
    """Muon: decay of the running mean of the gradient."""
    weight_decay: float = 0.1
    """Decay of linear layers' matrices per step, times the learning rate; norms and embeddings never decay."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient; 0 switches clipping off."""

    def validate(self) -> None:
        """Check the values.

        Raises:
            ValueError: with the setting's name, its value, and what is allowed.
        """
        _require(self.kind in ("adamw", "muon"), "optimizer.kind", self.kind, "adamw or muon")
        _require(self.lr > 0, "optimizer.lr", self.lr, "above 0")
        _require(all(0 <= beta < 1 for beta in self.betas), "optimizer.betas", self.betas, "two numbers in [0, 1)")
        _require(self.eps > 0, "optimizer.eps", self.eps, "above 0")
        _require(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "in [0, 1)")
        _require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "at least 0")
        _require(self.grad_clip >= 0, "optimizer.grad_clip", self.grad_clip, "at least 0 (0 is off)")


@dataclass
class ScheduleConfig:
    """How the learning rate moves: linear warmup, then a cosine, or a plateau and a decay."""

    kind: Literal["cosine", "wsd"] = "cosine"
    """cosine: falls to min_ratio over the whole run; wsd: warmup, stable, decay (Hu et al. 2024)."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly to its peak."""
    decay_fraction: float = 0.2
    """wsd only: the last part of the run, over which the learning rate falls."""
    decay: Literal["linear", "sqrt"] = "linear"
    """wsd only: how it falls; sqrt is 1 - sqrt(progress), which ended lowest in Hägele et al. 2024."""
    min_ratio: float = 0.1
    """Learning rate at the end, as a part of its peak."""
    over_steps: int | None = None
    """Steps over which it moves; null is all of the run's. A run that is to be gone on with from its end, such as a
    stretch between two comparisons of a sweep, gives the length of the whole."""

    def validate(self) -> None:
        """Check the values.

        Raises:
            ValueError: with the setting's name, its value, and what is allowed.
        """
        _require(self.kind in ("cosine", "wsd"), "schedule.kind", self.kind, "cosine or wsd")
        _require(self.warmup_steps >= 0, "schedule.warmup_steps", self.warmup_steps, "at least 0")
        _require(0 < self.decay_fraction <= 1, "schedule.decay_fraction", self.decay_fraction, "in (0, 1]")
        _require(self.decay in ("linear", "sqrt"), "schedule.decay", self.decay, "linear or sqrt")
        _require(0 <= self.min_ratio <= 1, "schedule.min_ratio", self.min_ratio, "in [0, 1]")
        over = self.over_steps
        _require(over is None or over >= 1, "schedule.over_steps", over, "at least 1, or null")
