"""``ingot evaluate``: validation loss and bits per byte of a trained run, and multiple-choice questions."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import sys
import time
from typing import Any

from jobs.multiple_choice import answer, prompt_tokens, read_folder
from jobs.placing import Write, place
from jobs.settings import EvaluateJob, SettingsError
from jobs.trained import Trained, find, load
from pipelines import storage
from pipelines.stage import ingot_version, require_manifest

log = logging.getLogger("ingot")


def run(settings: EvaluateJob) -> dict[str, Any]:
    """Score the run and write evals/NAME/results.json, with MMLU's single answers beside it; returns the results.

    A checkpoint that was scored with the same settings is not scored again.

    Raises:
        SettingsError: a setting is out of range, or there is no such run.
        FileNotFoundError: the validation split or MMLU's files are not there.
    """
    # On a cluster it is done in another process, whose working directory is another.
    settings = dataclasses.replace(settings, workspace=storage.absolute(settings.workspace))
    if settings.mmlu is not None:  # read before a model is, so that a wrong path costs no time
        settings.mmlu = storage.absolute(settings.mmlu)
        list(read_folder(settings.mmlu, settings.few_shot, settings.limit))
    made_of, before = _made_of(settings), _earlier(settings)
    if before.get("made_of") == made_of:
        log.info("evaluate: run %s is scored at step %d already, nothing to do", settings.name, before["step"])
        return before
    results = place(_score, settings, sys.stdout.write, settings.device, settings.cpus)
    results["made_of"] = made_of
    if "mmlu" not in results and before.get("step") == results["step"] and "mmlu" in before:
        results["mmlu"] = before["mmlu"]  # of the same checkpoint: still true
    folder = _folder(settings)
    storage.write_json(storage.join(folder, "results.json"), results)
    log.info("evaluate: results are in %s", folder)
    return results


def _folder(settings: EvaluateJob) -> str:
    return storage.join(settings.workspace, "evals", settings.name)


def _earlier(settings: EvaluateJob) -> dict[str, Any]:
    uri = storage.join(_folder(settings), "results.json")
    return storage.read_json(uri) if storage.exists(uri) else {}


def _made_of(settings: EvaluateJob) -> dict[str, Any]:
    """What the results follow from."""
    entry = find(settings)[2]
    measured = ("mmlu", "few_shot", "limit", "validation_samples")
    tokens = require_manifest(storage.join(settings.workspace, "tokens/validation"), "tokenize")
    return {
        "checkpoint": [entry.step, entry.time],
        "tokens": tokens["fingerprint"],
        "settings": {name: getattr(settings, name) for name in measured},
        "version": ingot_version(),
    }


def _score(settings: EvaluateJob, device: str, _: Write) -> dict[str, Any]:
    """The results, measured on ``device``."""
    mmlu = None
    if settings.mmlu is not None:
        mmlu = list(read_folder(settings.mmlu, settings.few_shot, settings.limit))
    trained = load(settings, device)
    results: dict[str, Any] = {"name": settings.name, "step": trained.step, "time": time.time()}
    results.update(validation(trained, settings.workspace, settings.validation_samples, settings.batch))
    log.info(
        "evaluate: run %s at step %d, validation loss %.4f, %.4f bits per byte",
        settings.name,
        trained.step,
        results["validation_loss"],
        results["validation_bits_per_byte"],
    )
    if mmlu is not None:
        results["mmlu"], answers = _mmlu(trained, mmlu, settings)
        lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in answers)
        storage.write_bytes(storage.join(_folder(settings), "mmlu.jsonl"), lines.encode())
    return results


def validation(trained: Trained, workspace: str, samples: int, batch: int) -> dict[str, float]:
    """Loss in nats a token and bits a byte over the first sequences of the validation split.

    The sequences are those that pretraining validates on, when ``samples`` is its ``validation_samples``.

    Raises:
        SettingsError: the token shards were made with another tokenizer than the workspace's, or with more tokens than
            the model knows.
    """
    import torch

    from models.loss import IGNORE, inputs_and_targets
    from pipelines.batches import Batches
    from pipelines.shards import TokenShards

    config = trained.model.config
    shards = TokenShards(storage.join(workspace, "tokens/validation"))
    if (
        shards.manifest["tokenizer"]
        != require_manifest(storage.join(workspace, "tokenizer"), "tokenizer")["fingerprint"]
    ):
        raise SettingsError(
            f"{shards.folder}: was made with another tokenizer than the one in {workspace}/tokenizer; "
            "run `ingot tokenize` again"
        )
    if shards.manifest["vocab_size"] > config.vocab_size:
        raise SettingsError(
            f"{shards.folder}: has a vocabulary of {shards.manifest['vocab_size']}, but the model one of "
            f"{config.vocab_size}; evaluate a run that was trained on these shards"
        )
    split = Batches(shards, config.max_seq_len, batch, seed=0)
    lengths = torch.zeros(config.vocab_size, dtype=torch.int64)
    of_tokenizer = torch.from_numpy(trained.tokenizer.byte_lengths())
    lengths[: len(of_tokenizer)] = of_tokenizer
    nats, tokens, size = 0.0, 0.0, 0.0
    for rows, weights in split.in_order(samples, 0, 1, batch):
        inputs, targets = inputs_and_targets(torch.from_numpy(rows[weights > 0]))
        with torch.inference_mode():
            losses = trained.model(inputs.to(trained.device), targets.to(trained.device), reduction="none")
        nats += losses.double().sum().item()
        targets = targets[targets != IGNORE]
        tokens += targets.numel()
        size += lengths[targets].sum().item()
    return {"validation_loss": nats / tokens, "validation_bits_per_byte": nats / math.log(2) / size}


def _mmlu(trained: Trained, subjects: list[Any], settings: EvaluateJob) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Accuracy of each subject and over all questions, and what was answered to each."""
    # the letters' last token is predicted, never fed
    room = trained.model.config.max_seq_len + 1 - max(len(trained.tokenizer.encode(f" {c}")) for c in "ABCD")
    accuracy: dict[str, float] = {}
    answers: list[dict[str, Any]] = []
    for number, (subject, solved, questions) in enumerate(subjects, 1):
        prompts = [prompt_tokens(trained, solved, question, room) for question in questions]
        scores = answer(trained, prompts, settings.batch)
        chosen = scores.argmax(1).tolist()
        right = sum(c == q.answer for c, q in zip(chosen, questions, strict=True))
        accuracy[subject] = right / max(1, len(questions))
        answers += [
            {"subject": subject, "question": i, "answer": q.answer, "chosen": c, "log_likelihoods": s}
            for i, (q, c, s) in enumerate(zip(questions, chosen, scores.tolist(), strict=True))
        ]
        log.info(
            "evaluate: mmlu %d/%d, %s: %d of %d right (%.1f%%)",
            number,
            len(subjects),
            subject,
            right,
            len(questions),
            100 * accuracy[subject],
        )
    right = sum(line["answer"] == line["chosen"] for line in answers)
    results = {
        "accuracy": right / max(1, len(answers)),
        "accuracy_of_subjects": sum(accuracy.values()) / len(accuracy),
        "questions": len(answers),
        "few_shot": settings.few_shot,
        "subjects": accuracy,
    }
    log.info("evaluate: mmlu, %.2f%% of %d questions right; chance is 25%%", 100 * results["accuracy"], len(answers))
    return results, answers
