"""The training loop in one process, with batches, folder and clock handed in: no Ray."""

import hashlib
import json
import math
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from jobs.run_folder import valid_steps
from models.config import ModelConfig, OptimizerConfig, ScheduleConfig
from models.mesh import Parallelism, make_mesh
from models.optimizer import build_optimizer
from models.parallel import parallelize
from models.training.ledger import Entry, Ledger
from models.training.loop import LoopConfig, Training
from models.training.metrics import MetricsWriter
from models.training.spikes import SpikeConfig
from models.training.state import TrainingStoppedError, TrainState, batch_hash
from models.transformer import Transformer

CONFIG = ModelConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=64, max_seq_len=16)


class Folder:
    """A run's folder in a local directory, written with the standard library alone."""

    def __init__(self, path):
        self.path = str(path)

    def uri(self, name):
        return os.path.join(self.path, name)

    def read_json(self, name):
        if not os.path.exists(self.uri(name)):
            return None
        with open(self.uri(name)) as file:
            return json.load(file)

    def write_text(self, name, text):
        os.makedirs(os.path.dirname(self.uri(name)), exist_ok=True)
        with open(self.uri(name), "w") as file:
            file.write(text)

    def write_json(self, name, value):
        self.write_text(name, json.dumps(value))

    def append_line(self, name, line):
        os.makedirs(self.path, exist_ok=True)
        with open(self.uri(name), "a") as file:
            file.write(line + "\n")

    def delete(self, name):
        shutil.rmtree(self.uri(name), ignore_errors=True)

    def checksums(self, folder, part, of):
        sums = {}
        for name in sorted(os.listdir(self.uri(folder)))[part::of]:
            with open(self.uri(f"{folder}/{name}"), "rb") as file:
                data = file.read()
            sums[name] = [len(data), hashlib.sha256(data).hexdigest()]
        return sums

    def events(self, kind=None):
        with open(self.uri("events.jsonl")) as file:
            rows = [json.loads(line) for line in file]
        return [row for row in rows if kind is None or row["event"] == kind]

    def losses(self):
        return {row["step"]: row["loss"] for row in self.rows()}

    def rows(self):
        """The rows of the steps that were not undone, by step."""
        rows = []
        for name in os.listdir(self.uri("metrics")):
            with open(self.uri(f"metrics/{name}")) as file:
                rows += [json.loads(line) for line in file]
        rows.sort(key=lambda row: row["time"])
        return list(valid_steps(rows).values())


def batch(data_step):
    """A batch that can be learnt: counting upwards from a random start."""
    generator = torch.Generator().manual_seed(data_step)
    return (torch.randint(0, 64, (8, 1), generator=generator) + torch.arange(17)) % 64


class Killed(BaseException):
    pass


