"""Every layout of gloo processes against one process: losses, gradient norms, weights; and what compilation makes."""

from dataclasses import replace

import pytest
import torch
import torch._functorch.config
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh

from models.attention import document_index
from models.config import ModelConfig, OptimizerConfig
from models.hugging_face import Pretrained, save_pretrained
from models.mesh import Parallelism, data_rank_and_world, make_mesh
from models.optimizer import build_optimizer, grad_norm
from models.parallel import compile_model, parallelize, set_gradient_sync
from models.tensor_parallel import split_matrices
from models.transformer import Transformer

TINY = ModelConfig(vocab_size=64, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=32)
TIED = replace(TINY, tied_embeddings=True, qk_norm=True, head_width=16)  # heads wider than d_model together
CONFIGS = {2: (TINY, TIED), 4: (TIED,)}  # by the number of workers
STEPS = 2
TOKENS = 2 * 4 * 16  # in a step: microbatches, sequences, targets

LAYOUTS_OF_2 = [
    Parallelism(),
    Parallelism(gather="step"),
    Parallelism(gather="block"),
    Parallelism(shard_workers=1),
    Parallelism(tensor_parallel=2),
    Parallelism(context_parallel=2),
    Parallelism(context_parallel=2, shard_workers=1),
]
LAYOUTS_OF_4 = [
    Parallelism(shard_workers=2),
    Parallelism(shard_workers=2, gather="block"),
    Parallelism(tensor_parallel=2, shard_workers=1),
    Parallelism(tensor_parallel=2, context_parallel=2),
    Parallelism(context_parallel=4),  # more workers than key and value heads
]


def whole_weights(model):
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def train(config, layout=None, **options):
    """Losses and gradient norms of some steps of two microbatches, losses of tokens; weights before and after.

    Documents are kept apart in the model with tied embeddings.

    With a layout, by all processes together, from a model on the meta device.
    """
    torch.set_num_threads(1)
    mesh = make_mesh(layout, "cpu") if layout else None
    with torch.device("meta" if layout else "cpu"):
        model = Transformer(config, seed=None)
    parallelize(model, mesh, "cpu", **options).init_weights(1)
    first = {name: weight.clone() for name, weight in whole_weights(model).items()}
    optimizer = build_optimizer(model, OptimizerConfig(lr=3e-3))
    rank, world = data_rank_and_world(mesh)
    generator = torch.Generator().manual_seed(0)
    losses, norms = [], []
    for _ in range(STEPS):
        batch = torch.randint(0, 64, (2, 4, 17), generator=generator)
        total = torch.zeros(())
        for i, microbatch in enumerate(batch):
            set_gradient_sync(model, i == 1)
            mine = microbatch.chunk(world)[rank]
            inputs, targets = mine[:, :-1], mine[:, 1:]
            documents = document_index(inputs, 0) if config.tied_embeddings else None
            reduction = ("none", "sum")[i]  # both give the loss of the whole step
            loss, by_token = model(inputs, targets, reduction=reduction, token_losses=True, documents=documents)
            loss = loss.sum()
            (loss * world / TOKENS).backward()
            total += loss.detach()
        norm = grad_norm(model)
        norms.append(norm.item())
        optimizer.grad_scale = (norm / 0.5).clamp(min=1)
        optimizer.step()
        optimizer.zero_grad()
        if mesh is not None:
            dist.all_reduce(total)
            total *= world / dist.get_world_size()
        losses.append(total.item() / TOKENS)
    with torch.no_grad():
        after = model(inputs, targets, reduction="none")
        mean = model(inputs, targets)
    torch.testing.assert_close(mean, after.mean(), rtol=1e-5, atol=0)
    return losses, norms, torch.stack([by_token, after]), first, whole_weights(model)


