"""Curation against datatrove, on the same documents, on the same cores, in the same run: a table of ratios.

    python -m venv /tmp/datatrove && /tmp/datatrove/bin/pip install 'datatrove[processing,io]==0.10.1' spacy
    python -m tests.benchmarks.corpus FOLDER... --output /tmp/corpus
    python -m tests.benchmarks.curation --corpus /tmp/corpus --peer /tmp/datatrove/bin/python

Stages of one core are timed in CPU seconds, over slices of the corpus that both take in turn; the ratio is the median
over the slices. The whole curation is timed by the clock, on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from pipelines.documents import to_table

BATCH = 1024
SLICES = 5


class Peer:
    """The process that runs datatrove."""

    def __init__(self, python: str) -> None:
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "peer.py")
        # One thread a core for both sides.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [python, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def ask(self, stage: str, **arguments: Any) -> dict[str, Any]:
        """What the peer answers to a request.

        Raises:
            RuntimeError: it ended; its Python cannot run datatrove.
        """
        self.process.stdin.write(json.dumps({"stage": stage, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer ended in stage {stage}; run tests/benchmarks/peer.py by hand to see why")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait(timeout=60)


def main() -> None:
    """Measure the stages that are asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="folder that corpus.py wrote")
    parser.add_argument("--peer", required=True, help="Python that has datatrove")
    parser.add_argument("--stages", nargs="+", default=["rules", "minhash", "extract", "whole"])
    parser.add_argument("--documents", type=int, default=2000, help="documents for the stages of one core")
    parser.add_argument("--pages", type=int, default=1000, help="pages for the extraction")
    parser.add_argument("--whole", type=int, default=None, help="documents for the whole curation; all by default")
    args = parser.parse_args()
    peer = Peer(args.peer)
    print(f"{'stage':<22}{'unit':>8}{'datatrove':>12}{'Ingot':>12}{'ratio':>9}   slices")
    for stage in args.stages:
        if stage == "whole":
            whole(peer, args)
        elif stage == "extract":
            compare("HTML extraction", "pages/s", pages(args.corpus, args.pages), peer, "extract", "pages", our_pages)
        elif stage == "rules":
            texts = documents(args.corpus, args.documents)
            compare("rules", "MB/s", texts, peer, "rules", "texts", our_rules, tables)
        elif stage == "minhash":
            texts = [" ".join(text.split()[:1000]) for text in documents(args.corpus, 20 * args.documents)]
            texts = [text for text in texts if text.count(" ") >= 999][: args.documents]
            compare("MinHash, 1,000 words", "docs/s", texts, peer, "minhash", "texts", our_minhash, tables)
        else:
            parser.error(f"--stages {stage}: not one of rules, minhash, extract, whole")
    peer.close()


