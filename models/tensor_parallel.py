"""Tensor parallelism (Shoeybi et al. 2019, "Megatron-LM"): each worker has a part of the heads and of the hidden units.

w_q, w_k, w_v, w_gate and w_up are split by outputs, w_o and w_down by inputs, so that each half of a block needs one
sum over the workers, and its backward pass one. The token embedding and the head are split by vocabulary; the loss by
tokens, for which each worker gathers the head: the logits are never split, and the loss is computed as everywhere.
"""

import functools
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from models.collectives import SplitLoss
from models.transformer import Transformer


def split_matrices(model: Transformer, mesh: DeviceMesh) -> None:
    """Turn the parameters into DTensors of which this worker has its part, and let the modules compute with it.

    No values are sent: the weights have to be equal on all workers, or on the meta device.

    Args:
        model: whole.
        mesh: the workers, one dimension.
    """
    # Norms compute alike everywhere, but for those of the heads, of which each worker has some.
    for block in model.layers:
        _replicate(block.attention_norm, mesh, Replicate())
        _replicate(block.ffn_norm, mesh, Replicate())
        if block.attention.qk_norm:
            _replicate(block.attention.q_norm, mesh, Shard(2))
            _replicate(block.attention.k_norm, mesh, Shard(2))
        # the input becomes a DTensor once for all matrices that read it: its gradient is then summed once
        for part in (block.attention, block.feed_forward):
            part.register_forward_pre_hook(functools.partial(_enter, mesh=mesh, placement=Replicate()))
        plan = {
            **{f"attention.{name}": ColwiseParallel() for name in ("w_q", "w_k", "w_v")},
            **{f"feed_forward.{name}": ColwiseParallel() for name in ("w_gate", "w_up")},
            "attention.w_o": RowwiseParallel(),
            "feed_forward.w_down": RowwiseParallel(),
        }
        parallelize_module(block, mesh, plan, src_data_rank=None)
    _replicate(model.norm, mesh, Replicate())
    parallelize_module(model, mesh, {"output": ColwiseParallel(output_layouts=Replicate())}, src_data_rank=None)
    embedding = model.tok_embeddings
    embedding.weight = model.output.weight if model.config.tied_embeddings else _placed(embedding, mesh, Shard(0))
    embedding.register_forward_pre_hook(functools.partial(_enter, mesh=mesh, placement=Replicate()))
    embedding.register_forward_hook(_leave)
    model.loss = SplitLoss(model.loss, mesh.get_group(), split=True)


def _replicate(norm: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    """Compute a norm of plain tensors, which are placed so, with a replicated weight.

    As DTensors all parameters are of the same mesh, and a weight's gradient knows whether it has to be summed.
    """
    norm.weight = _placed(norm, mesh, Replicate())
    norm.register_forward_pre_hook(functools.partial(_enter, mesh=mesh, placement=placement))
    norm.register_forward_hook(_leave)


def _placed(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    """The module's weight, placed so."""
    return nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [placement], src_data_rank=None))


def _enter(module: nn.Module, inputs: tuple[Any, ...], *, mesh: DeviceMesh, placement: Placement) -> tuple[Any, ...]:
    """Make a DTensor of a module's first input."""
    return (DTensor.from_local(inputs[0], mesh, [placement], run_check=False), *inputs[1:])


def _leave(module: nn.Module, inputs: tuple[Any, ...], output: DTensor) -> Tensor:
    """What this worker has of a module's output; of sums over the workers the whole."""
    if output.placements[0].is_partial():
        output = output.redistribute(placements=[Replicate()])
    return output.to_local()
