"""How workers are laid out: which of them share the weights, the matrices of a layer, or one sequence.

torch is imported where it is used, so that settings can be read without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    from models.config import ModelConfig


@dataclass
class Parallelism:
    """What the workers of a run divide among themselves."""

    shard_workers: int | None = None
    """Workers over which one copy of weights and optimizer state is spread (FSDP2). None: all of them. Fewer: each
    such group has a copy of its own, best one group a machine (HSDP). 1: every worker has all, the fastest where it
    fits. With context_parallel, its workers count in; those of tensor_parallel do not."""
    tensor_parallel: int = 1
    """Workers that split every layer's matrices (Shoeybi et al. 2019): for models whose single layers are too large,
    within one machine."""
    context_parallel: int = 1
    """Workers that split every sequence (Jacobs et al. 2023): for sequences whose activations are too large."""
    gather: Literal["auto", "whole", "step", "block"] = "auto"
    """When sharded weights are made whole. whole: all at once, once a step. step: block by block ahead of their use,
    once a step. block: block by block each time they are used, which takes the least memory. auto: whole if that
    takes at most a quarter of the device's memory, else block."""

    def check(self, n_workers: int, model: ModelConfig, sequence_length: int | None = None) -> None:
        """Check that the workers can be laid out so.

        Args:
            n_workers: of the run, or of the smallest group that it may shrink to.
            model: the shape whose heads and matrices are split.
            sequence_length: of training samples, in tokens; None is not checked.

        Raises:
            ValueError: with the setting's name, its value, and what is allowed.
        """
        tensor, context = self.tensor_parallel, self.context_parallel
        for name in ("tensor_parallel", "context_parallel"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(
            n_workers % (tensor * context) == 0,
            "tensor_parallel",
            tensor,
            f"such that times context_parallel ({context}) it divides the {n_workers} workers",
        )
        shards = self.shard_workers
        if shards is not None:
            within = n_workers // tensor
            _require(
                shards >= 1 and within % shards == 0, "shard_workers", shards, f"a divisor of {within}, the workers"
                f"{' over tensor_parallel' if tensor > 1 else ''}, or null for all of them",
            )  # fmt: skip
        for size in ("n_heads", "n_kv_heads", "d_ff", "vocab_size"):
            _require(
                getattr(model, size) % tensor == 0,
                "tensor_parallel",
                tensor,
                f"a divisor of model.{size}, which is {getattr(model, size)}",
            )
        heads, kv_heads = model.n_heads // tensor, model.n_kv_heads // tensor
        _require(
            heads % context == 0 and (kv_heads % context == 0 or context % kv_heads == 0),
            "context_parallel",
            context,
            f"a divisor of {heads} query heads and a divisor or multiple of {kv_heads} key and value heads (those "
            "that a worker has)",
        )
        if sequence_length is not None:
            _require(
                sequence_length % context == 0,
                "context_parallel",
                context,
                f"a divisor of the sequence length {sequence_length}",
            )


def _require(condition: bool, setting: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"parallelism.{setting} is {value!r}, but must be {allowed}")


@dataclass(frozen=True)
class Mesh:
    """The workers of a run, laid out.

    Rank r is tensor worker r % tensor of context worker r // tensor % context of data worker r // (tensor · context).

    Attributes:
        parallelism: what it was made from.
        weights: dimensions "replicate", "shard" and "tensor": who holds which part of the weights. "replicate" and
            "shard" together run over data and context workers.
        context: the group of workers that split this worker's sequences; None where nobody does.
        context_rank: this worker's place in it.
        data_rank: which part of a batch this worker reads.
        data_world: into how many parts a batch is divided.
    """

    parallelism: Parallelism
    weights: DeviceMesh
    context: dist.ProcessGroup | None
    context_rank: int
    data_rank: int
    data_world: int

    @property
    def replicas(self) -> int:
        """Copies of the weights."""
        return self.weights["replicate"].size()

    @property
    def shards(self) -> int:
        """Workers that one copy is spread over, those of tensor parallelism not counted."""
        return self.weights["shard"].size()

    @property
    def tensor(self) -> int:
        """Workers that split each matrix."""
        return self.parallelism.tensor_parallel

    @property
    def context_world(self) -> int:
        """Workers that split each sequence."""
        return self.parallelism.context_parallel


def make_mesh(parallelism: Parallelism, device_type: str) -> Mesh | None:
    """Lay out all processes of the default process group; a collective of them.

    Args:
        parallelism: valid for their number.
        device_type: "cuda" or "cpu".

    Returns:
        None for a process that is alone: there is nothing to divide.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    rank, world = dist.get_rank(), dist.get_world_size()
    tensor, context = parallelism.tensor_parallel, parallelism.context_parallel
    copies = world // tensor
    shards = parallelism.shard_workers or copies
    if copies * tensor != world or copies % shards or copies % context:
        raise ValueError(f"{parallelism} does not fit {world} workers")
    weights = init_device_mesh(
        device_type, (copies // shards, shards, tensor), mesh_dim_names=("replicate", "shard", "tensor")
    )
    group = None
    if context > 1:
        shape = (copies // context, context, tensor)
        group = init_device_mesh(device_type, shape, mesh_dim_names=("data", "context", "tensor")).get_group("context")
    return Mesh(
        parallelism,
        weights,
        group,
        context_rank=rank // tensor % context,
        data_rank=rank // (tensor * context),
        data_world=copies // context,
    )


def data_rank_and_world(mesh: Mesh | None) -> tuple[int, int]:
    """Which part of each batch this worker reads, of how many: workers that split sequences or matrices read the same.

    (0, 1) without a mesh.
    """
    return (0, 1) if mesh is None else (mesh.data_rank, mesh.data_world)
