"""Settings that carry over from a narrow model to a wide one: the maximal update parametrization (muP).

Yang et al. 2022, "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer". A learning
rate that was tuned at width ``base_width`` serves any ``d_model``, when everything else of the shape that grows with
the width grows in proportion: n_heads and n_kv_heads (the size of a head stays as it is) and d_ff. At
``d_model == base_width`` nothing differs from the standard parametrization. With m = d_model / base_width, and "1" for
what the standard parametrization has:

| parameters | initial std | learning rate, AdamW | learning rate, Muon | multiplier of the output |
|---|---|---|---|---|
| token embedding, tied or not | 1 | 1 | 1 (AdamW) | |
| matrices of the blocks | 1/√m | 1/m | 1/√m | |
| norm weights | 1 | 1 | 1 (AdamW) | |
| output head | 1 | 1 | 1 (AdamW) | 1/m |

- The columns for AdamW are table 8 of that paper, the form in which the head may be tied to the embedding.
- Attention logits: the paper divides by the head's size instead of its root. Heads of a fixed size need neither: the
  two differ by a constant. Whoever widens heads instead of adding some gets no transfer from this table.
- Weight decay: a step takes lr · weight_decay of a weight off, so the decay of each group is divided by the group's
  learning-rate scale. That makes the decay independent of the width (Wortsman et al. 2023, independent weight decay;
  Dey et al. 2025, table 1: λ grows as the learning rate shrinks).
- Epsilon: with the output divided by m, all gradients are smaller by 1/m, and Adam's epsilon has to follow, or it takes
  over in wide models (Yang et al. 2022, appendix B.3; Everett et al. 2024): eps/m, in all groups.
- Muon: an orthogonalized matrix has singular values of about 1 whatever its size, and √(fan_out/fan_in) times that is
  what feature learning asks for at any width (Yang, Simon & Bernstein 2023, condition 1), so Jordan's own scaling
  transfers by itself. Ours multiplies by 0.2·√max(fan_out, fan_in), to be as large as AdamW's updates (Liu et al.
  2025), and that grows as √m: hence 1/√m. The scale of gradients does not matter to it, so it has no epsilon to scale.
- Depth is not covered: only widths transfer. The 1/√(2·n_layers) of the matrices that write to the residual stream is
  part of the standard initialization. Neither are the batch size and the number of steps.

`tests/models/test_widths.py` has the coordinate check (the paper's appendix D.1), `tests/benchmarks/widths.py` finds
the best learning rate of several widths.
"""

import math
from typing import Literal, NamedTuple

from models.config import ModelConfig

STD = 0.02

Role = Literal["embedding", "matrix", "head", "norm"]


class Scales(NamedTuple):
    """Factors for the settings of one parameter's group."""

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


def role(name: str) -> Role:
    """What a parameter of `Transformer` is, by its name; a tied head is the embedding."""
    module = name.split(".")[-2]
    if module.endswith("norm"):
        return "norm"
    return {"tok_embeddings": "embedding", "output": "head"}.get(module, "matrix")


def width_ratio(config: ModelConfig) -> float:
    """How much wider than the base: m = d_model / base_width; 1 in the standard parametrization."""
    return 1.0 if config.base_width is None else config.d_model / config.base_width


def initial_std(config: ModelConfig, name: str) -> float:
    """Standard deviation of a parameter's initial values, which are normal; not for norms, whose weights are 1.

    In the standard parametrization 0.02, over sqrt(2·n_layers) for matrices that write to the residual stream
    (Radford et al. 2019).
    """
    std = STD
    if name.endswith(("w_o.weight", "w_down.weight")):
        std /= math.sqrt(2 * config.n_layers)
    if role(name) == "matrix":
        std /= math.sqrt(width_ratio(config))
    return std


def output_multiplier(config: ModelConfig) -> float:
    """What the final hidden states are multiplied by before the output head."""
    return 1.0 / width_ratio(config)


def scales(config: ModelConfig, name: str, algorithm: Literal["adamw", "muon"]) -> Scales:
    """Factors for learning rate, weight decay and epsilon of a parameter that `algorithm` optimises."""
    ratio = width_ratio(config)
    if role(name) != "matrix":
        return Scales(eps=1 / ratio)
    lr = 1 / math.sqrt(ratio) if algorithm == "muon" else 1 / ratio
    return Scales(lr=lr, weight_decay=1 / lr, eps=1 / ratio)
