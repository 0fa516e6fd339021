"""AdamW with decay on matrices only, warmup with cosine or warmup-stable-decay, and gradient clipping."""

import math
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from models.config import OptimizerConfig, ScheduleConfig


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters in two groups: matrices of linear layers decay; norms and embeddings do not.

    An embedding row has a gradient only when its token occurs; decay in between would pull rare tokens to zero.
    A tied output layer is an embedding.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim >= 2 and id(p) not in embeddings]
    others = [p for p in parameters if p.ndim < 2 or id(p) in embeddings]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the model as it is now: shard it first. One fused kernel per group where the device has it."""
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in model.parameters())
    groups = param_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps, fused=fused)


def learning_rate(step: int, total_steps: int, lr: float, schedule: ScheduleConfig) -> float:
    """Learning rate of a step.

    Rises linearly, so that step `warmup_steps - 1` has the peak. Then "cosine" falls over the rest of the run
    (Loshchilov & Hutter 2017), and "wsd" stays until the last `decay_fraction` of the run and falls linearly
    (Hu et al. 2024; Hägele et al. 2024). Both would reach `min_ratio · lr` at step `total_steps`, the first one
    that is not taken any more, and stay there.

    Args:
        step: counted from 0.
        total_steps: steps of the whole run, warmup included.
        lr: the peak.
        schedule: the shape.
    """
    if step < schedule.warmup_steps:
        return lr * (step + 1) / schedule.warmup_steps
    if schedule.kind == "cosine":
        progress = min(1.0, (step - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps))
        height = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay_steps = max(1, round(schedule.decay_fraction * total_steps))
        height = min(1.0, max(0.0, (total_steps - step) / decay_steps))
    return lr * (schedule.min_ratio + (1 - schedule.min_ratio) * height)


@torch.no_grad()
def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients down so that their joint 2-norm is at most `max_norm`; sharded gradients are whole again
    in the norm, and every rank gets the same one.

    Nothing is read back to the host. A norm that is not finite makes the gradients so too: look at it before
    the optimizer's step.

    Args:
        model: plain, or sharded by FSDP2.
        max_norm: the bound; 0 only measures.

    Returns:
        The norm before scaling, a scalar, fp32.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    # gradients that are laid out alike share one reduction
    layouts: dict[Any, list[Tensor]] = defaultdict(list)
    local_gradients = []
    for gradient in gradients:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        layouts[(gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else None].append(local)
        local_gradients.append(local)
    squares = []
    for layout, members in layouts.items():
        norms = torch.stack(torch._foreach_norm(members, 2, dtype=torch.float32))
        square = norms.square().sum()
        if layout is not None:
            mesh, placements = layout
            for dimension, placement in enumerate(placements):
                if isinstance(placement, Shard):
                    dist.all_reduce(square, group=mesh.get_group(dimension))
        squares.append(square)
    norm = torch.stack(squares).sum().sqrt()
    if max_norm > 0:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(local_gradients, scale)
    return norm
