"""AdamW and Muon whose steps can be called off on the device, parameter groups, schedules, and the gradient's norm."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from models.config import OptimizerConfig, ScheduleConfig
from models.muon import orthogonalize, splits, update_scale
from models.transformer import Transformer
from models.widths import role, scales

_BATCH = 2**26  # entries of whole matrices that a rank orthogonalizes at a time: 128 MB in bf16, held some eight times


class Optimizer(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) and Muon (Jordan et al. 2024; Liu et al. 2025), by parameter group.

    Nothing is read back to the host, also when a step is called off. Works on plain parameters and on DTensors of any
    mesh: each rank updates its own pieces, and matrices that Muon has to see whole are exchanged (`models.muon`). State
    exists from the start, so that a checkpoint taken before the first step is like any other.

    Args:
        groups: each with "algorithm" adamw or muon; Muon's have matrices only.
        lr: of groups that have none, as the other settings in `OptimizerConfig`.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: decoupled, times the learning rate.
        momentum: Muon's, in Nesterov's form.

    Attributes:
        found_inf: scalar fp32 tensor on the parameters' device, or None. Where it is 1, `step` leaves weights, moments
            and step counters bit for bit as they are, whatever the gradients hold; where it is 0, it does not.
        grad_scale: scalar fp32 tensor there, or None: gradients are divided by it on the way. May change `.grad`.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:
        defaults = {
            "algorithm": "adamw",
            "lr": lr,
            "lr_scale": 1.0,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            # load_state_dict keeps "step" in fp32 on the device for groups that say so
            "fused": True,
        }
        super().__init__(groups, defaults)
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = _fresh_state(parameter, group["algorithm"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update all parameters that have gradients; a collective of all ranks when Muon has sharded matrices.

        Args:
            closure: computes the loss and its gradients first.

        Returns:
            The closure's loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["algorithm"] == "muon":
                self._muon(group, parameters)
            elif parameters:
                self._adamw(group, parameters)
        return loss

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        # On local tensors, not DTensors: those would have to be of one mesh, and take their time to dispatch. The fused
        # kernels return at once where found_inf is 1, and the counters are taken back after them.
        states = [self.state[p] for p in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            [_local(p) for p in parameters],
            [_local_gradient(p) for p in parameters],
            [_local(state["exp_avg"]) for state in states],
            [_local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            grad_scale=self.grad_scale,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
        skip = None if self.found_inf is None else self.found_inf.bool()
        alike: dict[Any, list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            layout = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None
            alike[(parameter.shape, parameter.device, layout)].append(parameter)
        taken = 0
        for (shape, device, _), members in alike.items():
            cuts = splits(members[0])
            owners = math.prod(len(cut.sizes) for cut in cuts)
            batch = owners * max(1, _BATCH // shape.numel())
            for matrices in (members[i : i + batch] for i in range(0, len(members), batch)):
                updates = []
                for parameter in matrices:
                    gradient = _local_gradient(parameter)
                    if self.grad_scale is not None:
                        gradient = gradient / self.grad_scale
                    average = _local(self.state[parameter]["momentum_buffer"])
                    moved = average.lerp(gradient, 1 - momentum)
                    updates.append(gradient.lerp(moved, momentum).to(_muon_dtype(device)))  # Nesterov's
                    _assign(average, moved, skip)
                updates = orthogonalize(torch.stack(updates), cuts, first=taken)
                for parameter, update in zip(matrices, updates, strict=True):
                    weights = _local(parameter)
                    moved = (weights * (1 - lr * decay)).add_(update, alpha=-lr * update_scale(shape))
                    _assign(weights, moved, skip)
                taken += len(matrices)


def _fresh_state(parameter: Tensor, algorithm: str) -> dict[str, Tensor]:
    """State before the first step, under the names that torch.optim's AdamW and Muon use."""
    moments = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}[algorithm]
    state = {name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in moments}
    if algorithm == "adamw":
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return state


def _muon_dtype(device: torch.device) -> torch.dtype:
    """What matrices are exchanged and orthogonalized in: as fast as the device can."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _assign(target: Tensor, value: Tensor, skip: Tensor | None) -> None:
    """Put value into target unless skip; a selection, because any arithmetic with a NaN is one."""
    if skip is None:
        target.copy_(value)
    else:
        torch.where(skip, target, value, out=target)


def _local(tensor: Tensor) -> Tensor:
    """This rank's piece."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local_gradient(parameter: Tensor) -> Tensor:
    """This rank's piece of the gradient, laid out as the parameter; sums still to be made are made for good."""
    gradient = parameter.grad
    if isinstance(gradient, DTensor) and gradient.placements != parameter.placements:
        parameter.grad = gradient = gradient.redistribute(placements=parameter.placements)
    return _local(gradient)


