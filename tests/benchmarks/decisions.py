"""Do the published rule sets decide as datatrove's do, and how much faster?

Each rule set judges the same text alone; then the documents go through all of them in FineWeb's order (Gopher's
repetition, its quality, C4 without terminal punctuation, FineWeb). Printed are the agreement by rule set and kind of
document, whether C4's edited text is the same line by line, the speed of both on one core, and every class of
disagreement with its share and a few ids.

    python -m tests.benchmarks.decisions --documents corpus.jsonl --peer /path/to/datatrove/bin/python

Where the two part, and why:

- Scripts without spaces (Han, kana, Thai, ...). Ingot takes each character for a word, spaCy's English tokenizer the
  whole run up to the next blank. Ingot finds more repeated n-grams and shorter words there; the rule sets are meant for
  English, so that such documents seldom get this far.
- Letters and symbols that spaCy does not list (it names some forty scripts, and emoji up to 2018): a word may be cut at
  another hyphen or full stop. No decision is known to have hung on it.
- A document without text: datatrove's repetition rules drop it, Ingot sets it aside before any rule.

Documents are JSON lines with `text`, and if there are, `id` and `kind`. The peer is a Python that has datatrove 0.10
with spaCy; times are CPU seconds of one process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice
from typing import Any

CHAIN = ("repetition", "quality", "c4 without terminal punctuation", "fineweb")
"""FineWeb's order."""
RULE_SETS = ("repetition", "quality", "fineweb", "c4", "c4 without terminal punctuation")
_BATCH = 512


def read(path: str, limit: int) -> Iterator[dict[str, Any]]:
    """The documents, each with an id and a kind."""
    with open(path, encoding="utf-8") as file:
        for i, line in enumerate(islice(file, limit)):
            row = json.loads(line)
            yield {"id": str(row.get("id", i)), "kind": row.get("kind", "text"), "text": row["text"]}


# datatrove, run by the peer's Python


def peer(documents: str, limit: int, output: str) -> None:
    """Write a JSON line for each document: why datatrove drops it, by rule set, and what C4 makes of its text."""
    from datatrove.data import Document
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )
    from datatrove.utils.text import split_into_parts

    filters = {
        "repetition": GopherRepetitionFilter(),
        "quality": GopherQualityFilter(),
        "fineweb": FineWebQualityFilter(),
        "c4": C4QualityFilter(),
        "c4 without terminal punctuation": C4QualityFilter(filter_no_terminal_punct=False),
    }

    def judge(name: str, document: Any) -> str | None:
        result = filters[name].filter(document)
        return None if result is True else "dropped" if result is False else result[1]

    for name in RULE_SETS:  # loads the tokenizer
        judge(name, Document(text="This is a text. It has two sentences.", id="0"))
    seconds: Counter[str] = Counter()
    with open(output, "w", encoding="utf-8") as file:
        for row in read(documents, limit):
            found: dict[str, Any] = {"reasons": {}, "texts": {}}
            for name in (*RULE_SETS, "chain"):
                if name not in ("quality", "fineweb"):  # these are given the words of the rule set before
                    split_into_parts.cache_clear()
                document = Document(text=row["text"], id=row["id"])
                start = time.process_time()
                reason = None
                for step in CHAIN if name == "chain" else (name,):
                    if reason := judge(step, document):
                        reason = f"{step}: {reason}" if name == "chain" else reason
                        break
                seconds[name] += time.process_time() - start
                found["reasons"][name] = reason
                if name.startswith("c4") and reason is None:
                    found["texts"][name] = document.text
            file.write(json.dumps(found) + "\n")
    print(json.dumps(seconds))


# Ingot