def training(
    folder,
    *,
    poison=range(0),
    kill_at=None,
    seen=None,
    reports=None,
    interrupt=None,
    data=None,
    storage=Folder,
    workers=1,
    **changes,
):
    """A run over ``batch``; the data steps in ``poison`` are noise, and the process "dies" before ``kill_at``."""
    model = Transformer(CONFIG, 0)
    if workers > 1:
        model = parallelize(model, make_mesh(Parallelism(), "cpu"), "cpu")
    given = {
        "steps": 60,
        "global_batch": 8,
        "sequence_length": 16,
        "microbatch": 8,
        "checkpoint_every": 10,
        "keep_checkpoints": 2,
        "clean_after": 6,
        "validate_every": 20,
        "optimizer": OptimizerConfig(lr=1e-2),
        "schedule": ScheduleConfig(warmup_steps=5),
        "spikes": SpikeConfig(window=30, recent=8, min_history=8, skip_after=2, threshold=10),
        "async_checkpoints": False,  # so that it is known which checkpoint a kill finds
        "interrupt_every": 7,
    }
    config = LoopConfig(**{**given, **changes})
    data = data or batch

    def batches(data_step, skip):
        while True:
            data_step = skip(data_step)
            if seen is not None:
                seen.append(data_step)
            generator = torch.Generator().manual_seed(10_000 + data_step)
            yield torch.randint(0, 64, (8, 17), generator=generator) if data_step in poison else data(data_step)
            data_step += 1

    def before_step(step):
        if step == kill_at:
            raise Killed

    run = storage(folder)
    return Training(
        model,
        build_optimizer(model, config.optimizer),
        config,
        batches=batches,
        validation=lambda: [(batch(10**6), torch.tensor([1.0] * 6 + [0.0] * 2))],
        byte_lengths=torch.full((64,), 3),
        run=run,
        report=lambda metrics, pointer: reports.append((metrics, pointer)) if reports is not None else None,
        device=torch.device("cpu"),
        flops_per_token=CONFIG.flops_per_token(16),
        metrics=MetricsWriter(run) if workers == 1 or torch.distributed.get_rank() == 0 else None,
        before_step=before_step,
        documents=lambda places: [{"id": f"{data_step}/{place}"} for data_step, place in places],
        interrupt=interrupt,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happens to, and its folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run = training(folder)
    run.train()
    return SimpleNamespace(run=run, losses=Folder(folder).losses())


def test_a_killed_run_ends_with_the_same_losses(tmp_path, whole):
    for kill_at in (3, 27, 51):
        folder = tmp_path / f"killed-{kill_at}"
        with pytest.raises(Killed):
            training(folder, kill_at=kill_at).train()
        again = training(folder)
        again.train()
        assert Folder(folder).losses() == whole.losses  # bit for bit
        for a, b in zip(whole.run.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(a, b)
        assert Folder(folder).events("resume")[0]["from_step"] == kill_at // 10 * 10


def test_losses_equal_a_plain_loop_written_by_hand(tmp_path):
    run = training(tmp_path / "run", steps=12, microbatch=2)
    run.train()
    torch.manual_seed(0)
    model = Transformer(CONFIG, 0)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    expected = []
    for step in range(12):
        tokens = batch(step)
        logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rise = (step + 1) / 5
        fall = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 5) / (12 - 5)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (rise if step < 5 else fall)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert list(Folder(tmp_path / "run").losses().values()) == pytest.approx(expected, rel=2e-5)


def test_validation_weighs_what_counts_and_tells_bits_per_byte(tmp_path):
    run = training(tmp_path / "run", steps=10)
    result = run.train()
    tokens = batch(10**6)[:6]
    logits = run.model(tokens[:, :-1]).detach()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert result["validation_loss"] == pytest.approx(loss, rel=1e-5)
    assert result["validation_bits_per_byte"] == pytest.approx(loss / math.log(2) / 3, rel=1e-5)


def test_poisoned_data_is_rolled_back_and_skipped_for_good(tmp_path, whole):
    seen = []
    run = training(tmp_path / "run", poison=range(43, 47), seen=seen)
    run.train()
    events = Folder(tmp_path / "run")
    (rollback,) = events.events("rollback")
    assert rollback["checkpoint_status"] == "clean"
    assert rollback["to_step"] == 30
    assert {row["data_step"] for row in rollback["documents"]} <= {43, 44, 45}
    losses = [row["loss"] for row in rollback["documents"]]
    assert len(losses) == 5
    assert losses == sorted(losses, reverse=True)
    assert rollback["source"] == "memory"
    start, end = rollback["skipped"]
    assert start <= 43
    assert end >= 47
    after = seen[seen.index(30, 44) :]
    assert not set(after) & set(range(start, end))
    assert max(after) >= 60 + (end - start) - 1  # the run still makes all its steps, on later data
    assert run.state.step == 60
    assert events.losses()[60] == pytest.approx(whole.losses[60], rel=0.15)
    ledger = events.read_json("ledger.json")
    assert ledger["skips"] == [[start, end]]
    assert ledger["rollbacks"] == 1


def test_a_crash_right_after_a_rollback_still_skips(tmp_path):
    class Dies(Folder):
        def append_line(self, name, line):
            super().append_line(name, line)
            if '"rollback"' in line:
                raise Killed

    run = training(tmp_path / "run", poison=range(43, 47), storage=Dies)
    with pytest.raises(Killed):
        run.train()
    seen = []
    again = training(tmp_path / "run", poison=range(43, 47), seen=seen)
    again.train()
    assert not set(seen) & set(range(43, 47))
    assert Folder(tmp_path / "run").events("resume")[0]["from_step"] == 30
    assert len(Folder(tmp_path / "run").events("rollback")) == 1


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path):
    run = training(tmp_path / "run", steps=30)
    calls = []

    def plant(grad):
        calls.append(1)
        return torch.full_like(grad, math.nan) if len(calls) == 25 else grad

    run.model.layers[0].attention.w_q.weight.register_hook(plant)
    run.train()
    (rollback,) = Folder(tmp_path / "run").events("rollback")
    assert rollback["reason"] == "gradient norm is not finite"
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def test_a_nan_in_one_ranks_gradient_leaves_all_weights_finite(tmp_path):
    torch.multiprocessing.spawn(nan_on_one_rank, (str(tmp_path),), nprocs=2)
    (rollback,) = Folder(tmp_path / "run").events("rollback")
    assert (rollback["reason"], rollback["source"]) == ("gradient norm is not finite", "memory")
    assert len(Folder(tmp_path / "run").rows()) == 30


