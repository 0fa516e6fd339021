"""AdamW, Muon, clipping and schedules against torch's own, a hand-written update, and closed forms."""

import math

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils._python_dispatch import TorchDispatchMode

import models.optimizer as optimizer_module
from models.config import ModelConfig, OptimizerConfig, ScheduleConfig
from models.optimizer import build_optimizer, easing, grad_norm, learning_rate, param_groups
from models.transformer import Transformer

TINY = ModelConfig(vocab_size=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=32)
TOKENS = torch.randint(0, 61, (4, 17), generator=torch.Generator().manual_seed(0))


def loss_of(model):
    return model(TOKENS[:, :-1], TOKENS[:, 1:])


def of_torch(model, weight_decay=0.1):
    """Groups for torch's own optimizers."""
    decayed = [p for n, p in model.named_parameters() if p.ndim == 2 and "embeddings" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim == 1 or "embeddings" in n]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def everything(model, optimizer):
    """Copies of all weights and all of the optimizer's state, by name."""
    values = {}
    for name, p in model.named_parameters():
        values[name] = p.detach().clone()
        for key, value in optimizer.state[p].items():
            values[f"{name} {key}"] = value.clone()
    return values


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k].view(torch.int32), b[k].view(torch.int32)) for k in a)


def named_groups(model, config):
    """Each group's settings, and the names of its parameters."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [(group, {names[id(p)] for p in group["params"]}) for group in param_groups(model, config)]


@pytest.mark.parametrize("tied", [False, True])
def test_only_matrices_of_linear_layers_decay(tied):
    model = Transformer(ModelConfig(**{**vars(TINY), "tied_embeddings": tied, "qk_norm": True}))
    groups = named_groups(model, OptimizerConfig(lr=2.0, weight_decay=0.1, eps=1e-6))
    assert sorted(name for _, names in groups for name in names) == sorted(n for n, _ in model.named_parameters())
    for group, names in groups:
        spared = {"norm" in name or name == "tok_embeddings.weight" for name in names}
        assert spared == {group["weight_decay"] == 0.0}
        assert group["weight_decay"] in (0.0, 0.1)
        assert (group["algorithm"], group["lr"], group["lr_scale"], group["eps"]) == ("adamw", 2.0, 1.0, 1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_muon_gets_the_blocks_matrices_alone(tied):
    model = Transformer(ModelConfig(**{**vars(TINY), "tied_embeddings": tied, "qk_norm": True}))
    for group, names in named_groups(model, OptimizerConfig(kind="muon")):
        matrices = {name.startswith("layers") and "norm" not in name for name in names}
        assert matrices == {group["algorithm"] == "muon"}


def test_updates_equal_the_paper_written_out():
    config = OptimizerConfig(lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    model = Transformer(TINY, seed=1)
    optimizer = build_optimizer(model, config)
    names = [name for name, _ in model.named_parameters()]
    weights = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    first, second = ({n: torch.zeros_like(weights[n]) for n in names} for _ in range(2))
    for step in range(1, 6):
        optimizer.zero_grad()
        loss_of(model).backward()
        for name, parameter in model.named_parameters():
            g = parameter.grad.double()
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.9 * second[name] + 0.1 * g**2
            decay = 0.0 if "norm" in name or "embeddings" in name else 0.3
            weights[name] *= 1 - 0.01 * decay
            update = (first[name] / (1 - 0.8**step)) / ((second[name] / (1 - 0.9**step)).sqrt() + 1e-6)
            weights[name] -= 0.01 * update
        optimizer.step()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.double(), weights[name], rtol=1e-5, atol=1e-6)


def test_updates_equal_torch_unfused():
    config = OptimizerConfig(lr=3e-3)
    ours, reference = Transformer(TINY, seed=1), Transformer(TINY, seed=1)
    optimizer = build_optimizer(ours, config)
    plain = torch.optim.AdamW(of_torch(reference), lr=3e-3, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    for _ in range(5):
        for model, opt in ((ours, optimizer), (reference, plain)):
            opt.zero_grad()
            loss_of(model).backward()
            opt.step()
    torch.testing.assert_close(ours.state_dict(), reference.state_dict(), rtol=1e-4, atol=1e-6)


def test_updates_equal_torch_fused_bit_for_bit():
    ours, reference = Transformer(TINY, seed=1), Transformer(TINY, seed=1)
    optimizer = build_optimizer(ours, OptimizerConfig())
    plain = torch.optim.AdamW(of_torch(reference), betas=(0.9, 0.95), eps=1e-8, fused=True)
    for step in range(4):
        for model, opt in ((ours, optimizer), (reference, plain)):
            opt.zero_grad()
            loss_of(model).backward()
            for group in opt.param_groups:
                group["lr"] = 1e-3 * (step + 1)
        optimizer.found_inf = torch.zeros(()) if step > 1 else None
        optimizer.grad_scale = torch.ones(()) if step > 2 else None
        optimizer.step()
        plain.step()
        assert same_bits(everything(ours, optimizer), everything(reference, plain))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_gradients_are_divided_by_the_scale(kind):
    models = [Transformer(TINY, seed=1) for _ in range(2)]
    for model, by_hand in zip(models, (False, True), strict=True):
        optimizer = build_optimizer(model, OptimizerConfig(kind=kind))
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model).backward()
            if by_hand:
                for p in model.parameters():
                    p.grad /= 3.7
            else:
                optimizer.grad_scale = torch.tensor(3.7)
            optimizer.step()
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1.0])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("before", [0, 2])
def test_a_skipped_step_leaves_every_bit(bad, kind, before):
    model = Transformer(TINY, seed=1)
    optimizer = build_optimizer(model, OptimizerConfig(kind=kind))
    for _ in range(before):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = everything(model, optimizer)
    loss_of(model).backward()
    for p in model.parameters():
        p.grad.flatten()[0] *= bad
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), torch.tensor(bad)
    optimizer.step()
    assert same_bits(everything(model, optimizer), kept)
    # and the run goes on as if the step had never been
    optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), None
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()
    again = Transformer(TINY, seed=1)
    reference = build_optimizer(again, OptimizerConfig(kind=kind))
    for _ in range(before + 1):
        reference.zero_grad()
        loss_of(again).backward()
        reference.step()
    assert same_bits(everything(model, optimizer), everything(again, reference))


class NoHostReads(TorchDispatchMode):
    """Refuses what would make the host wait for a device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_guarded_step_reads_nothing_back(kind):
    model = Transformer(TINY, seed=1)
    optimizer = build_optimizer(model, OptimizerConfig(kind=kind))
    loss_of(model).backward()
    with NoHostReads():
        norm = grad_norm(model)
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.grad_scale = norm.clamp(min=1.0)
        optimizer.step()
        with pytest.raises(AssertionError):
            norm.item()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_state_comes_back_through_a_distributed_checkpoint(kind, tmp_path):
    def step(model, optimizer):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    model = Transformer(TINY, seed=1)
    optimizer = build_optimizer(model, OptimizerConfig(kind=kind))
    untouched = everything(model, optimizer)
    get_state_dict(model, optimizer)
    assert same_bits(everything(model, optimizer), untouched)  # also before the first step
    step(model, optimizer)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=tmp_path / "c", no_dist=True)

    other = Transformer(TINY, seed=2)
    restored = build_optimizer(other, OptimizerConfig(kind=kind))
    weights, moments = get_state_dict(other, restored)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=tmp_path / "c", no_dist=True)
    set_state_dict(other, restored, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert same_bits(everything(model, optimizer), everything(other, restored))
    step(model, optimizer)
    step(other, restored)
    assert same_bits(everything(model, optimizer), everything(other, restored))


def test_muon_is_near_torchs_on_plain_parameters(monkeypatch):
    # as torch's iteration on any device; small singular values, which it enlarges, feel the difference
    monkeypatch.setattr(optimizer_module, "_muon_dtype", lambda device: torch.bfloat16)
    ours, reference = Transformer(TINY, seed=1), Transformer(TINY, seed=1)
    start = {name: p.detach().clone() for name, p in ours.named_parameters()}
    optimizer = build_optimizer(ours, OptimizerConfig(kind="muon", lr=1e-2, momentum=0.9))
    matrices = [p for n, p in reference.named_parameters() if p.ndim == 2 and n.startswith("layers")]
    muon = torch.optim.Muon(matrices, lr=1e-2, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups = [
        {**g, "params": [p for p in g["params"] if all(p is not m for m in matrices)]} for g in of_torch(reference)
    ]
    rest = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for _ in range(3):
        for model, opts in ((ours, [optimizer]), (reference, [muon, rest])):
            loss_of(model).backward()
            for opt in opts:
                opt.step()
                opt.zero_grad()
    for (name, mine), theirs in zip(ours.named_parameters(), reference.parameters(), strict=True):
        assert (mine - theirs).norm() < 0.02 * (theirs - start[name]).norm(), name


@pytest.mark.parametrize("max_norm", [0.01, 0.5, 1e6])
def test_clipping_by_the_scale_equals_torch(max_norm):
    ours, reference = Transformer(TINY, seed=1), Transformer(TINY, seed=1)
    optimizer = build_optimizer(ours, OptimizerConfig())
    plain = torch.optim.AdamW(of_torch(reference), lr=3e-4, betas=(0.9, 0.95), fused=True)
    for model in (ours, reference):
        loss_of(model).backward()
    norm = grad_norm(ours)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(reference.parameters(), max_norm))
    optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1.0)
    optimizer.step()
    plain.step()
    torch.testing.assert_close(everything(ours, optimizer), everything(reference, plain), rtol=1e-5, atol=1e-9)


