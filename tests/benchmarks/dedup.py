"""Deduplication: speed of signatures, recall and precision by similarity, components of large graphs.

    python -m tests.benchmarks.dedup --corpus /tmp/corpus --peer /tmp/datatrove/bin/python

The first table compares MinHash signatures with datatrove's and datasketch's, in CPU seconds of one core. The second
plants pairs of documents whose 5-grams have a known Jaccard similarity s, and holds what the search finds against
1 - (1 - s^rows)^bands. The third holds the components of graphs at 1, 2 and 7 partitions against scipy's.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

LEVELS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
PARTITIONS = (1, 2, 7)


def main() -> None:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="folder that corpus.py wrote; needed for signatures")
    parser.add_argument("--peer", help="Python that has datatrove; needed for signatures")
    parser.add_argument("--tables", nargs="+", default=["signatures", "pairs", "components"])
    parser.add_argument("--documents", type=int, default=1000, help="documents of 1,000 words to sign")
    parser.add_argument("--pairs", type=int, default=5000, help="planted pairs of each similarity")
    parser.add_argument("--edges", type=int, default=10_000_000, help="edges of the random graphs")
    parser.add_argument("--partitions", type=int, nargs="+", default=PARTITIONS)
    args = parser.parse_args()
    if "signatures" in args.tables:
        if not args.corpus or not args.peer:
            parser.error("--tables signatures needs --corpus and --peer")
        signatures(args)
    if {"pairs", "components"} & set(args.tables):
        import ray

        from jobs.session import ray_session

        os.environ["PYTHONPATH"] = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
        with ray_session():
            ray.data.DataContext.get_current().enable_progress_bars = False
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            if "pairs" in args.tables:
                pairs(args.pairs)
            if "components" in args.tables:
                components(args.edges, args.partitions)


def signatures(args: argparse.Namespace) -> None:
    """Real documents cut to 1,000 words: datatrove, datasketch, and ours in turn over five slices."""
    from datasketch import MinHash

    from pipelines.dedup.minhash import sign
    from tests.benchmarks.curation import Peer, batches, documents

    texts = [" ".join(text.split()[:1000]) for text in documents(args.corpus, 40 * args.documents)]
    texts = [text for text in texts if text.count(" ") >= 999][: args.documents]
    peer = Peer(args.peer)
    for batch in batches(texts[:100]):
        sign(batch, 5, 112, 1)  # compiles

    def datasketch(some: list[str]) -> None:
        for text in some:
            words = text.lower().split()
            MinHash(112, seed=1).update_batch(
                [" ".join(words[i : i + 5]).encode() for i in range(max(1, len(words) - 4))]
            )

    def ours(some: list[str]) -> None:
        for batch in batches(some):
            sign(batch, 5, 112, 1)

    seconds = {"datatrove": [], "datasketch": [], "Ingot": []}
    for number in range(5):
        some = texts[number::5]
        seconds["datatrove"].append(peer.ask("minhash", texts=some)["seconds"])
        for name, work in (("datasketch", datasketch), ("Ingot", ours)):
            began = time.process_time()
            work(some)
            seconds[name].append(time.process_time() - began)
    peer.close()
    print(f"MinHash signatures of {len(texts):,} documents of 1,000 words, 112 permutations, word 5-grams, one core")
    for name, taken in seconds.items():
        ratios = sorted(a / b for a, b in zip(seconds["datatrove"], taken, strict=True))
        print(f"  {name:<12}{len(texts) / sum(taken):>10,.0f} documents/s{ratios[2]:>9.1f}x")


def pairs(count: int) -> None:
    """Recall and precision by similarity, for the bands of the default settings and for datatrove's."""
    from pipelines.dedup.minhash import MinHashDedup, find_duplicates
    from tests.pipelines.duplicates import pair_with_jaccard, planted, probability, read_output, write_parts

    rng = np.random.default_rng(0)
    made = [planted(rng, level, count, words=160) for level in LEVELS]
    unrelated = [pair_with_jaccard(rng, 0.0, words=160)[0] for _ in range(count)]
    originals, copies = [t for m in made for t in m[0]], [t for m in made for t in m[1]]
    similarities = np.array([m[2] for m in made])
    folder = Path(tempfile.mkdtemp())
    cuts = [c.tolist() for c in np.array_split(np.arange(len(originals)), 4)]
    texts = [[side[i] for i in cut] for side in (originals, copies) for cut in cuts]
    parts = write_parts(folder / "in", [*texts, unrelated])
    settings = {
        "default": MinHashDedup(),
        "14 bands of 8": MinHashDedup(bands=14, rows=8),
        "14 bands of 8, jaccard verified from 0.75": MinHashDedup(
            bands=14, rows=8, verify="jaccard", min_similarity=0.75
        ),
    }
    for name, one in settings.items():
        results = {}
        for partitions in PARTITIONS:
            began = time.perf_counter()
            find_duplicates(parts, str(folder / "out"), one, partitions)
            results[partitions] = read_output(folder / "out")
            seconds = time.perf_counter() - began
            shutil.rmtree(folder / "out")
        same = all(found == results[1] for found in results.values())
        find_duplicates(parts[::-1], str(folder / "out"), one, 2)
        turned = read_output(folder / "out")
        shutil.rmtree(folder / "out")
        same &= sets(turned) == sets(results[1])
        found = np.zeros(len(LEVELS))
        wrong = 0
        first = [cut[0] for cut in cuts]
        for (part, row), (of, _) in results[1].items():
            wrong += part < 4 or part > 7 or of != f"{part - 4}-{row}"
            if 4 <= part <= 7:
                found[(first[part - 4] + row) // count] += 1
        bands, rows = one.bands_and_rows()
        expected = probability(similarities, bands, rows) * (
            similarities >= (one.threshold if one.verify != "none" else 0)
        )
        told = "the same result" if same else "DIFFERENT RESULTS"
        print(f"\n{name}: {bands} bands of {rows}, {count:,} pairs of each similarity;")
        print(f"{told} at {', '.join(map(str, PARTITIONS))} partitions and with the parts in reverse, ", end="")
        print(f"{wrong} wrong pairs, {seconds:.1f} s at {partitions}")
        print(
            f"{'similarity':>12}{'recall':>10}{'expected':>10}{'points':>8}{'precision':>12}{'expected':>10}{'points':>8}"
        )
        for i, s in enumerate(similarities):
            recall, precision = found[i] / count, found[: i + 1].sum() / max(1, found.sum() + wrong)
            wanted = expected[: i + 1].sum() / expected.sum()
            print(
                f"{s:>12.3f}{recall:>10.4f}{expected[i]:>10.4f}{100 * (recall - expected[i]):>8.2f}"
                f"{precision:>12.4f}{wanted:>10.4f}{100 * (precision - wanted):>8.2f}",
                flush=True,
            )
    print("precision at a similarity: share of the pairs found that are at least so similar")
    shutil.rmtree(folder)


def sets(found: dict[tuple[int, int], tuple[str, float]]) -> set[frozenset[str]]:
    """Pairs of ids, whichever of the two is kept."""
    return {frozenset((f"{part}-{row}", of)) for (part, row), (of, _) in found.items()}


def components(edges: int, partitions: list[int]) -> None:
    """Labels and times of graphs."""
    import ray

    from pipelines.dedup import collect, column
    from pipelines.dedup.components import connected_components

    print(f"\n{'graph':<34}{'edges':>12}{'scipy':>9}", *(f"{p:>4} part." for p in partitions))
    for name, a, b in graphs(edges):
        began = time.perf_counter()
        nodes, roots = by_scipy(a, b)
        seconds, same = [time.perf_counter() - began], True
        for count in partitions:
            blocks = [pa.table({"a": a[cut], "b": b[cut]}) for cut in np.array_split(np.arange(len(a)), 8)]
            data = ray.data.from_arrow(blocks).materialize()
            del blocks
            began = time.perf_counter()
            labels = connected_components(data, count)
            seconds.append(time.perf_counter() - began)
            found = collect(labels).sort_by("node")
            same &= np.array_equal(column(found, "node"), nodes) and np.array_equal(column(found, "root"), roots)
        told = "equal to scipy's" if same else "WRONG"
        print(
            f"{name:<34}{len(a):>12,}{seconds[0]:>7.1f} s",
            *(f"{s:>7.1f} s" for s in seconds[1:]),
            f"  {told}",
            flush=True,
        )


def graphs(edges: int) -> Iterator[tuple[str, Any, Any]]:
    """Names and the two ends of the edges."""
    rng = np.random.default_rng(1)
    yield "random, a node for each edge", *rng.integers(0, edges, (2, edges))
    yield "random, four nodes for each edge", *rng.integers(0, 4 * edges, (2, edges))
    order = rng.permutation(100_000)
    yield "chain of 100,000 in random order", order[:-1], order[1:]
    order = np.arange(100_000)
    yield "chain of 100,000 in order", order[:-1], order[1:]
    order = rng.permutation(edges // 2)
    yield "star", np.full(len(order) - 1, order[0]), order[1:]
    side = int((edges / 4) ** 0.5)
    grid = rng.permutation(side * side).reshape(side, side)
    yield "grid", np.r_[grid[1:].ravel(), grid[:, 1:].ravel()], np.r_[grid[:-1].ravel(), grid[:, :-1].ravel()]


def by_scipy(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every node that is not the smallest of its component, ascending, and that smallest one."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    names, ends = np.unique(np.concatenate((a, b)), return_inverse=True)
    graph = coo_matrix((np.ones(len(a), np.int8), (ends[: len(a)], ends[len(a) :])), shape=(len(names), len(names)))
    _, labels = connected_components(graph.tocsr(), directed=False)
    _, first = np.unique(labels, return_index=True)
    roots = names[first[labels]]
    return names[names != roots], roots[names != roots]


if __name__ == "__main__":
    main()
