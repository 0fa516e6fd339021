"""Curation of 1, 4 and 16 times a corpus: time a document, and the peak memory of a worker.

    python -m tests.benchmarks.growth --corpus DIR [--documents 4000] [--times 1 4 16]

``DIR`` is what corpus.py wrote. Copies are made different by changing a third of their words, so that they are no
duplicates. Each size is curated by a process of its own, whose workers were warmed up; memory is what a worker has for
itself, without what it shares with others (Linux: private pages), looked at ten times a second.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time

from tests.benchmarks.curation import split
from tests.benchmarks.faults import ray_processes


def main() -> None:
    """Measure each size and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="folder that corpus.py wrote")
    parser.add_argument("--documents", type=int, default=4000)
    parser.add_argument("--times", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    print(
        f"{'size':>5}{'documents':>11}{'MB':>9}{'kept':>9}{'seconds':>9}{'ms a document':>15}{'peak MB a worker':>18}"
    )
    for times in args.times:
        with tempfile.TemporaryDirectory() as folder:
            make(args.corpus, os.path.join(folder, "raw"), args.documents, times)
            split(args.corpus, os.path.join(folder, "warm"), 2, 200)
            command = [sys.executable, "-m", "tests.benchmarks.growth", "--corpus", args.corpus, "--child", folder]
            answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        found = json.loads(answer.strip().splitlines()[-1])
        print(
            f"{times:>4}x{found['documents']:>11,}{found['bytes'] / 1e6:>9.1f}{found['kept']:>9,}"
            f"{found['seconds']:>9.1f}{1e3 * found['seconds'] / found['documents']:>15.2f}{found['peak'] / 1e6:>18.0f}",
            flush=True,
        )
        told = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found["stages"].items())
        print(f"      {told}", flush=True)


def make(corpus: str, folder: str, documents: int, times: int) -> None:
    """``times`` copies of the first documents, in 4 files each."""
    for copy in range(times):
        split(corpus, os.path.join(folder, f"{copy:02d}"), 4, documents)
        if not copy:
            continue
        for name in sorted(os.listdir(os.path.join(folder, f"{copy:02d}"))):
            path = os.path.join(folder, f"{copy:02d}", name)
            rng = random.Random(f"{copy} {name}")
            with open(path) as file:
                rows = [json.loads(line) for line in file]
            with open(path, "w") as file:
                for row in rows:
                    file.write(json.dumps({"text": change(row["text"], rng)}, ensure_ascii=False) + "\n")


def change(text: str, rng: random.Random) -> str:
    """The text with a letter more on a third of its longer words."""
    return re.sub(r"[a-z]{4,}", lambda m: m[0] + rng.choice("aeiou") if rng.random() < 0.34 else m[0], text)


def child(folder: str) -> None:
    """Curate a folder after a warm-up; prints what was measured as JSON."""
    from jobs.session import ray_session
    from pipelines.curate import curate
    from pipelines.curation import CurationSettings
    from pipelines.sources import Source

    def settings(path: str) -> CurationSettings:
        rules = ["language", "gopher_repetition", "gopher_quality", "c4", "fineweb"]
        return CurationSettings(sources=[Source(kind="jsonl", path=path, rules=rules)])

    with ray_session():
        curate(os.path.join(folder, "warm-corpus"), settings(os.path.join(folder, "warm")))
        watch = Watch()
        watch.start()
        began = time.perf_counter()
        manifests = curate(os.path.join(folder, "corpus"), settings(os.path.join(folder, "raw")))
        seconds = time.perf_counter() - began
        watch.stopped.set()
    first, last = next(iter(manifests.values())), list(manifests.values())[-1]
    print(
        json.dumps(
            {
                "documents": first["documents_in"],
                "bytes": first["bytes_in"],
                "kept": last["documents_out"],
                "seconds": seconds,
                "peak": watch.peak,
                "stages": {name: manifest["seconds"] for name, manifest in manifests.items()},
            }
        )
    )


class Watch(threading.Thread):
    """Remembers the most private memory that any Ray worker had."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.stopped = threading.Event()

    def run(self) -> None:
        """Look ten times a second."""
        workers: list[int] = []
        turn = 0
        while not self.stopped.wait(0.1):
            if turn % 10 == 0:
                workers = ray_processes(os.getpid())["worker"]
            turn += 1
            for pid in workers:
                self.peak = max(self.peak, private_bytes(pid))


def private_bytes(pid: int) -> int:
    """Memory that a process shares with no other."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            lines = [line.split() for line in file if line.startswith("Private_")]
    except OSError:
        return 0
    return 1024 * sum(int(line[1]) for line in lines)


if __name__ == "__main__":
    main()
