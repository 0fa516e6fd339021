"""FSDP2 on two gloo processes against one process: losses, gradient norms and weights."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from models.config import ModelConfig, OptimizerConfig
from models.optimizer import build_optimizer, grad_norm
from models.parallel import compile_model, parallelize, set_gradient_sync
from models.transformer import Transformer

TINY = ModelConfig(vocab_size=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=32)
TIED = replace(TINY, tied_embeddings=True, qk_norm=True)
STEPS = 5


def train(config, rank, world_size):
    """Losses, gradient norms and final weights of some steps of two microbatches, on this rank's part of the batch."""
    torch.set_num_threads(1)
    model = parallelize(Transformer(config, seed=1), world_size, "cpu")
    optimizer = build_optimizer(model, OptimizerConfig(lr=3e-3))
    generator = torch.Generator().manual_seed(0)
    losses, norms = [], []
    for _ in range(STEPS):
        batch = torch.randint(0, 61, (2, 4, 17), generator=generator)  # microbatches, sequences, tokens
        total = torch.zeros(())
        for i, microbatch in enumerate(batch):
            set_gradient_sync(model, i == 1)
            mine = microbatch.chunk(world_size)[rank]
            loss = model(mine[:, :-1], mine[:, 1:]) / 2
            loss.backward()
            total += loss.detach()
        norm = grad_norm(model)
        norms.append(norm.item())
        optimizer.grad_scale = (norm / 0.5).clamp(min=1)
        optimizer.step()
        optimizer.zero_grad()
        if world_size > 1:
            dist.all_reduce(total)
        losses.append(total.item() / world_size)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return losses, norms, whole


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = [train(config, rank, 2) for config in (TINY, TIED)]
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.destroy_process_group()


def test_two_sharded_workers_equal_one(tmp_path):
    torch.multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)
    for config, (losses, norms, weights) in zip((TINY, TIED), torch.load(tmp_path / "results.pt"), strict=True):
        expected_losses, expected_norms, expected_weights = train(config, 0, 1)
        assert losses == pytest.approx(expected_losses, rel=1e-5)
        assert norms == pytest.approx(expected_norms, rel=1e-5)
        torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-5)


def test_one_worker_on_the_cpu_stays_plain_fp32():
    model = parallelize(Transformer(TINY, seed=1), 1, "cpu")
    reference = Transformer(TINY, seed=1)
    tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(tokens), reference(tokens), rtol=0, atol=0)


def test_compiled_model_has_equal_loss_gradients_and_names(monkeypatch):
    # the tracing is what can go wrong; code generation is torch's own and slow to run here
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend="aot_eager"))
    tokens = torch.randint(0, 61, (2, 18), generator=torch.Generator().manual_seed(0))
    results = []
    for prepare in (compile_model, lambda model: model):
        model = prepare(Transformer(TIED, seed=1))
        loss = model(tokens[:, :-1], tokens[:, 1:], loss_chunk=10)
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
