"""What the tests of training on a cluster share: a small workspace of tokens, and watching over processes."""

import os
import signal
import time

import numpy as np

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

    deadline = time.monotonic() + 3
    while left() and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left():
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not left(), 10)
