"""Small corpora with known duplicates, and what a search wrote about them."""

import numpy as np
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.documents import to_table


def write_parts(folder, texts, metadata=None, prefix=""):
    """Parts with the given texts; ids are ``<part>-<row>``."""
    parts = []
    for p, rows in enumerate(texts):
        uri = storage.join(str(folder), f"part-{p:05d}.parquet")
        table = to_table(
            {"id": f"{prefix}{p}-{r}", "text": text, "metadata": metadata[p][r] if metadata else None}
            for r, text in enumerate(rows)
        )
        folder.mkdir(exist_ok=True, parents=True)
        pq.write_table(table, uri, row_group_size=7 if len(rows) < 100 else 100)
        parts.append(uri)
    return parts


def read_output(output):
    """``{(part, row): (duplicate of, similarity)}``."""
    return {
        (int(file.stem.removeprefix("part-")), row["row"]): (row["duplicate_of"], row["similarity"])
        for file in sorted(output.glob("part-*.parquet"))
        for row in pq.read_table(file).to_pylist()
    }


def probability(s, bands, rows):
    """Chance that two documents of similarity s share a band."""
    return 1 - (1 - s**rows) ** bands


def pair_with_jaccard(rng, target, words=120):
    """Two texts of distinct words with one prefix in common, and the exact Jaccard similarity of their 5-grams."""
    grams = words - 4
    common = round(2 * grams * target / (1 + target))
    first = [f"w{i}" for i in rng.integers(0, 1 << 62, words)]
    shared = common + 4
    second = first[:shared] + [f"w{i}" for i in rng.integers(0, 1 << 62, words - shared)]
    return " ".join(first), " ".join(second), common / (2 * grams - common)


def planted(rng, target, pairs, words=120):
    """Texts, their copies, and the similarity of each pair."""
    made = [pair_with_jaccard(rng, target, words) for _ in range(pairs)]
    return [m[0] for m in made], [m[1] for m in made], made[0][2]


def chain_of_edits(rng, length, step=12, words=300):
    """Texts of which each differs from the next a little, and the first from the last a lot."""
    held, texts = [f"w{i}" for i in rng.integers(0, 1 << 62, words)], []
    for _ in range(length):
        texts.append(" ".join(held))
        held = held[step:] + [f"w{i}" for i in rng.integers(0, 1 << 62, step)]
    return texts


def clusters_of(found, ids):
    """Sets of ids that a search put together, from its output and the id of every ``(part, row)``."""
    sets = {}
    for where, (kept, _) in found.items():
        sets.setdefault(kept, {kept}).add(ids[where])
    return sorted(sorted(s) for s in sets.values())


def shuffled(rng, texts, parts):
    """The same texts in another order, cut into so many parts."""
    order = rng.permutation(len(texts))
    return [[texts[i] for i in cut] for cut in np.array_split(order, parts)]
