"""``ingot demo``: the whole flow on one machine, on text that every Python installation has."""

from __future__ import annotations

import logging
import os

from jobs import cli, evaluate, export, generate, pretrain, report, session, tokenize, tokenizer
from jobs.demo_corpus import make_corpus
from jobs.events import sentence
from jobs.run_folder import StoredRun, valid_steps
from jobs.settings import DemoJob, EvaluateJob, ExportJob, Faults, GenerateJob, OfRun, PretrainJob, checked, require
from jobs.trained import load
from pipelines import storage
from pipelines.curate import curate, stage_manifests
from pipelines.stage import read_manifest

log = logging.getLogger("ingot")

RECIPE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "recipes", "demo.yaml")
PROMPTS = ("The ", "def ", "This module ")


def run(settings: DemoJob) -> None:
    """Make the text, curate it, train tokenizer and model on it, score the model, and tell how it went."""
    # Its text is linked to and rendered from this machine's Python.
    require(not storage.is_remote(settings.workspace), "workspace", settings.workspace, "a folder of this machine")
    workspace = storage.absolute(settings.workspace)
    here = ["--config", RECIPE, "--workspace", workspace]
    training = training_settings(settings, here)
    curation = cli.parse("curate", here)
    log.info("demo: makes its text in %s", storage.join(workspace, "raw"))
    curation.sources = make_corpus(storage.join(workspace, "raw"))
    checked(curation)
    with session.ray_session(training.workers):
        curate(storage.join(workspace, "corpus"), curation)
        tokenizer.run(cli.parse("tokenizer", here))
        tokenize.run(cli.parse("tokenize", here))
        pretrain.run(training)
    measure(workspace, training)
    page = report.build_report(workspace, training.name)
    print(summary(workspace, training.name))
    print(f"\nreport: {page}")


def training_settings(settings: DemoJob, arguments: list[str]) -> PretrainJob:
    """The recipe's pretraining; with chaos under a name of its own, with a killed worker and poisoned data."""
    training = cli.parse("pretrain", arguments)
    training.on_change = "restart"
    if settings.steps is not None:
        training.steps = settings.steps
    if settings.chaos:
        training.name += "-chaos"
        poison = int(training.steps * 0.7)
        training.faults = Faults(kill_worker_at_step=int(training.steps * 0.45), poison_data_steps=(poison, poison + 6))
    checked(training)
    return training


def measure(workspace: str, training: PretrainJob) -> None:
    """Score the run, let it write, and export it, unless that was done since the run ended."""
    folder = StoredRun(storage.join(workspace, "runs", training.name))
    results = storage.join(workspace, "evals", training.name, "results.json")
    ended = folder.events()[-1]["time"]
    if storage.exists(results) and storage.read_json(results)["time"] > ended and folder.read_json("samples.json"):
        log.info("evaluate, generate, export: up to date, nothing to do")
        return
    which = {"workspace": workspace, "name": training.name}
    export.run(ExportJob(**which))
    trained = load(OfRun(**which))
    samples = []
    for prompt in PROMPTS:
        asked = GenerateJob(**which, prompt=prompt, max_new_tokens=80)
        samples.append({"prompt": prompt, "text": "".join(generate.text(trained, asked))})
    folder.write_json("samples.json", samples)
    evaluate.run(EvaluateJob(**which))


def summary(workspace: str, name: str) -> str:
    """What the demo prints at its end: funnel, tokenizer, losses, recoveries, a sample."""
    folder = StoredRun(storage.join(workspace, "runs", name))
    lines = ["", f"{'stage':<10}{'documents in':>14}{'MB in':>9}{'documents out':>15}{'MB out':>9}   why the rest went"]
    for stage, manifest in stage_manifests(storage.join(workspace, "corpus")).items():
        gone = list(manifest["set_aside"].items())
        why = [f"{reason} {counts['documents']:,}" for reason, counts in gone[:4]]
        others = sum(counts["documents"] for _, counts in gone[4:])
        if others:
            why.append(f"{len(gone) - 4} other reasons {others:,}")
        lines.append(
            f"{stage:<10}{manifest['documents_in']:>14,}{manifest['bytes_in'] / 1e6:>9.1f}"
            f"{manifest['documents_out']:>15,}{manifest['bytes_out'] / 1e6:>9.1f}   {'; '.join(why)}"
        )
    tokens = read_manifest(storage.join(workspace, "tokens/train"))
    bpe = read_manifest(storage.join(workspace, "tokenizer"))
    lines.append(
        f"\ntokenizer: {bpe['vocab_size']:,} tokens, {bpe['bytes_per_token']:.2f} bytes a token; "
        f"{tokens['tokens']:,} tokens to train on"
    )
    rows = folder.metrics()
    losses, held_out = valid_steps(rows), valid_steps(rows, "validation_loss")
    first, last = held_out[min(held_out)], held_out[max(held_out)]
    lines.append(
        f"training:  loss {losses[min(losses)]['loss']:.3f} at step 1, {losses[max(losses)]['loss']:.3f} at step "
        f"{max(losses)}; validation loss {first['validation_loss']:.3f} to {last['validation_loss']:.3f} "
        f"({1 - last['validation_loss'] / first['validation_loss']:.0%} lower), "
        f"{last['validation_bits_per_byte']:.3f} bits per byte"
    )
    told = [event for event in folder.events() if event["event"] in ("worker_failure", "resume", "rollback")]
    lines += [f"recovery:  {sentence(event)}" for event in told]
    sample = folder.read_json("samples.json")[0]
    lines.append(f"\nsample:\n{_indented(sample['prompt'] + sample['text'])}")
    return "\n".join(lines)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
