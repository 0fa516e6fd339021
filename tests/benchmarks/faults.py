"""Random kills over a curation: each run, run again after its kill, has to end with the output of the undisturbed one.

    python -m tests.benchmarks.faults --corpus DIR [--kills 20] [--documents 3000]

``DIR`` is what corpus.py wrote. For every kill a fresh workspace is curated; at a random moment the driver, a worker
or the raylet gets SIGKILL; the same command is run again until it ends by itself; then ids and texts of the corpus are
compared, and no document may be there twice.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

import xxhash

from pipelines.curate import final_corpus
from pipelines.stage import part_uris, read_part
from tests.benchmarks.curation import split

KINDS = ("driver", "worker", "raylet")


def main() -> None:
    """Kill, run again, compare, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="folder that corpus.py wrote")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--documents", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        raw = os.path.join(folder, "raw")
        os.makedirs(raw)
        split(args.corpus, raw, 8, args.documents)
        sources = json.dumps([{"kind": "jsonl", "path": raw}])
        for name in ("first", "undisturbed"):  # the first one compiles
            began = time.perf_counter()
            run(folder, name, sources).wait()
            seconds = time.perf_counter() - began
        expected = content(os.path.join(folder, "undisturbed"))
        print(f"undisturbed: {seconds:.1f} s, {sum(expected.values()):,} documents")
        equal = 0
        for number in range(args.kills):
            kind, after = KINDS[number % len(KINDS)], rng.uniform(0.2, 0.9) * seconds
            name = f"run-{number}"
            told, starts = disturbed(folder, name, sources, kind, after, rng)
            found = content(os.path.join(folder, name))
            same = found == expected and max(found.values()) == max(expected.values())
            equal += same
            print(
                f"{number + 1:>3} {kind:<7} after {after:5.1f} s: {told}; {starts} starts; "
                f"{'equal' if same else 'DIFFERENT'}",
                flush=True,
            )
    print(f"{equal} of {args.kills} runs ended with the undisturbed output")
    sys.exit(equal != args.kills)


def run(folder: str, name: str, sources: str) -> subprocess.Popen:
    """Start the curation of a workspace."""
    command = [sys.executable, "-m", "jobs", "curate", "--workspace", os.path.join(folder, name), "--sources", sources]
    log = open(os.path.join(folder, f"{name}.log"), "ab")  # noqa: SIM115
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def disturbed(folder: str, name: str, sources: str, kind: str, after: float, rng: random.Random) -> tuple[str, int]:
    """One kill, and starts until the job ends by itself: what happened, and how often it was started."""
    process = run(folder, name, sources)
    time.sleep(after)
    victims = {"driver": [process.pid], **ray_processes(process.pid)}[kind]
    told = "was not there"
    if victims and process.poll() is None:
        os.kill(rng.choice(victims), signal.SIGKILL)
        told = "killed"
    starts = 1
    while True:
        try:
            status = process.wait(timeout=180)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status, told = -9, told + ", hung"
        if status == 0:
            return told, starts
        if starts == 4:
            return told + f", status {status} again and again", starts
        process = run(folder, name, sources)
        starts += 1


def ray_processes(driver: int) -> dict[str, list[int]]:
    """Raylet and workers among the descendants of a driver."""
    children: dict[int, list[int]] = collections.defaultdict(list)
    names: dict[int, str] = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as stat, open(f"/proc/{pid}/cmdline") as command:
                children[int(stat.read().rpartition(")")[2].split()[1])].append(int(pid))
                names[int(pid)] = command.read()
        except OSError:  # it ended meanwhile
            continue
    found: dict[str, list[int]] = {"worker": [], "raylet": []}
    queue = [driver]
    while queue:
        for pid in children[queue.pop()]:
            queue.append(pid)
            if names.get(pid, "").startswith("ray::"):
                found["worker"].append(pid)
            elif "/raylet/raylet" in names.get(pid, "").split("\0")[0]:
                found["raylet"].append(pid)
    return found


def content(workspace: str) -> collections.Counter:
    """How often each id with its text is in the corpus."""
    folder, manifest = final_corpus(os.path.join(workspace, "corpus"))
    found: collections.Counter = collections.Counter()
    for uri in part_uris(folder, manifest):
        for table in read_part(uri, columns=["id", "text"]):
            found.update((row["id"], xxhash.xxh3_64_hexdigest(row["text"].encode())) for row in table.to_pylist())
    return found


if __name__ == "__main__":
    main()