def read_weights(config, layout, folder):
    """Weights of a model on the meta device that each worker has read its parts of."""
    with torch.device("meta"):
        model = Transformer(config, seed=None)
    parallelize(model, make_mesh(layout, "cpu"), "cpu")
    model.read_weights(Pretrained(stored(config, folder)).tensors)
    table = Transformer(config, seed=None).rotary
    assert torch.equal(model.rotary, table)
    return whole_weights(model)


def stored(config, folder):
    return f"{folder}/{'tied' if config.tied_embeddings else 'untied'}"


def store(configs, folder):
    for config in configs:
        state = Transformer(config, seed=1).state_dict()
        save_pretrained(state, config, stored(config, folder), max_shard_size=20_000)


def compiled_graphs():
    """How many graphs a sharded model of three blocks is made of, used with gradients and without."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter, compile_ = CompileCounterWithBackend("aot_eager"), torch.compile
    torch._dynamo.reset()
    torch.compile = lambda function, **_: compile_(function, backend=counter, dynamic=False)
    counts = []
    for gather in ("whole", "block"):
        model = parallelize(Transformer(TINY, seed=1), make_mesh(Parallelism(gather=gather), "cpu"), "cpu")
        compile_model(model)
        tokens = torch.zeros(2, 17, dtype=torch.int64)
        before = counter.frame_count
        for step in range(3):
            set_gradient_sync(model, step % 2 == 1)
            model(tokens[:, :-1], tokens[:, 1:]).backward()
        counts.append(counter.frame_count - before)
    torch.compile = compile_
    return counts


def worker(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    layouts = LAYOUTS_OF_2 if world == 2 else LAYOUTS_OF_4
    results = [train(config, layout) for config in CONFIGS[world] for layout in layouts]
    counts = None
    if world == 2:
        results.append(train(TINY, LAYOUTS_OF_2[2], recompute=0.5))
        results += [train(TIED, layout, precision="bf16") for layout in LAYOUTS_OF_2]
        counts = compiled_graphs()
    read = [read_weights(config, layout, folder) for config in CONFIGS[world] for layout in layouts]
    if rank == 0:
        torch.save((results, counts, read), f"{folder}/results.pt")
    dist.destroy_process_group()


def equal_the_stored(read, layouts, configs):
    for config in configs:
        expected = Transformer(config, seed=1).state_dict()
        for layout in layouts:
            torch.testing.assert_close(next(read), expected, rtol=0, atol=0, msg=str(layout))


def equal_one_worker(results, layouts, configs):
    for config in configs:
        expected = train(config)
        for layout in layouts:
            losses, norms, by_token, first, weights = next(results)
            for name, weight in first.items():
                assert torch.equal(weight, expected[3][name]), (layout, name)
            assert losses == pytest.approx(expected[0], rel=1e-5), layout
            assert norms == pytest.approx(expected[1], rel=1e-5), layout
            torch.testing.assert_close(by_token, expected[2][:, : by_token.shape[1]], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(weights, expected[4], rtol=1e-4, atol=1e-4)  # Adam enlarges what is near 0


def test_two_workers_equal_one_in_every_layout(tmp_path):
    store(CONFIGS[2], tmp_path)
    torch.multiprocessing.spawn(worker, args=(2, str(tmp_path)), nprocs=2)
    results, counts, read = torch.load(tmp_path / "results.pt")
    equal_the_stored(iter(read), LAYOUTS_OF_2, CONFIGS[2])
    results = iter(results)
    equal_one_worker(results, LAYOUTS_OF_2, CONFIGS[2])
    losses, norms, *_ = next(results)
    recomputed = train(TINY)
    assert losses == pytest.approx(recomputed[0], rel=1e-5)
    assert norms == pytest.approx(recomputed[1], rel=1e-5)
    exact = train(TIED)
    for layout, (losses, norms, *_) in zip(LAYOUTS_OF_2, results, strict=True):
        assert losses == pytest.approx(exact[0], rel=1e-2), layout
        assert norms == pytest.approx(exact[1], rel=5e-2), layout
        assert losses != pytest.approx(exact[0], rel=1e-7), layout  # bf16 it is
    assert counts[0] == 3  # what comes before the blocks, a block that all share, and what comes after
    assert counts[1] <= 3


def test_four_workers_equal_one_in_layouts_of_two_dimensions(tmp_path):
    store(CONFIGS[4], tmp_path)
    torch.multiprocessing.spawn(worker, args=(4, str(tmp_path)), nprocs=4)
    results, _, read = torch.load(tmp_path / "results.pt")
    equal_the_stored(iter(read), LAYOUTS_OF_4, CONFIGS[4])
    equal_one_worker(iter(results), LAYOUTS_OF_4, CONFIGS[4])


def test_one_worker_on_the_cpu_stays_plain_fp32():
    model = parallelize(Transformer(TINY, seed=1), None, "cpu")
    reference = Transformer(TINY, seed=1)
    tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(tokens), reference(tokens), rtol=0, atol=0)


@pytest.mark.parametrize("recompute", [1.0, 0.3])
def test_compiled_model_has_equal_loss_gradients_and_names(monkeypatch, recompute):
    # the tracing is what can go wrong; code generation is torch's own and slow to run here
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_(function, backend="aot_eager"))
    tokens = torch.randint(0, 61, (2, 18), generator=torch.Generator().manual_seed(0))
    results = []
    for prepare in (compile_model, lambda model: model):
        with torch._functorch.config.patch():  # what the compilation sets goes
            model = prepare(parallelize(Transformer(TIED, seed=1), None, "cpu", recompute=recompute))
            loss = model(tokens[:, :-1], tokens[:, 1:], loss_chunk=10)
            loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_split_matrices_are_recomputed_by_the_compiler(monkeypatch):
    compile_ = torch.compile  # a backend that chooses what to recompute
    monkeypatch.setattr(torch, "compile", lambda f, **_: compile_(f, backend="aot_eager_decomp_partition"))
    tokens = torch.randint(0, 61, (2, 18), generator=torch.Generator().manual_seed(0))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with torch._functorch.config.patch():  # what the compilation sets goes
            model = Transformer(replace(TINY, n_layers=1), seed=1)
            split_matrices(model, init_device_mesh("cpu", (1,)))
            model.recompute = 0.5
            loss = compile_model(model)(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(loss, Transformer(replace(TINY, n_layers=1), seed=1)(tokens[:, :-1], tokens[:, 1:]))


def saved_bytes(model, tokens):
    """What the forward pass keeps for the backward pass, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens[:, :-1], tokens[:, 1:])
    return sum(kept.values())


def test_recomputed_blocks_keep_less():
    tokens = torch.zeros(4, 33, dtype=torch.int64)
    kept = [
        saved_bytes(parallelize(Transformer(TINY, seed=1), None, "cpu", recompute=share), tokens)
        for share in (1.0, 0.5, 0.0)
    ]
    assert kept[0] > 1.3 * kept[1] > 1.3 * kept[2]


@pytest.mark.parametrize(
    ("layout", "workers", "said"),
    [
        (Parallelism(tensor_parallel=3), 6, "n_heads"),
        (Parallelism(tensor_parallel=2), 3, "divides the 3 workers"),
        (Parallelism(shard_workers=3), 4, "shard_workers is 3"),
        (Parallelism(context_parallel=8), 8, "context_parallel is 8"),
        (Parallelism(context_parallel=0), 8, "at least 1"),
    ],
)
def test_layouts_that_do_not_fit_are_refused_by_name(layout, workers, said):
    with pytest.raises(ValueError, match=said):
        layout.check(workers, TINY, 16)


def test_layouts_that_fit_are_accepted():
    Parallelism().check(3, TINY, 15)
    Parallelism(shard_workers=2, tensor_parallel=2, context_parallel=2).check(8, TINY, 16)