def nan_on_one_rank(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    run = training(
        f"{folder}/run", steps=30, data=lambda step: batch(step)[rank * 4 : rank * 4 + 4], workers=2,
        async_checkpoints=True,
    )  # fmt: skip
    backward, calls = run.stepper.backward, []

    def plant(*arguments):
        result = backward(*arguments)
        calls.append(1)
        if rank == 1 and len(calls) == 25:
            next(run.model.parameters()).grad.to_local().fill_(math.nan)
        return result

    run.stepper.backward = plant
    run.train()
    assert all(torch.isfinite(p.to_local()).all() for p in run.model.parameters())
    torch.distributed.destroy_process_group()


def test_a_run_that_keeps_spiking_stops_with_a_diagnosis(tmp_path):
    config = SpikeConfig(window=30, recent=8, min_history=8, skip_after=0, lead_in=0, patience=2, max_rollbacks=2)
    with pytest.raises(TrainingStoppedError, match=r"gone back 2 times .* spikes.max_rollbacks"):
        training(tmp_path / "run", poison=range(35, 1000), spikes=config).train()
    (stop,) = Folder(tmp_path / "run").events("stop")
    assert "data steps that were skipped" in stop["diagnosis"]


def test_bad_data_stays_skipped_when_every_checkpoint_is_lost(tmp_path):
    training(tmp_path / "run", poison=range(43, 47)).train()
    (start, end), *_ = Folder(tmp_path / "run").read_json("ledger.json")["skips"]
    for receipt in (tmp_path / "run" / "checkpoints").glob("*/checkpoint.json"):
        receipt.unlink()
    seen = []
    again = training(tmp_path / "run", poison=range(43, 47), seen=seen)
    again.train()
    assert seen[0] == 0
    assert not set(seen) & set(range(start, end))
    assert len(Folder(tmp_path / "run").events("rollback")) == 1


def test_a_run_killed_at_its_very_end_still_reports_its_last_checkpoint(tmp_path):
    class Dies(Folder):
        def append_line(self, name, line):
            super().append_line(name, line)
            if '"checkpoint", "step": 60' in line:
                raise Killed

    run = training(tmp_path / "run", storage=Dies)
    with pytest.raises(Killed):
        run.train()
    reports = []
    result = training(tmp_path / "run", reports=reports).train()
    assert [pointer["folder"] for _, pointer in reports] == ["checkpoints/step-00000060"]
    assert reports[0][0]["validation_loss"] == result["validation_loss"]


@pytest.mark.parametrize("damage", ["flip", "tear"])
def test_a_damaged_checkpoint_is_recognized_and_the_one_before_is_used(tmp_path, whole, damage):
    with pytest.raises(Killed):
        training(tmp_path / "run", kill_at=45).train()
    folder = tmp_path / "run" / "checkpoints" / "step-00000040"
    if damage == "tear":
        os.unlink(folder / "checkpoint.json")
    else:
        shard, *_ = sorted(folder.glob("*.distcp"))
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(bytes(data))
    training(tmp_path / "run").train()
    events = Folder(tmp_path / "run")
    assert [e["checkpoint_step"] for e in events.events("corrupt_checkpoint")] == [40]
    assert events.events("resume")[0]["from_step"] == 30
    assert events.losses() == whole.losses


def test_writing_beside_the_training_changes_nothing(tmp_path, whole):
    for name in ("beside", "poisoned", "poisoned beside"):
        poison = range(43, 47) if "poisoned" in name else range(0)
        reports = []
        beside = training(
            tmp_path / name, poison=poison, reports=reports, async_checkpoints="beside" in name, host_snapshots=2
        )
        beside.train()
        steps = [entry.step for entry in beside.recovery.ledger.entries]
        assert steps == list(range(0, 61, 10))
        assert all(pointer["folder"] == f"checkpoints/step-{metrics['step']:08d}" for metrics, pointer in reports)
        for event in Folder(tmp_path / name).events("checkpoint"):
            assert event["pause"] >= 0
    assert Folder(tmp_path / "beside").losses() == whole.losses
    assert Folder(tmp_path / "poisoned").losses() == Folder(tmp_path / "poisoned beside").losses()


@pytest.mark.parametrize(("snapshots", "source"), [(2, "memory"), (0, "storage")])
def test_a_rollback_is_the_same_from_memory_and_from_storage(tmp_path, snapshots, source):
    run = training(tmp_path / "run", poison=range(43, 47), host_snapshots=snapshots)
    run.train()
    (rollback,) = Folder(tmp_path / "run").events("rollback")
    assert (rollback["source"], rollback["to_step"]) == (source, 30)
    expected = training(tmp_path / "expected", data=lambda step: batch(step if step < 41 else step + 7))
    expected.train()  # never saw the window, and went through no rollback
    assert rollback["skipped"] == [41, 48]
    assert Folder(tmp_path / "run").losses() == Folder(tmp_path / "expected").losses()


def test_the_rows_of_a_run_prove_which_tokens_it_saw(tmp_path):
    with pytest.raises(Killed):
        training(tmp_path / "run", poison=range(43, 47), kill_at=37).train()
    training(tmp_path / "run", poison=range(43, 47), microbatch=3).train()
    folder = Folder(tmp_path / "run")
    (skip,) = folder.read_json("ledger.json")["skips"]
    expected = [step for step in range(100) if not skip[0] <= step < skip[1]][:60]
    rows = folder.rows()
    assert [row["data_step"] for row in rows] == expected
    assert [row["batch_hash"] for row in rows] == [hash_by_hand(batch(step)) for step in expected]


def hash_by_hand(samples):
    """`batch_hash` with Python's integers."""
    mask = 2**64 - 1

    def mixed(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    rows = [sum(token * (mixed(place) | 1) for place, token in enumerate(row, 1)) & mask for row in samples.tolist()]
    return f"{sum(map(mixed, rows)) & mask:016x}"


def test_the_hash_of_a_batch_is_the_sum_of_its_shares_and_knows_order_and_padding():
    samples = batch(3)
    whole = batch_hash(samples)
    fill = torch.full((2, 17), -100)
    assert batch_hash(samples[:3]) + batch_hash(torch.cat([samples[3:], fill])) == whole
    assert batch_hash(samples.flip(0)) == whole
    assert batch_hash(samples.flip(1)) != whole


def test_samples_that_only_fill_up_change_nothing(tmp_path):
    training(tmp_path / "plain", steps=12).train()
    fill = torch.full((3, 17), -100)
    training(tmp_path / "filled", steps=12, data=lambda step: torch.cat([batch(step), fill]), microbatch=4).train()
    plain, filled = Folder(tmp_path / "plain").losses(), Folder(tmp_path / "filled").losses()
    assert list(filled.values()) == pytest.approx(list(plain.values()), rel=1e-5)


def test_padding_within_samples_counts_for_nothing(tmp_path):
    """The loss is the mean over the targets that count of the whole batch, not a mean of microbatches' means."""

    def padded(step):
        samples = batch(step).clone()
        for row, length in enumerate((3, 17, 9, 17, 5, 17, 17, 12)):
            samples[row, length:] = -100
        return samples

    run = training(tmp_path / "run", steps=1, data=padded, microbatch=2)
    expected_loss = torch.nn.functional.cross_entropy(
        run.model(padded(0)[:, :-1].clamp(min=0)).flatten(0, 1), padded(0)[:, 1:].flatten(), ignore_index=-100
    )
    run.train()
    assert Folder(tmp_path / "run").losses()[1] == pytest.approx(expected_loss.item(), rel=1e-5)


def test_a_growing_batch_takes_the_data_in_order_and_once(tmp_path):
    def ramped(folder, **changes):
        return training(folder, steps=30, batch_ramp=[(0, 1), (10, 2), (20, 4)], **changes)

    ramped(tmp_path / "whole").train()
    rows = Folder(tmp_path / "whole").rows()
    assert [row["data_step"] for row in rows] == [*range(10), *range(10, 30, 2), *range(30, 70, 4)]
    assert rows[-1]["tokens"] == 70 * 8 * 16
    together = torch.cat([batch(step) for step in range(66, 70)])
    assert rows[-1]["batch_hash"] == hash_by_hand(together)
    with pytest.raises(Killed):
        ramped(tmp_path / "killed", kill_at=25).train()
    ramped(tmp_path / "killed").train()
    assert Folder(tmp_path / "killed").losses() == Folder(tmp_path / "whole").losses()


def test_an_announced_interruption_leaves_a_checkpoint_at_once(tmp_path):
    reports = []
    asked = []

    def interrupt():
        asked.append(1)
        return "preemption" if len(asked) == 5 else None

    with pytest.raises(Killed):
        training(
            tmp_path / "run", interrupt=interrupt, reports=reports, kill_at=36, checkpoint_every=100,
            async_checkpoints=True,
        ).train()  # fmt: skip
    events = Folder(tmp_path / "run")
    (told,) = events.events("interrupt")
    assert (told["step"], told["reason"], told["saved"]) == (35, "preemption", True)
    assert reports[-1][1]["folder"] == "checkpoints/step-00000035"
    training(tmp_path / "run", checkpoint_every=100).train()
    assert events.events("resume")[0]["from_step"] == 35


@pytest.mark.parametrize(("poison", "saved_at"), [(range(43, 45), 46), (range(43, 47), 31)])
def test_what_is_asked_for_amid_outliers_is_saved_as_soon_as_they_are_over(tmp_path, poison, saved_at):
    """They pass, or the run goes back; it saves after the next step."""
    reports = []
    run = training(tmp_path / "run", poison=poison, reports=reports, checkpoint_every=30, interrupt_every=1)
    asked = []

    def interrupt():
        if run.state.step != 44 or asked:
            return None
        asked.append(run.state.step)
        return "resize"

    run.interrupt = interrupt
    run.train()
    events = Folder(tmp_path / "run")
    assert [event["step"] for event in events.events("outlier")] == [44, 45]
    assert bool(events.events("rollback")) == (saved_at == 31)
    (told,) = events.events("interrupt")
    assert (told["step"], told["reason"], told["saved"]) == (saved_at, "resize", True)
    assert f"checkpoints/step-{saved_at:08d}" in [pointer["folder"] for _, pointer in reports]


def test_a_storage_that_fails_for_a_while_costs_nothing_but_checkpoints(tmp_path, whole, monkeypatch):
    """Every write fails in the steps from 20 on to 40: the run goes on, and what it has to tell is told later."""
    monkeypatch.setattr("models.training.checkpoints._RETRY_AFTER", (0.01,))
    away = []

    class Away(Folder):
        def write_text(self, name, text):
            if away and not name.startswith("ledger"):
                raise OSError("no space left on device")
            super().write_text(name, text)

        def append_line(self, name, line):
            if away:
                raise OSError("no space left on device")
            super().append_line(name, line)

    run = training(tmp_path / "run", storage=Away, async_checkpoints=True)
    run.before_step = lambda step: away.append(1) if step == 15 else away.clear() if step == 45 else None
    run.train()
    folder = Folder(tmp_path / "run")
    assert folder.losses() == whole.losses
    failed = [event["step"] for event in folder.events("checkpoint_failed")]
    assert {20, 30} <= set(failed) <= {10, 20, 30, 40}  # those at the edges may come to an attempt outside
    assert "no space left" in folder.events("checkpoint_failed")[0]["error"]
    written = [event["step"] for event in folder.events("checkpoint")]
    assert sorted(failed + written) == list(range(0, 61, 10))
    assert not (tmp_path / "run" / "checkpoints" / "step-00000020").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # torch lets its threads die
def test_what_fails_in_a_writers_thread_makes_no_checkpoint(tmp_path, monkeypatch):
    """Of several threads that write, any may meet a full disk."""
    monkeypatch.setattr("models.training.checkpoints._RETRY_AFTER", ())
    from torch.distributed.checkpoint import filesystem

    write, calls = filesystem._write_item, []

    def full(*arguments):
        calls.append(1)
        if 40 < len(calls) < 44:
            raise OSError("no space left on device")
        return write(*arguments)

    monkeypatch.setattr(filesystem, "_write_item", full)
    run = training(tmp_path / "run", steps=20)
    run.train()
    folder = Folder(tmp_path / "run")
    (failed,) = folder.events("checkpoint_failed")
    assert failed["step"] == 0
    assert [entry.step for entry in run.recovery.ledger.usable()] == [20, 10]


def test_the_end_is_not_told_while_its_checkpoint_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("models.training.checkpoints._RETRY_AFTER", ())

    class Away(Folder):
        def write_json(self, name, value):
            if "00000060" in name:
                raise OSError("no space left on device")
            super().write_json(name, value)

    with pytest.raises(OSError, match="the last checkpoint, of step 60, was not written"):
        training(tmp_path / "run", storage=Away).train()
    assert not Folder(tmp_path / "run").events("end")
    training(tmp_path / "run").train()
    assert Folder(tmp_path / "run").events("resume")[0]["from_step"] == 50


def test_a_storage_that_one_start_cannot_read_leaves_the_checkpoints_alone(tmp_path):
    with pytest.raises(Killed):
        training(tmp_path / "run", kill_at=45).train()

    class Unreadable(Folder):
        def checksums(self, folder, part, of):
            raise PermissionError(folder)

    with pytest.raises(OSError, match="cannot read it"):
        training(tmp_path / "run", storage=Unreadable).train()
    training(tmp_path / "run").train()
    assert Folder(tmp_path / "run").events("resume")[0]["from_step"] == 40


def test_checkpoints_are_kept_by_every_rule(tmp_path):
    run = training(tmp_path / "run", keep_checkpoints=1, keep_every=20, keep_best=True)
    run.train()
    kept = [entry.step for entry in run.recovery.ledger.usable()]
    assert kept == [60, 50, 40, 20]  # the newest, the newest that was clean, and every twentieth
    ledger = Ledger()
    for step, loss in ((10, 3.0), (20, 2.0), (30, 2.5), (40, None), (50, None)):
        ledger.add(Entry(step, step, step, 1.0, f"s{step}", "clean", validation_loss=loss))
    ledger.expire(1, every=None, best=True)
    assert [entry.step for entry in ledger.usable()] == [50, 20]


def test_a_planted_spike_is_seen_within_five_steps_and_without_the_guard_it_hurts(tmp_path):
    """Ten times the learning rate on noise: the guard leaves it out; without it the run ends visibly worse."""
    final = {}
    for name, poison, enabled in (("plain", False, True), ("guarded", True, True), ("unguarded", True, False)):
        spikes = SpikeConfig(window=30, recent=8, min_history=8, skip_after=2, threshold=10, enabled=enabled)
        run = training(tmp_path / name, poison=range(43, 55) if poison else range(0), steps=80, spikes=spikes)
        issue = run._issue

        def hot(stream, issue=issue, run=run, poison=poison):
            lr = run.config.optimizer.lr
            run.config.optimizer.lr = lr * 10 if poison and 43 <= run.state.data_step < 55 else lr
            issue(stream)
            run.config.optimizer.lr = lr

        run._issue = hot
        final[name] = run.train()["validation_loss"]
        rollbacks = Folder(tmp_path / name).events("rollback")
        assert bool(rollbacks) == (name == "guarded")
        if rollbacks:
            assert rollbacks[0]["step"] <= 43 + 5
    assert final["guarded"] == pytest.approx(final["plain"], rel=0.15)
    assert final["unguarded"] > 1.5 * final["plain"]


def test_checkpoints_are_reported_and_old_ones_deleted(tmp_path):
    reports = []
    training(tmp_path / "run", reports=reports).train()
    assert [pointer["folder"] for _, pointer in reports] == [f"checkpoints/step-{s:08d}" for s in range(0, 61, 10)]
    ledger = Folder(tmp_path / "run").read_json("ledger.json")["checkpoints"]
    there = sorted(os.listdir(tmp_path / "run" / "checkpoints"))
    assert there == [os.path.basename(e["folder"]) for e in ledger if not e["deleted"]]
    assert len(there) == 2


def test_skipped_ranges_merge():
    state = TrainState()
    for r in ([10, 12], [30, 40], [11, 20], [40, 41]):
        state.skip(*r)
    assert state.skips == [[10, 20], [30, 41]]
    assert [state.next_data_step(s) for s in (9, 10, 19, 20, 30, 41)] == [9, 20, 20, 20, 41, 41]


def test_the_ledger_calls_clean_only_what_has_stood_and_goes_back_to_that():
    ledger = Ledger()
    for step in (0, 10, 20, 30):
        ledger.add(Entry(step, step, step * 128, 1.0, f"s{step}"))
    ledger.mark_clean(25, clean_after=10)
    assert [e.status for e in ledger.entries] == ["clean", "clean", "pending", "pending"]
    assert next(iter(ledger.clean_before(25))).step == 10
    assert next(iter(ledger.usable())).step == 30
    ledger.poison_after(10)
    assert next(iter(ledger.usable())).step == 10
    assert Ledger.from_dict(ledger.to_dict()) == ledger


def test_steps_that_a_rollback_has_undone_do_not_count(tmp_path):
    with pytest.raises(Killed):
        training(tmp_path / "run", poison=range(43, 47), kill_at=33).train()
    run = training(tmp_path / "run", poison=range(43, 47))
    run.before_step = lambda step: (
        (_ for _ in ()).throw(Killed) if run.recovery.ledger.rollbacks and step == 34 else None
    )
    with pytest.raises(Killed):
        run.train()
    run.metrics.flush()
    assert list(Folder(tmp_path / "run").losses()) == list(range(1, 34))  # the first attempt had come to step 45