def test_norm_is_the_root_of_all_squares_and_changes_nothing():
    model = Transformer(TINY, seed=1)
    loss_of(model).backward()
    before = [p.grad.clone() for p in model.parameters()]
    squares = sum((g.double() ** 2).sum().item() for g in before)
    assert grad_norm(model).item() == pytest.approx(math.sqrt(squares), rel=1e-6)
    torch.testing.assert_close([p.grad for p in model.parameters()], before, rtol=0, atol=0)


def test_one_bad_gradient_shows_in_the_norm():
    model = Transformer(TINY, seed=1)
    loss_of(model).backward()
    model.layers[1].attention.w_k.weight.grad[0, 0] = math.nan
    assert not grad_norm(model).isfinite()


def test_norm_without_gradients_is_zero():
    assert grad_norm(Transformer(TINY)).item() == 0


def test_cosine_follows_its_closed_form():
    schedule = ScheduleConfig(kind="cosine", warmup_steps=10, min_ratio=0.1)
    rates = [learning_rate(step, 110, 2.0, schedule) for step in range(111)]
    assert rates[:10] == pytest.approx([2.0 * (step + 1) / 10 for step in range(10)])
    for step in range(10, 111):
        assert rates[step] == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi * (step - 10) / 100)) / 2)
    assert rates[9] == rates[10] == 2.0
    assert rates[60] == pytest.approx(1.1)
    assert rates[110] == pytest.approx(0.2)
    assert learning_rate(500, 110, 2.0, schedule) == pytest.approx(0.2)


