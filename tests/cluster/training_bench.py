"""What the tests of training on a cluster share: a small workspace of tokens, runs on it, watching over processes."""

import dataclasses
import json
import os
import signal
import time

import numpy as np
import torch
import yaml

from jobs.inputs import reader
from jobs.run_folder import StoredRun, valid_steps
from jobs.settings import ModelSettings, PretrainJob
from models.config import OptimizerConfig, ScheduleConfig
from models.training.spikes import SpikeConfig
from models.training.state import batch_hash
from pipelines.documents import document_id, to_table
from pipelines.stage import Output, Stage, Unit, run_stage
from pipelines.tokenize import TokenizeSettings, tokenize
from pipelines.tokenizer import TokenizerSettings, train

WORDS = ("ore", "slag", "ingot", "furnace", "cast", "mould", "alloy", "ladle", "hearth", "flux")


def documents(part: int):
    """Texts that a small model learns in a few steps: the words in a circle, now and then leaving one out."""
    rng = np.random.default_rng(part)
    rows = []
    for i in range(40):
        places = np.cumsum(rng.choice([1, 2], 80, p=[0.9, 0.1])) + rng.integers(len(WORDS))
        text = " ".join(WORDS[place % len(WORDS)] for place in places)
        rows.append({"id": document_id("books", str(part), i), "text": text, "source": "books"})
    yield Output(to_table(rows), None, len(rows), 0)


def make_tokens(root: str):
    """Corpus, tokenizer and token shards in the workspace ``root``; needs Ray."""
    corpus = f"{root}/corpus/near"
    units = [Unit(f"part-{i:05d}", {"part": i}) for i in range(4)]
    manifest = run_stage(Stage("near", corpus, {}, {}), units, documents)
    train(f"{root}/tokenizer", corpus, manifest, TokenizerSettings(vocab_size=320, reserved_tokens=0))
    cut = TokenizeSettings(validation_share=0.1, block=64, shard_tokens=64 * 32)
    tokenize(f"{root}/tokens", corpus, manifest, f"{root}/tokenizer", cut)


SPIKES = SpikeConfig(window=30, recent=6, min_history=8, patience=2, lead_in=1, skip_after=2)


def small_run(workspace: str, name: str, **changes) -> PretrainJob:
    """Settings of two CPU workers and a model that learns ``documents`` in some dozens of steps."""
    small = {
        "model": ModelSettings(d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=64),
        "global_batch": 8,
        "sequence_length": 32,
        "workers": 2,
        "device": "cpu",
        "optimizer": OptimizerConfig(lr=2e-2),
        "schedule": ScheduleConfig(warmup_steps=5),
        "spikes": SPIKES,
        "checkpoint_every": 10,
        "clean_after": 5,
        "validation_samples": 4,
    }
    return PretrainJob(workspace=workspace, name=name, **{**small, **changes})


def write_recipe(settings: PretrainJob, path):
    """The settings as the file that ``--config`` takes."""
    with open(path, "w") as out:
        yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(settings))), out)


def token_record(settings, folder=None):
    """What is wrong with the tokens that a run has seen: nothing, if every step of its record stands there once, saw
    the samples that the order of the data has for it, and left out none but those in the ledger's skips.
    """
    run = StoredRun(folder or f"{settings.workspace}/runs/{settings.name}")
    rows = valid_steps(run.metrics(), "batch_hash")
    wrong = []
    if list(rows) != list(range(1, settings.steps + 1)):
        wrong.append(f"steps {sorted(set(range(1, settings.steps + 1)) ^ set(rows))[:5]} missing or too many")
    data_steps = [row["data_step"] for row in rows.values()]
    if data_steps != sorted(set(data_steps)):
        wrong.append("data steps doubled or out of order")
    skipped = {at for start, end in run.read_json("ledger.json")["skips"] for at in range(start, end)}
    if left_out := set(range(max(data_steps, default=-1) + 1)) - set(data_steps) - skipped:
        wrong.append(f"data steps {sorted(left_out)[:5]} left out")
    batches = reader(settings, "train")
    for step, row in rows.items():
        samples = torch.from_numpy(batches.rank(row["data_step"], 0, 1))
        if row["batch_hash"] != f"{int(batch_hash(samples)) % 2**64:016x}":
            wrong.append(f"step {step} saw other samples than those of data step {row['data_step']}")
    return wrong


def weights(settings):
    """All weights of a run's last checkpoint, as one array."""
    from jobs.settings import OfRun
    from jobs.trained import load

    trained = load(OfRun(workspace=settings.workspace, name=settings.name), device="cpu")
    return torch.cat([p.detach().flatten() for p in trained.model.parameters()]).numpy()


def events_of(run, *kinds):
    """A run's events of some kinds, in order; an empty list where storage does not tell."""
    try:
        return [event for event in run.events() if event["event"] in kinds]
    except (OSError, json.JSONDecodeError):
        return []


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


def descendants(pid):
    """All processes below one, as (pid, start time), so that a number used again is not taken for them."""
    children = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        if found := parent_and_start(int(name)):
            children.setdefault(found[0], []).append((int(name), found[1]))
    family, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        family += below
        todo += [child for child, _ in below]
    return family


def processes(name, below):
    """Ids of the processes below one whose command line begins with ``name``, as Ray names its actors, oldest first."""
    found = []
    for pid, _ in sorted(descendants(below), key=lambda process: int(process[1])):
        try:
            with open(f"/proc/{pid}/cmdline") as file:
                if file.read().startswith(name):
                    found.append(pid)
        except OSError:  # it ended meanwhile
            continue
    return found


def parent_and_start(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else (int(fields[1]), fields[19])


def end_all(family):
    """Wait for Ray's processes to follow their driver; end those that do not."""

    def left():
        return [pid for pid, start in family if (found := parent_and_start(pid)) and found[1] == start]

    deadline = time.monotonic() + 1
    while left() and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left():
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not left(), 10)
