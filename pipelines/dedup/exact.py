"""Exact duplicates: documents whose text has the same 128-bit hash (xxh3)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import xxhash

from pipelines import storage
from pipelines.dedup import (
    column,
    compact,
    for_parts,
    map_blocks,
    nodes,
    part_names,
    partitions_for,
    shuffle,
    write_duplicates,
)
from pipelines.stage import read_part


@dataclass
class ExactDedup:
    """Drops documents whose text another document has, and keeps the first."""

    enabled: bool = True
    """Whether exact duplicates are dropped."""
    ignore_case_and_space: bool = False
    """Whether texts that differ only in case and white space count as the same."""


def find_duplicates(parts: list[str], output: str, settings: ExactDedup, partitions: int | None = None) -> int:
    """Write which rows of a corpus are exact duplicates of an earlier row.

    The result does not depend on the number of partitions. ``output`` is emptied first.

    Args:
        parts: URIs of the corpus parts in order (Parquet, documents.SCHEMA).
        output: folder for the files of dedup.DUPLICATES_SCHEMA, one for each part that has duplicates.
        settings: what counts as the same.
        partitions: blocks to shuffle into; by default one for each 128 MB of hashes.

    Returns:
        How many documents are to be dropped.
    """
    part_names(parts)
    storage.delete(output)
    if not settings.enabled:
        return 0
    ignore = settings.ignore_case_and_space

    def hash_part(index: int, part: str) -> Iterator[pa.Table]:
        row = 0
        for batch in read_part(part, columns=["text"]):
            digests = b"".join(text_digest(text or "", ignore) for text in batch["text"].to_pylist())
            high, low = np.frombuffer(digests, ">i8").reshape(-1, 2).astype(np.int64).T
            yield pa.table({"high": high, "low": low, "node": nodes(index, np.arange(row, row + len(batch)))})
            row += len(batch)

    hashes = for_parts(parts, hash_part)
    if not hashes.count():
        return 0
    partitions = partitions_for(hashes, partitions)
    labels = compact(map_blocks(shuffle(hashes, "high", partitions), _link))
    return write_duplicates(labels, parts, output, partitions)


def text_digest(text: str, ignore_case_and_space: bool = False) -> bytes:
    """16 bytes that are equal for texts that count as the same."""
    if ignore_case_and_space:
        text = " ".join(text.casefold().split())
    return xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass"))


def _link(table: pa.Table) -> pa.Table:
    """Every row of a partition whose hash an earlier node has, with the first such node."""
    high, low, node = (column(table, name) for name in ("high", "low", "node"))
    order = np.lexsort((node, low, high))
    high, low, node = high[order], low[order], node[order]
    opens = np.ones(len(node), bool)
    opens[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    root = node[opens][np.cumsum(opens) - 1]
    later = ~opens
    return pa.table({"node": node[later], "root": root[later], "similarity": np.ones(np.count_nonzero(later))})