def ours(documents: str, limit: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The same of Ingot's rule sets, and CPU seconds by rule set."""
    from pipelines.documents import to_table
    from pipelines.filters import Batch, judge
    from pipelines.filters.c4 import C4
    from pipelines.filters.fineweb import FineWeb
    from pipelines.filters.gopher import GopherQuality, GopherRepetition

    rules = {
        "repetition": GopherRepetition(),
        "quality": GopherQuality(),
        "fineweb": FineWeb(),
        "c4": C4(),
        "c4 without terminal punctuation": C4(terminal_punctuation=False),
    }

    def apply(name: str, batch: Batch) -> tuple[list[str | None], Batch]:
        """Why each document goes, and all documents with their edited text."""
        applied = rules[name].apply(batch)
        broken, _, _ = judge(applied.measures, len(batch))
        reasons = [None if i < 0 else applied.measures[i].reason for i in broken.tolist()]
        return reasons, batch if applied.text is None else batch.with_text(applied.text)

    def chain(batch: Batch) -> list[str | None]:
        import numpy as np

        reasons: list[str | None] = [None] * len(batch)
        rest = list(range(len(batch)))
        for name in CHAIN:
            found, batch = apply(name, batch)
            for document, reason in zip(rest, found, strict=True):
                reasons[document] = reason
            batch = batch.filter(np.array([reason is None for reason in found], bool))
            rest = [document for document, reason in zip(rest, found, strict=True) if reason is None]
        return reasons

    seconds: Counter[str] = Counter()

    def run(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [{"reasons": {}, "texts": {}} for _ in rows]
        table = to_table([{"id": row["id"], "text": row["text"]} for row in rows])
        for name in (*RULE_SETS, "chain"):
            start = time.process_time()
            reasons, batch = (chain(Batch(table)), None) if name == "chain" else apply(name, Batch(table))
            seconds[name] += time.process_time() - start
            texts = batch.table["text"].to_pylist() if batch is not None and name.startswith("c4") else []
            for i, reason in enumerate(reasons):
                found[i]["reasons"][name] = reason
                if texts and reason is None:
                    found[i]["texts"][name] = texts[i]
        return found

    run([{"id": "0", "text": "One. Two [1] compile.\n\n" * 3}, {"id": "1", "text": ""}])  # compiles
    seconds.clear()
    found: list[dict[str, Any]] = []
    rows = read(documents, limit)
    while batch := list(islice(rows, _BATCH)):
        found.extend(run(batch))
    return found, seconds


# comparison


def compare(documents: str, limit: int, python: str) -> None:
    """Run both and print what agrees, how fast they are, and where they part."""
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as file:
        command = [python, __file__, "--documents", documents, "--limit", str(limit), "--write", file.name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        peer_seconds = json.loads(done.stdout.splitlines()[-1])
        theirs = [json.loads(line) for line in file]
    mine, seconds = ours(documents, limit)
    kinds, ids, size = [], [], 0
    for row in read(documents, limit):
        kinds.append(row["kind"])
        ids.append(row["id"])
        size += len(row["text"].encode())
    print(
        f"{len(mine):,} documents ({', '.join(f'{n:,} {k}' for k, n in Counter(kinds).items())}), {size / 1e6:.1f} MB"
    )
    print(f"\n{'':34}{'agreement':>10}  " + "".join(f"{kind:>8}" for kind in sorted(set(kinds))), end="")
    print(f"{'both drop':>11}{'datatrove':>12}{'Ingot':>12}{'ratio':>7}")
    for name in (*RULE_SETS, "chain"):
        pairs = [(a["reasons"][name], b["reasons"][name]) for a, b in zip(theirs, mine, strict=True)]
        same = [(a is None) == (b is None) for a, b in pairs]
        print(f"{name:34}{_percent(sum(same), len(same)):>10}  ", end="")
        for kind in sorted(set(kinds)):
            part = [s for s, k in zip(same, kinds, strict=True) if k == kind]
            print(f"{_percent(sum(part), len(part)):>8}", end="")
        print(f"{sum(a is not None and b is not None for a, b in pairs):>11,}", end="")
        print(f"{size / 1e6 / peer_seconds[name]:>7.2f} MB/s{size / 1e6 / seconds[name]:>7.1f} MB/s", end="")
        print(f"{peer_seconds[name] / seconds[name]:>6.0f}x")
    print("(datatrove's quality and fineweb are timed without the words, which they are given)")
    for name in (name for name in RULE_SETS if name.startswith("c4")):
        texts = [
            (a["texts"][name], b["texts"][name])
            for a, b in zip(theirs, mine, strict=True)
            if name in a["texts"] and name in b["texts"]
        ]
        equal = sum(a.split("\n") == b.split("\n") for a, b in texts)
        print(f"\n{name}: edited text equal line by line in {equal:,} of {len(texts):,} ", end="")
        print(f"documents that both keep ({_percent(equal, len(texts))})")
    for name in (*RULE_SETS, "chain"):
        classes: dict[tuple[str, str], list[str]] = defaultdict(list)
        for document, a, b in zip(ids, theirs, mine, strict=True):
            if (a["reasons"][name] is None) != (b["reasons"][name] is None):
                classes[a["reasons"][name] or "kept", b["reasons"][name] or "kept"].append(document)
        print(f"\n{name}: {sum(map(len, classes.values())):,} disagreements")
        for (a, b), found in sorted(classes.items(), key=lambda item: -len(item[1])):
            print(f"  {_percent(len(found), len(mine)):>8} {len(found):6,}  datatrove: {a}; Ingot: {b}", end="")
            print(f"  ({', '.join(found[:3])})")


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else "-"


def main() -> None:
    """Parse the command line; with --write this is the peer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", required=True, help="JSON lines with text, id, kind")
    parser.add_argument("--peer", help="Python that has datatrove and spaCy")
    parser.add_argument("--limit", type=int, default=sys.maxsize, help="only the first so many documents")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        peer(arguments.documents, arguments.limit, arguments.write)
    elif arguments.peer:
        compare(arguments.documents, arguments.limit, arguments.peer)
    else:
        parser.error("--peer is needed: a Python that has datatrove and spaCy")


if __name__ == "__main__":
    sys.path[:0] = [] if any(part == "--write" for part in sys.argv) else [__file__.rsplit("/tests/", 1)[0]]
    main()
