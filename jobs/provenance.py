"""What a run is trained on: noted down when it starts, since the workspace goes on; and how much of it it has seen."""

from __future__ import annotations

import html
import math
from typing import Any

import numpy as np

from jobs.charts import byte_size, number
from jobs.history import Columns
from jobs.page import figure, folded, table
from jobs.pictures import funnel_chart, shares_chart
from pipelines import storage
from pipelines.batches import Batches
from pipelines.curate import stage_manifests
from pipelines.shards import TokenShards
from pipelines.stage import read_manifest

_OF_A_STAGE = ("documents_in", "documents_out", "bytes_in", "bytes_out", "seconds", "set_aside", "counts")
_MOST_DOCUMENTS = 50_000_000  # whose places fit into a gigabyte of memory
_OF_TOKENS = ("tokens", "documents", "bytes", "fingerprint", "sequence_length")


def data_facts(workspace: str) -> dict[str, Any]:
    """The numbers of the workspace's corpus, tokenizer and token shards, for ``data`` in ``run.json``.

    The stages of the corpus are left out when it was made anew since the tokens were.
    """
    facts: dict[str, Any] = {"stages": {}, "tokens": {}}
    made_of = None
    for split in ("train", "validation"):
        if manifest := read_manifest(storage.join(workspace, "tokens", split)):
            facts["tokens"][split] = {name: manifest.get(name) for name in _OF_TOKENS}
            made_of = manifest.get("inputs", {}).get("corpus", made_of)
    if tokenizer := read_manifest(storage.join(workspace, "tokenizer")):
        facts["tokenizer"] = {name: tokenizer.get(name) for name in ("vocab_size", "bytes_per_token")}
    stages = stage_manifests(storage.join(workspace, "corpus"))
    if stages and list(stages.values())[-1]["fingerprint"] == made_of:
        facts["stages"] = {
            stage: {name: manifest[name] for name in _OF_A_STAGE if name in manifest}
            for stage, manifest in stages.items()
        }
    return facts


def data_section(facts: dict[str, Any]) -> str:
    """Funnel, stages and tokens as HTML, of ``data_facts``."""
    out = []
    if facts.get("stages"):
        out += [figure("Data", funnel_chart(facts["stages"])), stage_tables(facts["stages"])]
    rows = []
    if tokenizer := facts.get("tokenizer"):
        size, compression = tokenizer["vocab_size"], tokenizer["bytes_per_token"]
        told = f", {compression:.2f} bytes per token" if compression else ""  # not known of one that was imported
        rows.append(["tokenizer", f"{size:,} tokens in the vocabulary{told}"])
    for split, m in facts.get("tokens", {}).items():
        told = f"{number(m['tokens'])} tokens of {m['documents']:,} documents, {byte_size(m['bytes'])} of text"
        rows.append([f"tokens, {split}", told])
    return "".join([*out, table("Tokens", ["", ""], rows)])


def stage_tables(stages: dict[str, dict[str, Any]]) -> str:
    """What went into each stage and came out, how fast; why documents went, and what was edited."""
    rows = []
    for stage, m in stages.items():
        took = m.get("seconds", 0.0)
        speed = f"{byte_size(m['bytes_in'] / max(took, 1e-9))}/s"
        rows.append(
            [
                stage,
                f"{m['documents_in']:,}",
                f"{m['documents_out']:,}",
                byte_size(m["bytes_in"]),
                byte_size(m["bytes_out"]),
                f"{100 * m['documents_out'] / max(m['documents_in'], 1):.1f} %",
                *([f"{took:.1f} s", speed] if took else ["", ""]),
            ]
        )
    why = [
        [stage, reason, f"{counts['documents']:,}", byte_size(counts["bytes"])]
        for stage, m in stages.items()
        for reason, counts in sorted(m["set_aside"].items(), key=lambda item: -item[1]["documents"])
    ]
    edits = [[stage, what, f"{count:,}"] for stage, m in stages.items() for what, count in m.get("counts", {}).items()]
    header = ["stage", "documents in", "out", "bytes in", "out", "kept", "time", "speed"]
    return (
        table("", header, rows)
        + folded("Why documents went", table("", ["stage", "reason", "documents", "bytes"], why))
        + folded("What was edited", table("", ["stage", "what", "times"], edits))
    )


