"""Muon's orthogonalization, spread over the ranks that hold the pieces of a matrix.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; Liu et al. 2025, "Muon is scalable for
LLM training", which matches the size of its updates to AdamW's. A matrix can only be orthogonalized whole. Instead of
gathering every matrix on every rank, the ranks that share matrices exchange pieces (all-to-all), so that each gets its
share of whole matrices, orthogonalizes those, and sends the pieces back: the same traffic as one gather, a rank's share
of the work.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic a·x + b·x³ + c·x⁵ that moves singular values in (0, 1] towards 1 fastest, Jordan et al. 2024."""
STEPS = 5


class Split(NamedTuple):
    """One cut of a matrix: along `dim`, into pieces of these sizes, over the ranks of a group."""

    group: dist.ProcessGroup
    dim: int
    sizes: list[int]


def update_scale(shape: torch.Size) -> float:
    """Factor that gives an orthogonalized matrix the root mean square of AdamW's updates, 0.2 (Liu et al. 2025, 2.2).

    Entries of an orthogonal (rows, cols) matrix have the root mean square 1 / sqrt(max(rows, cols)).
    """
    return 0.2 * math.sqrt(max(shape))


def newton_schulz(matrices: Tensor, steps: int = STEPS) -> Tensor:
    """Move all singular values near 1 (0.7 to 1.2), singular vectors staying as they are.

    Args:
        matrices: (n, rows, cols); computed in their dtype, for which bf16 is enough.
        steps: of the iteration, which spends 4·k²·l + 2·k³ operations on each (k, l) matrix, k <= l.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    # the Frobenius norm bounds the largest singular value
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = x / norm.clamp(min=1e-7).to(x.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def splits(matrix: Tensor) -> list[Split]:
    """How a matrix is cut over ranks, from the first cut to the last; nothing for one that each rank has whole.

    Raises:
        ValueError: the pieces are not those that FSDP2 and tensor parallelism make.
    """
    if not isinstance(matrix, DTensor):
        return []
    mesh, lengths = matrix.device_mesh, list(matrix.shape)
    coordinate = mesh.get_coordinate()
    cuts = [(placement, i) for i, placement in enumerate(matrix.placements) if not placement.is_replicate()]
    # FSDP2 cuts what tensor parallelism has cut before, though its mesh dimension stands first: a strided placement
    cuts.sort(key=lambda cut: hasattr(cut[0], "split_factor"))
    result = []
    for placement, i in cuts:
        dim, parts = placement.dim, mesh.size(i)
        piece = math.ceil(lengths[dim] / parts)  # as torch.chunk cuts: the last ones may be smaller, or empty
        sizes = [max(0, min(piece, lengths[dim] - part * piece)) for part in range(parts)]
        lengths[dim] = sizes[coordinate[i]]
        if parts > 1:
            result.append(Split(mesh.get_group(i), dim, sizes))
    if tuple(lengths) != tuple(matrix.to_local().shape):
        raise ValueError(
            f"Muon cannot assemble a {tuple(matrix.shape)} matrix of placements {matrix.placements}: this rank holds "
            f"{tuple(matrix.to_local().shape)} of it where {tuple(lengths)} was expected; use optimizer.kind adamw"
        )
    return result


def orthogonalize(pieces: Tensor, cuts: list[Split], first: int = 0) -> Tensor:
    """This rank's pieces of the orthogonalized matrices; a collective of the ranks that share them.

    Args:
        pieces: this rank's piece of each of n matrices of one shape, (n, rows, cols).
        cuts: how each of the matrices is cut, by `splits`.
        first: the rank, in each group, that takes the first matrix; the next one takes the second, and so on.
            Starting where the last batch ended spreads what does not divide evenly.

    Returns:
        Of the same shape and dtype as `pieces`.
    """
    if not len(pieces):  # of fewer matrices than ranks; those that share the outer cuts have none either
        return pieces
    if not cuts:
        return newton_schulz(pieces)
    *outer, (group, dim, sizes) = cuts
    world, rank = len(sizes), dist.get_rank(group)
    shares = [pieces[(owner - first) % world :: world] for owner in range(world)]
    shape = [len(shares[rank]), *pieces.shape[1:]]
    shapes = [[*shape[: dim + 1], size, *shape[dim + 2 :]] for size in sizes]

    outgoing = torch.cat([share.reshape(-1) for share in shares])
    sent, received = [share.numel() for share in shares], [math.prod(s) for s in shapes]
    incoming = outgoing.new_empty(sum(received))
    dist.all_to_all_single(incoming, outgoing, received, sent, group=group)
    parts = [part.view(s) for part, s in zip(incoming.split(received), shapes, strict=True)]
    whole = orthogonalize(torch.cat(parts, dim=dim + 1), outer, first)

    outgoing = torch.cat([part.reshape(-1) for part in whole.split(sizes, dim=dim + 1)])
    incoming = outgoing.new_empty(sum(sent))
    dist.all_to_all_single(incoming, outgoing, sent, received, group=group)
    result = torch.empty_like(pieces)
    for owner, (part, share) in enumerate(zip(incoming.split(sent), shares, strict=True)):
        result[(owner - first) % world :: world] = part.view(share.shape)
    return result
