"""The work that the laboratories give their clusters: a small corpus, its recipe, and submitting it."""

import json
import pydoc_data.topics
import re

import yaml

from jobs.cli import parse
from pipelines import storage


def write_recipe(lab, **pretrain):
    """Put raw text where all machines reach it and write the recipe that takes it to a trained model."""
    topics = [re.sub(r"^\*+\n|\n\*+$", "", text, flags=re.M) for text in pydoc_data.topics.topics.values()]
    for part in range(2):
        rows = [{"text": text, "url": f"https://example.org/{n}"} for n, text in enumerate(topics) if n % 2 == part]
        storage.write_bytes(f"{lab.storage}/manual-{part}.jsonl", "\n".join(map(json.dumps, rows)).encode())
    recipe = {
        "workspace": lab.workspace,
        "curate": {
            "sources": [{"kind": "jsonl", "path": f"{lab.storage}/manual-*.jsonl"}],
            "gopher_quality": {"min_alphabetic_words": 0.6},
        },
        "tokenizer": {"vocab_size": 512},
        "tokenize": {"validation_share": 0.1},
        "pretrain": {
            "name": "nano",
            "model": {"preset": "nano", "n_layers": 2},
            "workers": 2,
            "cpus_per_worker": 2,  # all that a host has: one worker on each
            "device": "cpu",
            "sequence_length": 64,
            "global_batch": 8,
            "steps": 240,
            "optimizer": {"lr": 4.0e-3},
            "schedule": {"warmup_steps": 10},
            "checkpoint_every": 25,
            "clean_after": 10,
            "validate_every": 240,
            "validation_samples": 16,
            "faults": {"slow_worker_seconds": 0.2},  # so that there is a mid-run on fast machines too
            **pretrain,
        },
    }
    path = lab.folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def pretraining(recipe):
    """The recipe's settings of pretraining."""
    return parse("pretrain", ["--config", str(recipe)])


def start(lab, job, recipe):
    """Submit a job of the recipe to the laboratory's cluster; returns the process that follows it."""
    command = ["ingot", "submit", job, "--cluster", str(lab.cluster_file), "--config", str(recipe)]
    return lab.start(*command, log=f"{job}.log")


def submit(lab, job, recipe):
    """Submit a job and follow it to its end; returns the exit status."""
    status = start(lab, job, recipe).wait()
    lab.tell(f"`ingot submit {job}` ended with {status}")
    if status:
        print((lab.folder / f"{job}.log").read_text()[-6000:], flush=True)
    return status
