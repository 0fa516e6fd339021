"""Sharding, replication, precision, recomputation and compilation, applied to a plain model from outside.

Weights, gradients and the optimizer's state are fp32 and may be spread over workers (FSDP2; Zhao et al. 2023). What is
computed with is made from them: in bf16 or fp8 on GPUs. Layouts are made by `models.mesh`; how matrices and sequences
are split is in `models.tensor_parallel` and `models.context`.
"""

import functools
from typing import Literal

import torch
import torch._functorch.config
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from models.collectives import SplitLoss
from models.context import split_sequences
from models.mesh import Mesh
from models.tensor_parallel import split_matrices
from models.transformer import Transformer

Precision = Literal["auto", "bf16", "fp8", "fp32"]
"""Of matrix products and activations. auto: bf16 on GPUs, fp32 on the CPU."""

# what gathering a whole model at once takes at its peak, by parameter: weights in bf16 and their copy in the buffer
# they arrive in; gradients in fp32, their copy in the buffer they leave in, and what comes back
_BYTES_WHOLE = 2 + 2 + 4 + 4 + 2
_SMALL = 2**20  # elements; gradients below are reduced together, those above alone and in place


def parallelize(
    model: Transformer,
    mesh: Mesh | None,
    device: torch.device | str,
    *,
    precision: Precision = "auto",
    recompute: float = 1.0,
) -> Transformer:
    """Lay the model out over the workers of a mesh, on this worker's device.

    A model on the meta device is materialised here, no worker ever having more than its part; call its `init_weights`
    next, also when a checkpoint is loaded after it: there are no weights yet, and no rotary table. Others need equal
    weights on all workers. After the last backward pass of a step, gradients are averages over the data workers (see
    `set_gradient_sync`).

    Args:
        model: plain, as it was built.
        mesh: of `models.mesh.make_mesh`; None is one worker.
        device: this worker's device.
        precision: of matrix products and activations; weights, their gradients' sums and moments are always fp32.
        recompute: share of the memory for activations that may be used, 0 to 1. What is not kept is computed again in
            the backward pass. A compiled model chooses within each block what is cheap to compute again; one that is
            not recomputes whole blocks.

    Returns:
        The same model, changed in place.

    Raises:
        ValueError: recompute is out of range, or fp8 is combined with what it cannot be.
    """
    device = torch.device(device)
    if not 0 <= recompute <= 1:
        raise ValueError(f"recompute is {recompute}, but must be in [0, 1]")
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    dtype = None if precision == "fp32" else torch.bfloat16
    on_meta = any(p.is_meta for p in model.parameters())
    if not on_meta:
        model.to(device)
    if precision == "fp8":
        _to_float8(model, mesh)
    if mesh is not None and mesh.context_world > 1:
        split_sequences(model, mesh)
    model.recompute = recompute
    _checkpoint_blocks(model, 1 - recompute)
    if mesh is None or (mesh.shards == 1 and mesh.tensor == 1):
        model.compute_dtype = dtype
        if on_meta:
            _materialize(model, device)
        if mesh is not None:
            _average_gradients(model, mesh.weights["replicate"].get_group())
        return model
    if mesh.tensor > 1:
        split_matrices(model, mesh.weights["tensor"])
    _shard(model, mesh, dtype, device)
    if on_meta:
        _materialize(model, device)
    return model


def set_gradient_sync(model: nn.Module, last_microbatch: bool) -> None:
    """Say before each microbatch whether it is the last of its step.

    After the backward pass of the last one, and only then, gradients are averages over the data-parallel workers; what
    happens before that is up to the layout.
    """
    model.last_microbatch = last_microbatch
    if not isinstance(model, FSDPModule):
        return
    if model.gather == "block":
        # gradients leave their worker as soon as they are there, and copies of the weights exchange theirs once
        model.set_requires_all_reduce(last_microbatch)
    else:
        # weights stay whole and gradients local until the end of the step
        model.set_requires_gradient_sync(last_microbatch)
        model.set_reshard_after_backward(last_microbatch)


