"""Candidate pairs of near-duplicates looked at again: those that are not similar enough are left out.

One document's signature or set of shingles travels to the file of the other, where the two are compared; both files
are read once, in order and batch by batch. The document that travels is the one with few pairs: the first of a group,
with which all others are paired, stays where it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipelines.dedup import column, compact, kernels, map_blocks, nodes, published, union
from pipelines.dedup.rows import attach, iterate_rows
from pipelines.words import shingles

if TYPE_CHECKING:
    from ray.data import Dataset

    from pipelines.dedup.minhash import MinHashDedup

_PAIRS = 2048  # pairs whose sets are held at a time


def verify(
    edges: Dataset, files: list[str], parts: list[str], settings: MinHashDedup, partitions: int | None
) -> Dataset:
    """Edges whose documents are at least ``settings.threshold`` similar, each once.

    Args:
        edges: columns a and b, int64; a is the first of a group.
        files: of signatures, by number.
        parts: URIs of the corpus parts, which the last of the files belong to.
        settings: verify, threshold and shingle.
        partitions: blocks to shuffle into.
    """
    before = len(files) - len(parts)
    by_signature = _Signatures(files, settings.threshold)
    if settings.verify == "signature":
        return _compare(edges, len(files), partitions, by_signature)
    by_jaccard = _Shingles(parts, before, settings.shingle, settings.threshold)
    if not before:
        return _compare(edges, len(files), partitions, by_jaccard)
    new = int(nodes(before, 0))
    inner = compact(map_blocks(edges, lambda table: table.filter(pa.array(_lower(table) >= new))))
    outer = compact(map_blocks(edges, lambda table: table.filter(pa.array(_lower(table) < new))))
    return union(
        _compare(inner, len(files), partitions, by_jaccard), _compare(outer, len(files), partitions, by_signature)
    )


def _lower(table: pa.Table) -> np.ndarray:
    return np.minimum(column(table, "a"), column(table, "b"))


def _compare(edges: Dataset, files: int, partitions: int | None, measure: _Signatures | _Shingles) -> Dataset:
    def fetch(file: int, table: pa.Table, rows: np.ndarray) -> Iterator[pa.Table]:
        # The bands in which two documents agree lie in several partitions; here their pair comes together again.
        order = np.lexsort((column(table, "a"), rows))
        a, rows = column(table, "a")[order], rows[order]
        first = np.ones(len(a), bool)
        first[1:] = (a[1:] != a[:-1]) | (rows[1:] != rows[:-1])
        table, rows = table.take(order[first]), rows[first]
        for start, stop, which, found in measure.read(file, rows):
            yield table.slice(start, stop - start).append_column("other", found.take(which))

    def compare(file: int, table: pa.Table, rows: np.ndarray) -> Iterator[pa.Table]:
        for start, stop, which, found in measure.read(file, rows):
            pairs = table.slice(start, stop - start)
            similar = measure.similarity(found, which, pairs["other"].combine_chunks()) >= measure.threshold
            yield pairs.filter(pa.array(similar)).select(["a", "b"])

    fetched = attach(edges, "b", files, partitions, fetch, spread="a")
    return attach(fetched, "a", files, partitions, compare, spread="b")


class _Signatures:
    """The share in which two documents' signatures agree."""

    def __init__(self, files: list[str], threshold: float) -> None:
        self.files, self.threshold = files, threshold

    def read(self, file: int, rows: np.ndarray) -> Iterator[tuple[int, int, np.ndarray, pa.Array]]:
        for start, stop, which, table in iterate_rows(self.files[file], ["fingerprint"], rows, _PAIRS):
            yield start, stop, which, table["fingerprint"]

    def similarity(self, found: pa.Array, which: np.ndarray, other: pa.Array) -> np.ndarray:
        return (published.from_binary(found, "<u4")[which] == published.from_binary(other, "<u4")).mean(axis=1)


class _Shingles:
    """The Jaccard similarity of two documents' sets of shingles."""

    def __init__(self, parts: list[str], before: int, shingle: int, threshold: float) -> None:
        self.parts, self.before, self.shingle, self.threshold = parts, before, shingle, threshold

    def read(self, file: int, rows: np.ndarray) -> Iterator[tuple[int, int, np.ndarray, pa.Array]]:
        for start, stop, which, table in iterate_rows(self.parts[file - self.before], ["text"], rows, _PAIRS):
            values, offsets = kernels.sort_sets(*shingles(table["text"], self.shingle))
            yield start, stop, which, pa.LargeListArray.from_arrays(offsets, values)

    def similarity(self, found: pa.Array, which: np.ndarray, other: pa.Array) -> np.ndarray:
        return kernels.jaccard(*_sets(other), *_sets(found), which)


def _sets(lists: pa.LargeListArray) -> tuple[np.ndarray, np.ndarray]:
    return lists.values.to_numpy(), lists.offsets.to_numpy()
