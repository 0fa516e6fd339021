"""Sharding, precision and compilation, applied to a plain model from outside."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from models.loss import cross_entropy
from models.transformer import Transformer


def parallelize(model: Transformer, world_size: int, device: torch.device | str) -> Transformer:
    """Move the model to its device and, with more than one worker, shard it there with FSDP2.

    Weights, gradients and the optimizer's state are fp32. On CUDA, matrix products and activations are bf16: FSDP2
    gathers bf16 weights and reduces gradients in fp32; one worker uses autocast, which needs no gathering. On the
    CPU everything is fp32.

    Args:
        model: with equal weights on every worker.
        world_size: number of workers; above 1, the default process group must exist.
        device: this worker's device.

    Returns:
        The same model, changed in place.
    """
    device = torch.device(device)
    model.to(device)
    on_gpu = device.type == "cuda"
    if world_size == 1:
        model.compute_dtype = torch.bfloat16 if on_gpu else None
        return model
    mesh = init_device_mesh(device.type, (world_size,))
    # inputs stay as they are: the residual stream is bf16 already, and the rotary table must not become it
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        if on_gpu
        else MixedPrecisionPolicy(cast_forward_inputs=False)
    )
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def set_gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Whether the next backward pass reduces gradients over the workers.

    Off for all but the last microbatch of a step when gradients are accumulated: they are summed locally, unsharded.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)


def compile_model(model: Transformer) -> Transformer:
    """Compile in place, after `parallelize`; parameter names stay as they are.

    A model on one worker becomes one graph. A sharded one is compiled block by block, because FSDP2's gathering
    happens between blocks, and so is its loss.
    """
    if isinstance(model, FSDPModule):
        for block in model.layers:
            block.forward = torch.compile(block.forward)
        model.loss = torch.compile(cross_entropy)
    else:
        model.forward = torch.compile(model.forward)
    return model
