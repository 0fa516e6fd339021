"""Next-token cross-entropy that never holds the logits of all tokens.

Logits of a vocabulary of 128k for a batch of 32k tokens are 16 GB in fp32. Here they exist for a chunk of
tokens at a time, and because the gradient of the loss by the logits is known as soon as they are, it is
turned at once into gradients of the hidden states and of the head. Nothing is computed twice.
"""

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100

Reduction = Literal["mean", "sum", "none"]


def inputs_and_targets(samples: Tensor) -> tuple[Tensor, Tensor]:
    """What the model reads and what it is to predict, (B, T) each, of samples (B, T + 1) in which IGNORE is padding.

    Padding stands at the end of a sample, so whatever id it has as input is seen by no target.
    """
    return samples[:, :-1].clamp(min=0), samples[:, 1:]


def cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, *, chunk: int | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Next-token loss in nats, with exact gradients, from hidden states and the output matrix.

    Args:
        hidden: final hidden states, (tokens, d_model), bf16 or fp32; matrix products run in this dtype.
        head: output embedding, (vocab, d_model), any float dtype.
        targets: token ids, (tokens,), int64; -100 is ignored.
        chunk: tokens whose logits exist at one time; peak memory is some chunk * vocab * 8 bytes. None is 8192 on an
            accelerator, which keeps its matrix units full, and 512 on the CPU, where logits then stay in its cache.
        reduction: "mean" over the targets that count (0 if there are none), "sum", or "none".

    Returns:
        fp32, a scalar, or (tokens,) for "none" with 0 at ignored targets.

    Raises:
        ValueError: hidden and targets disagree on the number of tokens, or chunk is below 1.
    """
    if hidden.shape[0] != targets.shape[0]:
        raise ValueError(f"hidden has {hidden.shape[0]} tokens but targets has {targets.shape[0]}")
    if chunk is None:
        chunk = 512 if hidden.device.type == "cpu" else 8192
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, but must be at least 1")
    differentiable = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    if differentiable and reduction != "none":
        total = _SummedLoss.apply(hidden, head, targets, chunk)
    else:
        losses = _losses(hidden, head.to(hidden.dtype), targets, chunk, recompute=differentiable)
        if reduction == "none":
            return losses
        total = losses.sum()
    if reduction == "sum":
        return total
    return total / (targets != IGNORE).sum().clamp(min=1)


def _losses(hidden: Tensor, head: Tensor, targets: Tensor, chunk: int, *, recompute: bool) -> Tensor:
    def one(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ head.T).float(), targets, ignore_index=IGNORE, reduction="none")

    pieces = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    if recompute:  # per-token weights arrive with the backward pass only, so logits are made again there
        return torch.cat([checkpoint(one, h, t, use_reentrant=False) for h, t in pieces])
    return torch.cat([one(h, t) for h, t in pieces])


class _SummedLoss(torch.autograd.Function):
    """Sum of the losses; gradients are made in the forward pass and only scaled in the backward pass."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, chunk: int) -> Tensor:
        weight = head.to(hidden.dtype)
        total = torch.zeros((), device=hidden.device)
        # What is saved below is never written in place: under torch.compile, torch 2.11 saves it as it was before.
        grads_hidden: list[Tensor] = []
        grad_head: Tensor | None = None
        for h, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            counted = (target != IGNORE).unsqueeze(1)
            index = target.clamp(min=0).unsqueeze(1)
            log_probs = torch.log_softmax((h @ weight.T).float(), dim=1)
            total = total - (log_probs.gather(1, index) * counted).sum()
            # d loss / d logits = softmax - one-hot
            grad_logits = log_probs.exp_().scatter_add_(1, index, torch.full_like(index, -1, dtype=torch.float32))
            grad_logits = grad_logits.to(hidden.dtype)
            # ignored rows are zeroed here, where rows are d_model wide, not in the vocabulary-wide logits
            grads_hidden.append((grad_logits @ weight) * counted)
            # fp32: in bf16 the sum over chunks would lose what the later ones add
            product = (grad_logits.T @ (h * counted)).float()
            grad_head = product if grad_head is None else grad_head + product
        ctx.save_for_backward(torch.cat(grads_hidden), grad_head)
        ctx.head_dtype = head.dtype
        return total

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        scaled = (grad_hidden * grad_output).to(grad_hidden.dtype)
        return scaled, (grad_head * grad_output).to(ctx.head_dtype), None, None