class Mixture:
    """How many tokens of each source a run has been trained on; asked again and again while it goes on.

    Every sample of every step that counts is looked up, so the numbers are exact: what was undone or skipped is not in
    them, and what came again in a later epoch is in them again. Only steps that are new since the last time cost.

    Args:
        workspace: with the token shards.
        facts: content of the run's ``run.json``.
    """

    def __init__(self, workspace: str, facts: dict[str, Any]) -> None:
        self.tokens: dict[str, int] = {}
        self.why_not: str | None = None
        self.left = 0
        self._seen = np.empty(0, np.int64)
        self._batches: Batches | None = None
        self._workspace, self._facts = workspace, facts

    def update(self, valid: Columns, skips: list[list[int]], most: int | None = None) -> dict[str, int]:
        """Tokens by source in the steps that count; nothing, and ``why_not``, when they cannot be told.

        Args:
            valid: metrics of these steps, sorted.
            skips: half-open ranges of data steps that are passed over.
            most: samples to look up this time, about; the rest is ``left`` for the next. None looks up all.
        """
        self.why_not = self.why_not or self._open()
        if self._batches is None:
            return {}
        seen = data_steps(valid, skips)
        whole = len(seen)
        if most is not None:
            seen = seen[: len(self._seen) + max(1, most // self._batches.global_batch)]
        self.left = whole - len(seen)
        same = min(len(seen), len(self._seen))
        differ = np.flatnonzero(seen[:same] != self._seen[:same])
        same = int(differ[0]) if len(differ) else same
        for steps, sign in ((seen[same:], 1), (self._seen[same:], -1)):
            for source, count in self._batches.tokens_by_source(steps).items():
                self.tokens[source] = self.tokens.get(source, 0) + sign * count
        self._seen = seen
        return {source: count for source, count in self.tokens.items() if count}

    def _open(self) -> str | None:
        if self._batches is not None:
            return None
        folder = storage.join(self._workspace, "tokens", "train")
        manifest = read_manifest(folder)
        if manifest is None or manifest["fingerprint"] != self._facts.get("tokens_manifest"):
            return "The tokens that this run was trained on are not in the workspace any more."
        if manifest["documents"] > _MOST_DOCUMENTS:
            return f"The training split has {manifest['documents']:,} documents, too many to look all samples up here."
        settings = self._facts["settings"]
        length = settings.get("sequence_length") or self._facts["model"]["max_seq_len"]
        # samples in a data step, as `PretrainJob.data_batch` has it
        batch = math.gcd(settings["global_batch"], *(size for _, size in settings.get("batch_ramp") or ()))
        try:
            self._batches = Batches(TokenShards(folder), length, batch, settings["seed"])
        except (FileNotFoundError, ValueError) as error:
            return str(error)
        return None


def data_steps(valid: Columns, skips: list[list[int]]) -> np.ndarray:
    """The data steps that steps were trained on, in order, (k,) int64.

    A step begins at its ``data_step`` and takes as many as its ``data_steps`` says, one where it says nothing; it
    passes over skipped ones.
    """
    first = valid["data_step"].astype(np.int64)
    many = np.nan_to_num(valid["data_steps"], nan=1.0).astype(np.int64)
    if not (many > 1).any():
        return first
    # The n-th of the data steps that are not skipped, and back.
    ranges = np.array(skips, np.int64).reshape(-1, 2)
    lengths = ranges[:, 1] - ranges[:, 0]
    gone = np.concatenate([[0], np.cumsum(lengths)])
    own = np.repeat(first - gone[np.searchsorted(ranges[:, 1], first, "right")], many)
    own += np.arange(len(own)) - np.repeat(np.cumsum(many) - many, many)
    return own + gone[np.searchsorted(ranges[:, 0] - gone[:-1], own, "right")]


def mixture_section(tokens: dict[str, int], mixture: Mixture, of_epoch: int | None) -> str:
    """The mixture as HTML.

    Args:
        tokens: by source.
        mixture: that counted them.
        of_epoch: tokens of the training split.
    """
    if not tokens:
        told = html.escape(mixture.why_not or "")
        return f"<section><h2>Data seen so far</h2><p>{told}</p></section>" if told else ""
    total = sum(tokens.values())
    note = f"{number(total)} tokens" + (f", {total / of_epoch:.2f} epochs of the training split" if of_epoch else "")
    shares = sorted(tokens.items(), key=lambda item: -item[1])
    note += f"; {mixture.left:,} data steps are still to be counted" if mixture.left else ""
    return figure("Data seen so far", shares_chart(shares, number), f"{note}. Counted from the order of the batches.")