def test_warmup_stable_decay_follows_its_closed_form():
    schedule = ScheduleConfig(kind="wsd", warmup_steps=5, decay_fraction=0.25, min_ratio=0.2)
    rates = [learning_rate(step, 100, 1.0, schedule) for step in range(101)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:76] == [1.0] * 71
    assert rates[75:101] == pytest.approx([1.0 - 0.8 * i / 25 for i in range(26)])
    assert learning_rate(500, 100, 1.0, schedule) == pytest.approx(0.2)


def test_decay_by_the_root_follows_its_closed_form():
    schedule = ScheduleConfig(kind="wsd", warmup_steps=5, decay_fraction=0.25, decay="sqrt", min_ratio=0.0)
    rates = [learning_rate(step, 100, 2.0, schedule) for step in range(101)]
    assert rates[5:76] == [2.0] * 71
    # Hägele et al. 2024, equation 3: 1 - sqrt((n - (N - N_decay)) / N_decay)
    assert rates[75:101] == pytest.approx([2.0 * (1 - math.sqrt((n - 75) / 25)) for n in range(75, 101)])
    assert learning_rate(500, 100, 2.0, schedule) == 0.0


def test_easing_rises_from_its_factor_to_one():
    assert easing(7, None, 0.5, 10) == 1.0
    assert [easing(step, 100, 0.5, 4) for step in range(100, 106)] == [0.5, 0.625, 0.75, 0.875, 1.0, 1.0]
    assert [easing(step, 100, 1.0, 4) for step in (100, 102, 104)] == [1.0, 1.0, 1.0]
    assert easing(100, 100, 0.5, 0) == 1.0


def test_no_warmup_starts_at_the_peak():
    for kind in ("cosine", "wsd"):
        assert learning_rate(0, 10, 3.0, ScheduleConfig(kind=kind, warmup_steps=0)) == 3.0
