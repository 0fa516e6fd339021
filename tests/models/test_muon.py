"""Orthogonalization against singular values, and of matrices cut over gloo processes against whole ones."""

import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from models.config import ModelConfig, OptimizerConfig
from models.muon import newton_schulz, orthogonalize, splits, update_scale
from models.optimizer import Optimizer, build_optimizer, grad_norm
from models.transformer import Transformer

# widths that two ranks cannot share evenly
ODD = ModelConfig(vocab_size=61, d_model=28, n_layers=3, n_heads=2, n_kv_heads=1, d_ff=33, max_seq_len=32)
TOKENS = torch.randint(0, 61, (4, 17), generator=torch.Generator().manual_seed(0))
LR = 1e-2


@pytest.mark.parametrize("shape", [(5, 16, 16), (2, 8, 40), (3, 40, 8)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    result = newton_schulz(matrices)
    for matrix, moved in zip(matrices, result, strict=True):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        aligned = u.T @ moved @ vh.T
        values = aligned.diagonal()[s > 0.02 * s[0]]
        assert values.min() > 0.6
        assert values.max() < 1.25
        torch.testing.assert_close(aligned, aligned.diagonal().diag(), rtol=0, atol=1e-4)


def test_updates_are_as_large_as_adamws():
    update = newton_schulz(torch.randn(1, 64, 256, generator=torch.Generator().manual_seed(0)))[0]
    assert (update * update_scale(update.shape)).square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)


def test_nothing_becomes_nothing():
    assert newton_schulz(torch.zeros(1, 4, 6)).abs().max() == 0


def run(processes, target, folder):
    torch.multiprocessing.spawn(_process, args=(target, processes, str(folder)), nprocs=processes)
    return torch.load(folder / "result.pt")


def _process(rank, target, processes, folder):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes)
    result = target(rank)
    if rank == 0:
        torch.save(result, f"{folder}/result.pt")
    dist.destroy_process_group()


def train(rank, world, checkpoint=None):
    """Norms, weights and optimizer state after some steps, one of them skipped; every rank sees all tokens.

    All of it is written to the folder `checkpoint` before the last step, or read from there when there is something.
    """
    model = Transformer(ODD, seed=1)
    if world > 1:
        for block in model.layers:
            fully_shard(block)
        fully_shard(model)
    optimizer = build_optimizer(model, OptimizerConfig(kind="muon", lr=LR))
    norms, whole = [], StateDictOptions(full_state_dict=True, cpu_offload=True)
    done = 0
    if checkpoint and os.path.exists(checkpoint):
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(states, checkpoint_id=checkpoint, no_dist=world == 1)
        set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
        done = 3
    for step in range(done, 4):
        if step == 3 and checkpoint and not done:
            states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            dcp.save(states, checkpoint_id=checkpoint)
        model(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
        norms.append(grad_norm(model).item())
        if step == 2 and rank == world - 1:  # one rank's piece
            gradient = model.layers[1].feed_forward.w_up.weight.grad
            (gradient.to_local() if world > 1 else gradient)[-1, 3] = float("nan")
        norm = grad_norm(model)
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.grad_scale = norm
        optimizer.step()
        optimizer.zero_grad()
    weights = get_model_state_dict(model, options=whole)
    state = get_optimizer_state_dict(model, optimizer, options=whole).get("state")  # rank 0 has it
    return norms, weights, state


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_two_sharded_workers_equal_one_and_one_can_go_on(tmp_path):
    checkpoint = str(tmp_path / "checkpoint")
    norms, weights, state = run(2, partial(train, world=2, checkpoint=checkpoint), tmp_path)
    expected_norms, expected_weights, expected_state = train(0, 1)
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, expected_state, rtol=1e-4, atol=1e-6)
    assert any("momentum_buffer" in value for value in state.values())
    _, weights, state = train(0, 1, checkpoint)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, expected_state, rtol=1e-4, atol=1e-6)


class Pair(nn.Module):
    """Two matrices as a feed-forward layer has them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(12, 20, bias=False), nn.Linear(20, 12, bias=False)
        self.norm = nn.LayerNorm(12, bias=False)

    def forward(self, x):
        return self.norm(x + self.down(torch.relu(self.up(x))))


def step_pair(model):
    """Weights and gradient norm after a step on a fixed input."""
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
    model(x).square().mean(0)[:5].sum().backward()
    norm = grad_norm(model)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "algorithm": "muon"}, {"params": others}]
    optimizer = Optimizer(groups, lr=0.1, weight_decay=0.1)
    optimizer.step()
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return norm.item(), weights


def layouts(rank):
    """The pair under every layout of four ranks, and loose matrices of one."""
    results = {}
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(Pair(), mesh["tensor"], plan)
    results["tensor"] = step_pair(model)
    model = parallelize_module(Pair(), mesh["tensor"], plan)
    results["shard and tensor"] = step_pair(fully_shard(model, mesh=mesh["data"]))
    results["replicate and shard"] = step_pair(fully_shard(Pair(), mesh=mesh))
    line = init_device_mesh("cpu", (4,))
    results["shard"] = step_pair(fully_shard(Pair(), mesh=line))

    # more matrices than ranks, fewer than ranks, pieces of different sizes, empty ones
    for n, rows, cols in ((7, 9, 5), (2, 3, 8)):
        whole = torch.randn(n, rows, cols, generator=torch.Generator().manual_seed(2))
        for placements in ([Shard(0), Shard(1)], [Replicate(), Shard(1)], [Shard(0), Shard(0)]):
            pieces = [distribute_tensor(matrix, mesh, placements) for matrix in whole]
            local = torch.stack([piece.to_local() for piece in pieces])
            local = orthogonalize(local, splits(pieces[0]), first=3)
            expected = [distribute_tensor(m, mesh, placements).to_local() for m in newton_schulz(whole)]
            torch.testing.assert_close(local, torch.stack(expected), rtol=1e-4, atol=1e-5)

    # a sum over ranks that is still to be made, as tensor parallelism leaves it
    loose = nn.Module()
    loose.weight = nn.Parameter(distribute_tensor(torch.zeros(4), line, [Replicate()]))
    loose.weight.grad = DTensor.from_local(torch.ones(4), line, [Partial()], run_check=False)
    torch.testing.assert_close(grad_norm(loose), torch.tensor(8.0))
    Optimizer([{"params": [loose.weight]}], lr=1.0).step()
    torch.testing.assert_close(loose.weight.to_local(), -torch.ones(4))
    return results


def test_every_layout_of_four_ranks_equals_one(tmp_path):
    norm, weights = step_pair(Pair())
    for name, (its_norm, its_weights) in run(4, layouts, tmp_path).items():
        assert its_norm == pytest.approx(norm, rel=1e-5), name
        torch.testing.assert_close(its_weights, weights, rtol=1e-4, atol=1e-5, msg=name)