def compile_model(model: Transformer, mode: str | None = None) -> Transformer:
    """Compile in place, after `parallelize`; parameter names stay as they are.

    All blocks share one compiled block, which is ready in a quarter of the time that one graph of the whole model takes
    and no slower: a block leaves its last sum to the norm that follows it. What lies before and after the blocks is
    compiled too; where matrices or sequences are split, of that the loss alone.

    Args:
        model: of `parallelize`, or plain.
        mode: of `torch.compile`.
    """
    compile_ = functools.partial(torch.compile, mode=mode, dynamic=False)
    recompute = getattr(model, "recompute", 1.0)
    # read when a graph is made, which is at its first use, so they stay set
    torch._functorch.config.activation_memory_budget = recompute
    if hasattr(torch._functorch.config, "unsafe_treat_script_objects_as_zero_size"):
        # the meshes of split matrices are such objects, which torch 2.13 cannot weigh when it is to recompute
        torch._functorch.config.unsafe_treat_script_objects_as_zero_size = True
    for block in model.layers:
        block.__dict__.pop("forward", None)  # the compiler chooses better what to recompute
        block.forward = compile_(block.forward)
    if not isinstance(model.loss, SplitLoss):
        model.embed, model.loss_of = compile_(model.embed), compile_(model.loss_of)
        return model
    place = model
    while isinstance(place.loss, SplitLoss):
        place = place.loss
    place.loss = compile_(place.loss)
    return model


def _to_float8(model: Transformer, mesh: Mesh | None) -> None:
    if mesh is not None and mesh.tensor > 1:
        raise ValueError("precision is fp8, but must be bf16 or fp32 with tensor_parallel above 1")
    from models.float8 import convert

    convert(model)


def _materialize(model: Transformer, device: torch.device) -> None:
    model.to_empty(device=device)
    if model.config.tied_embeddings:  # tied again, should they have got memory of their own
        model.output.weight = model.tok_embeddings.weight


# Sharding


def _shard(model: Transformer, mesh: Mesh, dtype: torch.dtype | None, device: torch.device) -> None:
    """FSDP2 over the mesh's "shard" dimension, with copies over "replicate"."""
    model.gather = mesh.parallelism.gather
    if model.gather == "auto":
        whole = model.config.n_params() / mesh.tensor * _BYTES_WHOLE
        memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else float("inf")
        model.gather = "whole" if whole <= memory / 4 else "block"
    options = {
        "mesh": mesh.weights["replicate", "shard"] if mesh.replicas > 1 else mesh.weights["shard"],
        # inputs stay as they are: the residual stream is bf16 already, and the rotary table must not become it
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32, cast_forward_inputs=False
        ),
        "reshard_after_forward": model.gather == "block",
    }
    if model.gather != "whole":
        for block in model.layers:
            fully_shard(block, **options)
        # one block's weights travel while the one before is computed; backward does so by itself
        for block, following in zip(model.layers, list(model.layers)[1:], strict=False):
            block.set_modules_to_forward_prefetch([following])
    # the head is needed at the end of the forward pass and at the start of the backward pass: not freed in between
    fully_shard(model, **{**options, "reshard_after_forward": False})
    model.register_forward_hook(_free_without_gradients)


def _free_without_gradients(model: nn.Module, inputs: object, output: object) -> None:
    """After a forward pass that no backward pass follows, drop the gathered weights: those they were gathered from may
    be loaded from a checkpoint next.
    """
    if not torch.is_grad_enabled():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


# Replication


def _average_gradients(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Have the backward pass of a step's last microbatch end with gradients that are averages over the group.

    Large gradients are reduced in place as they come, small ones together at the end.
    """
    on_gpu = next(model.parameters()).is_cuda
    op = dist.ReduceOp.AVG if on_gpu else dist.ReduceOp.SUM  # gloo cannot average
    model.last_microbatch = True
    pending: list[tuple[dist.Work, Tensor]] = []
    small: list[Tensor] = []

    def reduce(gradient: Tensor) -> None:
        pending.append((dist.all_reduce(gradient, op, group=group, async_op=True), gradient))

    def finish() -> None:
        together = torch.cat([gradient.flatten() for gradient in small]) if small else None
        if together is not None:
            reduce(together)
        for work, gradient in pending:
            work.wait()
            if not on_gpu:
                gradient.div_(group.size())
        if together is not None:
            for gradient, part in zip(small, together.split([g.numel() for g in small]), strict=True):
                gradient.copy_(part.view_as(gradient))
        pending.clear()
        small.clear()

    def arrived(parameter: Tensor) -> None:
        if not model.last_microbatch:
            return
        if not pending and not small:
            torch.autograd.Variable._execution_engine.queue_callback(finish)
        if parameter.grad.numel() < _SMALL:
            small.append(parameter.grad)
        else:
            reduce(parameter.grad)

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(arrived)


# Recomputation


def _checkpoint_blocks(model: Transformer, share: float) -> None:
    """Recompute a share of the blocks as a whole, evenly spread (Chen et al. 2016)."""
    for i, block in enumerate(model.layers):
        if round((i + 1) * share) > round(i * share):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