def compare(
    name: str,
    unit: str,
    items: list[str],
    peer: Peer,
    stage: str,
    argument: str,
    ours: Callable[[Any], None],
    prepare: Callable[[list[str]], Any] = list,
) -> None:
    """Both over slices of the items in turn; print speeds and the median ratio."""
    if not items:
        print(f"{name:<22}  nothing of this kind in the corpus")
        return
    ours(prepare(items[: len(items) // SLICES]))  # compiles
    seconds: list[tuple[float, float]] = []
    for number in range(SLICES):
        part = items[number::SLICES]
        theirs = peer.ask(stage, **{argument: part})["seconds"]
        mine = prepare(part)  # as the stage before leaves it; the peer, too, is timed without reading
        began = cpu_seconds()
        ours(mine)
        seconds.append((theirs, cpu_seconds() - began))
    work = len(items) if unit != "MB/s" else sum(len(item.encode()) for item in items) / 1e6
    theirs, mine = (sum(column) for column in zip(*seconds, strict=True))
    ratios = [a / b for a, b in seconds]
    told = " ".join(f"{ratio:.0f}" for ratio in ratios)
    median = statistics.median(ratios)
    print(f"{name:<22}{unit:>8}{work / theirs:>12,.2f}{work / mine:>12,.2f}{median:>8.1f}x   {told}", flush=True)


def cpu_seconds() -> float:
    """Of this process and of those it has waited for, such as the one that pages are parsed in."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def our_rules(batches: list[pa.Table]) -> None:
    """The chain of the filter stage, batch by batch."""
    from pipelines.filters.c4 import C4
    from pipelines.filters.chain import filter_table
    from pipelines.filters.fineweb import FineWeb
    from pipelines.filters.gopher import GopherQuality, GopherRepetition

    chain = [GopherRepetition(), GopherQuality(), C4(terminal_punctuation=False), FineWeb()]
    for batch in batches:
        filter_table(batch, chain)


def our_minhash(batches: list[pa.Table]) -> None:
    """Shingles and signatures, as many values as datatrove's."""
    from pipelines.dedup.minhash import signatures
    from pipelines.words import shingles

    for batch in batches:
        signatures(*shingles(batch["text"], 5), 112, 1)


def our_pages(html: list[str]) -> None:
    """Pages through the extractor as the extract stage runs it."""
    from pipelines.extract import Extractor, ExtractSettings

    with Extractor(ExtractSettings()) as extract:
        for start in range(0, len(html), 256):
            extract([(page.encode(), None) for page in html[start : start + 256]])


def whole(peer: Peer, args: argparse.Namespace) -> None:
    """From JSON Lines files to deduplicated documents, two processes of datatrove against Ray on two cores."""
    from jobs.session import ray_session
    from pipelines.curate import curate
    from pipelines.curation import CurationSettings
    from pipelines.sources import Source

    with tempfile.TemporaryDirectory() as folder:
        raw = os.path.join(folder, "raw")
        os.makedirs(raw)
        count = split(args.corpus, raw, 16, args.whole)
        rules = ["gopher_repetition", "gopher_quality", "c4", "fineweb"]
        # As the peer does by default, nothing that goes is stored.
        settings = CurationSettings(sources=[Source(kind="jsonl", path=raw, rules=rules)], set_aside_share=0.0)
        began = time.perf_counter()
        with ray_session():
            started = time.perf_counter()
            kept = list(curate(os.path.join(folder, "corpus"), settings).values())[-1]["documents_out"]
            ours = time.perf_counter() - started
        with_ray = time.perf_counter() - began
        theirs = peer.ask("whole", folder=raw, output=os.path.join(folder, "peer"), workers=2)
    print(f"{'whole curation':<22}{'docs/s':>8}{count / theirs['seconds']:>12,.1f}{count / ours:>12,.1f}", end="")
    print(f"{theirs['seconds'] / ours:>8.1f}x   {theirs['seconds'] / with_ray:.1f}x with the start of Ray")
    print(
        f"  of {count:,} documents datatrove keeps {theirs['documents']:,} in {theirs['seconds']:.0f} s, "
        f"Ingot {kept:,} in {ours:.1f} s"
    )


def documents(corpus: str, limit: int) -> list[str]:
    """The first documents of the corpus."""
    texts = []
    with open(os.path.join(corpus, "documents.jsonl")) as file:
        for line in file:
            texts.append(json.loads(line)["text"])
            if len(texts) == limit:
                break
    return texts


def pages(corpus: str, limit: int) -> list[str]:
    """The first pages of the corpus, decoded."""
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    found = []
    with open(os.path.join(corpus, "pages.warc.gz"), "rb") as file:
        for record in ArchiveIterator(file, record_types=WarcRecordType.response):
            found.append(record.reader.read().decode("utf-8", "replace"))
            if len(found) == limit:
                break
    return found


def tables(texts: list[str]) -> list[pa.Table]:
    """Documents as the stages read them."""
    return [
        to_table({"id": str(start + i), "text": text} for i, text in enumerate(texts[start : start + BATCH]))
        for start in range(0, len(texts), BATCH)
    ]


def split(corpus: str, folder: str, files: int, limit: int | None) -> int:
    """The corpus' documents, cut into files; how many they are."""
    count = 0
    os.makedirs(folder, exist_ok=True)
    outputs = [open(os.path.join(folder, f"{i:02d}.jsonl"), "w") for i in range(files)]  # noqa: SIM115
    with open(os.path.join(corpus, "documents.jsonl")) as file:
        for line in file:
            if count == limit:
                break
            outputs[count % files].write(line)
            count += 1
    for output in outputs:
        output.close()
    return count


if __name__ == "__main__":
    main()
