"""Next-token cross-entropy that never holds the logits of all tokens.

Logits of a vocabulary of 128k for a batch of 32k tokens are 16 GB in fp32. Here they exist for a chunk of
tokens at a time, and because the gradient of the loss by the logits is known as soon as they are, it is
turned at once into gradients of the hidden states and of the head. Nothing is computed twice, and of what is as
wide as the vocabulary only the logits and their gradient are ever written to memory, both in the compute dtype.
"""

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.kernels import loss_and_gradient_, on_gpu

IGNORE = -100

Reduction = Literal["mean", "sum", "none"]

# of a chunk's logits and their gradient on an accelerator: large enough to keep its matrix units full
_LOGIT_BYTES = 2**32


def inputs_and_targets(samples: Tensor) -> tuple[Tensor, Tensor]:
    """What the model reads and what it is to predict, (B, T) each, of samples (B, T + 1) in which IGNORE is padding.

    Padding stands at the end of a sample, so whatever id it has as input is seen by no target.
    """
    return samples[:, :-1].clamp(min=0), samples[:, 1:]


def default_chunk(device: torch.device, vocab_size: int) -> int:
    """Tokens whose logits exist at one time: a power of two, or 512 on the CPU, where logits then stay in its cache."""
    if device.type == "cpu":
        return 512
    return 1 << max(9, (_LOGIT_BYTES // (4 * vocab_size)).bit_length() - 1)


def cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    chunk: int | None = None,
    reduction: Reduction = "mean",
    z_loss: float = 0.0,
    token_losses: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Next-token loss in nats, with exact gradients, from hidden states and the output matrix.

    Args:
        hidden: final hidden states, (tokens, d_model), bf16 or fp32; matrix products run in this dtype.
        head: output embedding, (vocab, d_model), any float dtype.
        targets: token ids, (tokens,), int64; -100 is ignored.
        chunk: tokens whose logits exist at one time; peak memory is some chunk * vocab * 4 bytes in bf16. None is
            what fills the device, see `default_chunk`.
        reduction: "mean" over the targets that count (0 if there are none), "sum", or "none".
        z_loss: weight of logsumexp(logits)², which keeps logits from drifting (Chowdhery et al. 2022, section 5).
            It is in the gradient alone: the value stays the cross-entropy.
        token_losses: return each token's loss too, at no cost.

    Returns:
        fp32, a scalar, or (tokens,) for "none" with 0 at ignored targets; with `token_losses` a pair of that and the
        tokens' losses, (tokens,), fp32, without gradient.

    Raises:
        ValueError: hidden and targets disagree on the number of tokens, chunk is below 1, or z_loss is asked of
            "none", whose gradient is weighted later.
    """
    if hidden.shape[0] != targets.shape[0]:
        raise ValueError(f"hidden has {hidden.shape[0]} tokens but targets has {targets.shape[0]}")
    if chunk is None:
        chunk = default_chunk(hidden.device, head.shape[0])
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, but must be at least 1")
    differentiable = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    if differentiable and reduction == "none" and z_loss:
        raise ValueError(f"z_loss is {z_loss}, but must be 0 with reduction='none'")
    if differentiable and reduction != "none":
        total, losses = _SummedLoss.apply(hidden, head, targets, chunk, z_loss)
    else:
        losses = _losses(hidden, head.to(hidden.dtype), targets, chunk, recompute=differentiable)
        total = losses.sum()
    if reduction == "none":
        value = losses
    elif reduction == "sum":
        value = total
    else:
        value = total / (targets != IGNORE).sum().clamp(min=1)
    return (value, losses.detach()) if token_losses else value


def _losses(hidden: Tensor, head: Tensor, targets: Tensor, chunk: int, *, recompute: bool) -> Tensor:
    def one(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ head.T).float(), targets, ignore_index=IGNORE, reduction="none")

    pieces = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    if recompute:  # per-token weights arrive with the backward pass only, so logits are made again there
        return torch.cat([checkpoint(one, h, t, use_reentrant=False) for h, t in pieces])
    return torch.cat([one(h, t) for h, t in pieces])


def _loss_and_gradient(logits: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Each token's loss, (tokens,), fp32, and the gradient of their sum by the logits, in the logits' dtype."""
    counted = (targets != IGNORE).unsqueeze(1)
    index = targets.clamp(min=0).unsqueeze(1)
    normalizer = logits.float().logsumexp(1, keepdim=True)
    losses = ((normalizer - logits.gather(1, index).float()) * counted).squeeze(1)
    # softmax - one-hot; a comparison, unlike a scatter, is part of the same pass
    probabilities = (logits.float() - normalizer).exp() * (1 + 2 * z_loss * normalizer)
    ids = torch.arange(logits.shape[1], device=logits.device)
    return losses, ((probabilities - (ids == index).float()) * counted).to(logits.dtype)


class _SummedLoss(torch.autograd.Function):
    """Sum of the losses, and the losses; gradients are made in the forward pass, the backward pass only scales them."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, chunk: int, z_loss: float) -> tuple[Tensor, Tensor]:
        weight = head.to(hidden.dtype)
        # What is saved below is never written in place: under torch.compile, torch 2.11 saves it as it was before.
        losses: list[Tensor] = []
        grads_hidden: list[Tensor] = []
        grad_head: Tensor | None = None
        for h, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logits = h @ weight.T
            if on_gpu(logits):
                losses.append(loss_and_gradient_(logits, target, z_loss, IGNORE))
            else:
                loss, logits = _loss_and_gradient(logits, target, z_loss)
                losses.append(loss)
            grads_hidden.append(logits @ weight)
            # fp32: in bf16 the sum over chunks would lose what the later ones add
            product = (logits.T @ h).float()
            grad_head = product if grad_head is None else grad_head + product
        ctx.save_for_backward(torch.cat(grads_hidden), grad_head)
        ctx.head_dtype = head.dtype
        ctx.set_materialize_grads(False)
        losses_of_all = torch.cat(losses)
        return losses_of_all.sum(), losses_of_all

    @staticmethod
    def backward(ctx, grad_total: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        scaled = (grad_hidden * grad_total).to(grad_hidden.dtype)
        return scaled, (grad_head * grad_total).to(ctx.head_dtype), None, None, None
