"""Collectives with gradients, for workers that compute one thing together, and the loss of such workers.

They go through torch's functional collectives, which `torch.compile` can trace, on gloo and NCCL alike.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from models.loss import IGNORE


def exchange(parts: Tensor, group: str) -> Tensor:
    """Give parts[i] to worker i of the group, get one of the same shape from each."""
    return _Exchange.apply(parts, group)


def part_of(x: Tensor, rank: int, world: int, group: str) -> Tensor:
    """This worker's part of the rows of a tensor that all workers of the group have alike."""
    return _Part.apply(x, rank, world, group)


def whole_of(x: Tensor, rank: int, world: int, group: str, gradient_factor: float = 1.0) -> Tensor:
    """All rows, on every worker, of a tensor of which each has a part; the gradient is the part's, times a factor."""
    return _Whole.apply(x, rank, world, gradient_factor, group)


def total_of(x: Tensor, group: str, gradient_factor: float = 1.0) -> Tensor:
    """Sum over the group; the gradient passes through, times a factor."""
    return _Total.apply(x, gradient_factor, group)


class SplitLoss:
    """The loss of tokens that are split over a group of workers; takes and gives what `models.loss.cross_entropy` does.

    Args:
        loss: of one worker's tokens.
        group: workers that together have all tokens.
        split: the workers are given all tokens alike, and each is to take its part. Without it each is given a part.
        gradient_factor: of a sum's gradients; the size of the group where they are averaged over it later. Losses of
            tokens that were given in parts are left to whoever makes them whole.
    """

    def __init__(
        self, loss: Callable[..., Any], group: dist.ProcessGroup, *, split: bool, gradient_factor: float = 1.0
    ) -> None:
        self.loss = loss
        self.group, self.world, self.rank = group.group_name, group.size(), group.rank()
        self.split, self.gradient_factor = split, gradient_factor

    def __call__(
        self,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        *,
        reduction: str = "mean",
        token_losses: bool = False,
        **options: Any,
    ) -> Any:
        """As `models.loss.cross_entropy`; all but the losses of tokens is the same on every worker."""
        tokens = len(targets)
        if isinstance(head, DTensor):
            # the rows of the vocabulary that the others hold; their gradients are summed there
            head = head.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        if self.split:
            short = -tokens % self.world
            hidden = part_of(F.pad(hidden, (0, 0, 0, short)), self.rank, self.world, self.group)
            targets = F.pad(targets, (0, short), value=IGNORE).chunk(self.world)[self.rank]
        if reduction == "none":
            losses = self.loss(hidden, head, targets, reduction="none", **options)
            value = losses = self._whole(losses, tokens)
            return (value, losses.detach()) if token_losses else value
        value, losses = self.loss(hidden, head, targets, reduction="sum", token_losses=True, **options)
        value = total_of(value, self.group, self.gradient_factor)
        if reduction == "mean":
            value = value / self._count(targets).clamp(min=1)
        return (value, self._whole(losses, tokens)) if token_losses else value

    def _count(self, targets: Tensor) -> Tensor:
        """Targets that count, of all workers: also of those that a loss within this one is split over."""
        within = self.loss._count(targets) if isinstance(self.loss, SplitLoss) else (targets != IGNORE).sum()
        return _all_reduce(within, self.group)

    def _whole(self, losses: Tensor, tokens: int) -> Tensor:
        return whole_of(losses, self.rank, self.world, self.group)[:tokens] if self.split else losses


def _wait(pending: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(pending)


def _all_to_all(parts: Tensor, group: str) -> Tensor:
    each = [1] * len(parts)
    return _wait(torch.ops._c10d_functional.all_to_all_single(parts.contiguous(), each, each, group))


def _all_gather(x: Tensor, world: int, group: str) -> Tensor:
    return _wait(torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), world, group))


def _all_reduce(x: Tensor, group: str) -> Tensor:
    return _wait(torch.ops._c10d_functional.all_reduce(x, "sum", group))


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parts: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _all_to_all(parts, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grad, ctx.group), None


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rank: int, world: int, group: str) -> Tensor:
        ctx.world, ctx.group = world, group
        return x.chunk(world)[rank].clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_gather(grad, ctx.world, ctx.group), None, None, None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rank: int, world: int, factor: float, group: str) -> Tensor:
        ctx.rank, ctx.world, ctx.factor = rank, world, factor
        return _all_gather(x, world, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return grad.chunk(ctx.world)[ctx.rank] * ctx.factor, None, None, None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: float, group: str) -> Tensor:
        ctx.factor = factor
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.factor, None, None
