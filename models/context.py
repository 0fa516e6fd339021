"""Context parallelism for long sequences, Ulysses style (Jacobs et al. 2023, "DeepSpeed Ulysses").

Each worker of a group holds a part of every sequence. Around attention, shards of the sequence are exchanged for
shards of the heads, so that each worker attends over whole sequences with its heads, with any attention kernel and any
mask, and back. Torch's own context parallelism (ring attention) brings its own attention, for some CUDA kernels alone,
and reorders sequences to balance the causal mask, which masks of documents would have to follow.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models.collectives import SplitLoss, exchange, whole_of
from models.mesh import Mesh
from models.transformer import Transformer


def split_sequences(model: Transformer, mesh: Mesh) -> None:
    """Make each worker of the context group compute its part of the sequences that all of them are given.

    From outside nothing changes: the model takes whole sequences and gives their whole losses. Gradients come out as
    those of a worker's part times the size of the group, because they are averaged over the group as over the data.

    Args:
        model: before it is compiled.
        mesh: with a context group.
    """
    group, world, rank = mesh.context, mesh.context_world, mesh.context_rank
    for block in model.layers:
        block.attention.attend = _by_heads(block.attention.attend, group.group_name, world)
    model.loss = SplitLoss(model.loss, group, split=False, gradient_factor=world)
    of_part = model.forward

    def forward(tokens: Tensor, targets: Tensor | None = None, **options: Any) -> Any:
        if targets is None:
            raise ValueError("with context_parallel the model gives losses, not logits")
        length = tokens.shape[1] // world
        if length * world != tokens.shape[1]:
            raise ValueError(f"sequences of {tokens.shape[1]} tokens cannot be split over {world} context workers")
        part = slice(rank * length, (rank + 1) * length)
        result = of_part(tokens[:, part], targets[:, part], start=rank * length, **options)
        value, *losses = result if isinstance(result, tuple) else (result,)
        # what there is for each token, (B, T / world), becomes that of whole sequences
        whole = [whole_of(x.T, rank, world, group.group_name, world).T if x.ndim == 2 else x for x in (value, *losses)]
        return tuple(whole) if losses else whole[0]

    model.forward = forward


def _by_heads(attend: Callable[..., Tensor], group: str, world: int) -> Callable[..., Tensor]:
    """Attention over whole sequences by this worker's share of the heads."""

    def attend_whole(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
        if k.shape[1] < world:  # fewer key heads than workers: each is copied to those that its queries go to
            k, v = (x.repeat_interleave(world // k.shape[1], dim=1) for x in (k, v))
        sizes = [x.shape[1] // world for x in (q, k, v)]
        # (worker, batch, its heads, part of the sequence, head_dim), one exchange for all three
        by_worker = torch.cat([x.unflatten(1, (world, -1)) for x in (q, k, v)], dim=2).transpose(0, 1)
        parts = exchange(by_worker, group)
        whole = parts.permute(1, 2, 0, 3, 4).flatten(2, 3)
        mixed = attend(*whole.split(sizes, dim=1), *args, **options)
        by_part = mixed.unflatten(2, (world, -1)).permute(2, 0, 1, 3, 4)
        return exchange(by_part, group).transpose(0, 1).flatten(1, 2)

    return attend_whole