def param_groups(model: Transformer, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameters by what optimises them and with which settings; matrices of linear layers decay.

    Norms and embeddings do not: an embedding row has a gradient only when its token occurs, and decay in between would
    pull rare tokens to zero. A tied output layer is an embedding. With `optimizer.kind: muon` the matrices of the
    blocks go to Muon; embedding, output head and norms stay with AdamW.

    Returns:
        Groups with "params", "algorithm", "lr" (the peak), "lr_scale" (the factor that whoever changes "lr" has to
        heed: muP), "eps" and "weight_decay".
    """
    groups: dict[tuple, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        algorithm = "muon" if config.kind == "muon" and role(name) == "matrix" else "adamw"
        decay = config.weight_decay if role(name) in ("matrix", "head") else 0.0
        scale = scales(model.config, name, algorithm)
        groups[(algorithm, decay * scale.weight_decay, scale.lr, config.eps * scale.eps)].append(parameter)
    return [
        {
            "params": parameters,
            "algorithm": algorithm,
            "lr": config.lr * lr_scale,
            "lr_scale": lr_scale,
            "weight_decay": decay,
            "eps": eps,
        }
        for (algorithm, decay, lr_scale, eps), parameters in groups.items()
    ]


def build_optimizer(model: Transformer, config: OptimizerConfig) -> Optimizer:
    """The optimizer of the model as it is now: shard it, and give its parameters memory, first."""
    return Optimizer(param_groups(model, config), lr=config.lr, betas=tuple(config.betas), momentum=config.momentum)


def learning_rate(step: int, total_steps: int, lr: float, schedule: ScheduleConfig) -> float:
    """Learning rate of a step.

    Rises linearly, so that step `warmup_steps - 1` has the peak. Then "cosine" falls over the rest of the run
    (Loshchilov & Hutter 2017), and "wsd" stays until the last `decay_fraction` of the run (Hu et al. 2024) and falls
    linearly or by 1 - sqrt(progress) (Hägele et al. 2024, section 3). All would reach `min_ratio · lr` at step
    `total_steps`, the first one that is not taken any more, and stay there.

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
        left = min(1.0, max(0.0, (total_steps - step) / decay_steps))
        height = left if schedule.decay == "linear" else 1 - math.sqrt(1 - left)
    return lr * (schedule.min_ratio + (1 - schedule.min_ratio) * height)


def easing(step: int, rolled_back_to: int | None, ease: float, ease_steps: int) -> float:
    """Factor for the learning rate after a rollback: from `ease` back to 1, linearly over `ease_steps` steps.

    Args:
        step: the one about to be taken, counted from 0.
        rolled_back_to: the step the run went back to last, None when it never did. The spike's window is skipped, not
            trained on, so steps count from here.
        ease: the factor of the first step after the rollback; 1 is off.
        ease_steps: steps until the factor is 1 again.
    """
    if rolled_back_to is None or step >= rolled_back_to + ease_steps:
        return 1.0
    return ease + (1 - ease) * max(0, step - rolled_back_to) / ease_steps


@torch.no_grad()
def grad_norm(model: nn.Module) -> Tensor:
    """The joint 2-norm of all gradients; sharded ones count whole, and every rank gets the same number.

    Nothing is changed, and nothing read back to the host. One all-reduce of one number, whatever the meshes.

    Args:
        model: plain, or with DTensors of any meshes over the default process group's ranks. A plain parameter's
            gradient is the same on all ranks.

    Returns:
        A scalar, fp32, on the gradients' device; not finite when any of them is not.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    # A gradient that several ranks hold is in all their sums, so each counts its share: local square / copies.
    by_copies: dict[int, list[Tensor]] = defaultdict(list)
    for parameter in model.parameters():
        if parameter.grad is not None:
            by_copies[world // _pieces(parameter)].append(_local_gradient(parameter))
    if not by_copies:
        return torch.zeros(())
    squares = []
    for copies, gradients in by_copies.items():
        norms = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32))
        squares.append(norms.square().sum() / copies)
    total = torch.stack(squares).sum()
    if world > 1:
        dist.all_reduce(total)
    return total.sqrt()


def _pieces(tensor: Tensor) -> int:
    """Number of different pieces that a tensor is cut into."""
    if not isinstance(tensor, DTensor):
        return 1
    cut = (i for i, placement in enumerate(tensor.placements) if not placement.is_replicate())
    return math.prod(tensor.device_mesh.size(i) for i in cut)
