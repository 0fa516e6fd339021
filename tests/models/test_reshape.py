"""A checkpoint of one layout, loaded into others: logits, and the loss after another step, which needs the moments."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from jobs.run_folder import StoredRun
from models.config import ModelConfig, OptimizerConfig
from models.mesh import Parallelism, data_rank_and_world, make_mesh
from models.optimizer import build_optimizer
from models.parallel import parallelize, set_gradient_sync
from models.training import checkpoints
from models.transformer import Transformer

TINY = ModelConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=32)
TIED = replace(TINY, tied_embeddings=True, qk_norm=True)
CASES = [(TINY, "adamw"), (TIED, "adamw"), (TINY, "muon")]
LAYOUTS = {"sharded": Parallelism(), "split": Parallelism(tensor_parallel=2), "copied": Parallelism(shard_workers=1)}
FOLDER = "checkpoints/step-{}"


def build(config, kind, layout, seed):
    torch.set_num_threads(1)
    mesh = make_mesh(layout, "cpu") if layout else None
    model = parallelize(Transformer(config, seed), mesh, "cpu")
    return model, build_optimizer(model, OptimizerConfig(kind=kind, lr=3e-3)), data_rank_and_world(mesh)


def step(model, optimizer, share):
    """Train on one batch, divided among the data workers."""
    rank, world = share
    batch = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(0)).chunk(world)[rank]
    set_gradient_sync(model, True)
    model(batch[:, :-1], batch[:, 1:]).backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def logits(model):
    return model(torch.arange(24).view(2, 12)).clone()


def saved(run, case):
    """Train on two sharded workers and save; logits then, and after another step."""
    model, optimizer, share = build(*CASES[case], LAYOUTS["sharded"], seed=1)
    for _ in range(2):
        step(model, optimizer, share)
    checkpoints.save(run, FOLDER.format(case), model, optimizer, {"note": case})
    return after(model, optimizer, share)


def loaded(run, case, layout):
    """What `saved` gives, from its checkpoint, in another layout."""
    model, optimizer, share = build(*CASES[case], layout, seed=2)
    assert checkpoints.load(run, FOLDER.format(case), model, optimizer)["note"] == case
    return after(model, optimizer, share)


def after(model, optimizer, share):
    before = logits(model)
    step(model, optimizer, share)
    return before, logits(model)


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    run = StoredRun(folder)
    results = {}
    for case in range(len(CASES)):
        results[case, "saved"] = saved(run, case)
        for name, layout in LAYOUTS.items():
            results[case, name] = loaded(run, case, layout)
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("reshape"))
    torch.multiprocessing.spawn(worker, args=(folder,), nprocs=2)
    run = StoredRun(folder)
    return torch.load(f"{folder}/results.pt") | {
        (case, "one worker"): loaded(run, case, None) for case in range(len(CASES))
    }


@pytest.mark.parametrize("layout", [*LAYOUTS, "one worker"])
def test_checkpoint_of_two_sharded_workers_goes_on_in_any_layout(results, layout):
    for case in range(len(CASES)):
        expected, expected_next = results[case, "saved"]
        here, following = results[case, layout]
        torch.testing.assert_close(here, expected, rtol=0, atol=1e-5)
        assert (expected_next - expected).abs().max() > 1e-2  # another step makes a difference
        torch.testing.assert_close(following, expected_next, rtol=0, atol=1e-3)
