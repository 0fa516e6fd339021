"""Near-duplicate removal by MinHash and banded LSH (Broder 1997; Lee et al. 2021, section 4.2).

Documents are shingled into word 5-grams, each signature is cut into bands, documents that agree on any whole band
become an edge to the first of them, and the first document of each connected component stays. Two documents of
Jaccard similarity s become an edge with probability ``1 - (1 - s**rows)**bands``.

Signatures are those of ``datasketch.MinHash`` (2.0, scheme affine32) with the same seed and the same 32-bit hash
values of the shingles.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipelines import storage
from pipelines.dedup import (
    attach,
    column,
    compact,
    for_parts,
    log,
    map_blocks,
    nodes,
    part_names,
    partitions_for,
    read_rows,
    shuffle,
    write_duplicates,
)
from pipelines.dedup.components import connected_components
from pipelines.stage import read_part
from pipelines.words import analyse, ngram_hashes

if TYPE_CHECKING:
    from ray.data import Dataset

_EMPTY = np.uint32(0xFFFFFFFF)
_BLOCK = 1 << 15  # shingles at a time: 128 KB, so that a block and its permuted copy stay in the cache
_ROWS = 512  # documents whose shingles are held at a time


@dataclass
class MinHashDedup:
    """Drops documents that are nearly the same as an earlier one."""

    enabled: bool = True
    """Whether near-duplicates are dropped."""
    jaccard: float = 0.75
    """Similarity of two documents' shingles at which bands and rows are aimed; half of such pairs are found or more."""
    permutations: int = 112
    """Most hash functions of a signature; bands times rows of them are used."""
    shingle: int = 5
    """Words of a shingle; words are runs of letters and digits, without regard to case."""
    seed: int = 1
    """Seed of the permutations."""
    min_similarity: float = 0.0
    """Pairs whose signatures agree in a smaller share are not linked; 0 links all that share a band."""

    def validate(self) -> None:
        """Raises ValueError for values outside their range."""
        for name, low, high in (("jaccard", 0.1, 0.99), ("min_similarity", 0.0, 1.0)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}, must be between {low} and {high}")
        for name, low, high in (("permutations", 4, 1024), ("shingle", 1, 100)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}, must be between {low} and {high}")
        try:
            self.bands_and_rows()
        except ValueError:
            raise ValueError(
                f"permutations is {self.permutations}, must be more for a jaccard of {self.jaccard}: "
                "they do not make two bands"
            ) from None

    def bands_and_rows(self) -> tuple[int, int]:
        """Bands and rows a band that weigh missed pairs and false ones the same (datasketch's arithmetic)."""
        return _bands_and_rows(self.jaccard, self.permutations)


@functools.lru_cache
def _bands_and_rows(jaccard: float, permutations: int) -> tuple[int, int]:
    from datasketch import MinHashLSH

    lsh = MinHashLSH(threshold=jaccard, num_perm=permutations)
    return lsh.b, lsh.r


def shingle_hashes(text: str, n: int) -> np.ndarray:
    """32-bit hashes of the word n-grams of a text, uint32; a shorter text is one shingle, one without words none."""
    words = analyse(text.lower(), letters=True)
    grams = ngram_hashes(words.hashes, min(n, max(1, len(words))))
    return (grams >> np.uint64(32)).astype(np.uint32)


@functools.lru_cache
def _permutations(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    from datasketch import MinHash

    a, b = MinHash(num_perm=count, seed=seed).permutations
    return a, b


def signatures(shingles: list[np.ndarray], permutations: int, seed: int) -> np.ndarray:
    """MinHash signatures, bit for bit those of ``datasketch.MinHash(permutations, seed)`` over the same hash values.

    Args:
        shingles: for each document the 32-bit hashes of its shingles, uint32.
        permutations: hash functions of a signature.
        seed: of the permutations.

    Returns:
        (documents, permutations), uint32; all ones for a document without shingles.
    """
    a, b = _permutations(permutations, seed)
    result = np.full((permutations, len(shingles)), _EMPTY, np.uint32)
    filled = np.array([i for i, s in enumerate(shingles) if len(s)], np.int64)
    if not len(filled):
        return result.T
    values = _fmix32(np.concatenate(shingles))
    offsets = np.concatenate(([0], np.cumsum([len(shingles[i]) for i in filled])))
    minima = np.full((permutations, len(filled)), _EMPTY, np.uint32)
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        permuted = np.empty_like(block)
        first = np.searchsorted(offsets, start, "right") - 1
        last = np.searchsorted(offsets, start + len(block), "left")
        cuts = np.maximum(offsets[first:last], start) - start
        for i in range(permutations):
            np.multiply(block, a[i], out=permuted)
            np.add(permuted, b[i], out=permuted)
            row = minima[i, first:last]
            np.minimum(row, np.minimum.reduceat(permuted, cuts), out=row)
    result[:, filled] = minima
    return np.ascontiguousarray(result.T)


def _fmix32(x: np.ndarray) -> np.ndarray:
    """The finalizer of MurmurHash3, which datasketch applies to hash values before it permutes them."""
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
    return x


def band_keys(signature: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """A 64-bit key of every band, in which its number is mixed; (documents, bands), int64.

    Args:
        signature: (documents, bands * rows), uint32.
        bands: bands of a signature.
        rows: values of a band.
    """
    cut = signature.reshape(len(signature), bands, rows).astype(np.uint64)
    number = np.arange(1, bands + 1, dtype=np.uint64)
    keys = np.broadcast_to(number * np.uint64(0x9E3779B97F4A7C15), cut.shape[:2]).copy()
    for i in range(rows):
        keys ^= cut[:, :, i]
        keys *= np.uint64(0xD6E8FEB86659FD93)
        keys ^= keys >> np.uint64(32)
    return keys.view(np.int64)


def find_duplicates(parts: list[str], output: str, settings: MinHashDedup, partitions: int | None = None) -> int:
    """Write which rows of a corpus are near-duplicates of an earlier row.

    The result does not depend on the number of partitions. ``output`` is emptied first; signatures are kept below it
    while the search runs. The similarity written is the share in which the signatures of the dropped and the kept
    document agree; they may be linked through others.

    Args:
        parts: URIs of the corpus parts in order (Parquet, documents.SCHEMA).
        output: folder for the files of dedup.DUPLICATES_SCHEMA, one for each part that has duplicates.
        settings: of the search.
        partitions: blocks to shuffle into; by default one for each 128 MB of band keys.

    Returns:
        How many documents are to be dropped.
    """
    names = part_names(parts)
    storage.delete(output)
    if not settings.enabled:
        return 0
    folder = storage.join(output, "_signatures")
    signed = [storage.join(folder, name) for name in names]
    bands, rows = settings.bands_and_rows()
    schema = pa.schema([("signature", pa.binary(4 * bands * rows))])

    def sign(index: int, part: str) -> Iterator[pa.Table]:
        row = 0
        with storage.parquet_writer(signed[index], schema, compression="none") as out:
            for batch in read_part(part, _ROWS, ["text"]):
                shingles = [shingle_hashes(text or "", settings.shingle) for text in batch["text"].to_pylist()]
                found = signatures(shingles, bands * rows, settings.seed)
                out.write_table(pa.table([_as_binary(found)], schema))
                some = np.flatnonzero([len(s) for s in shingles])
                keys = band_keys(found[some], bands, rows)
                yield pa.table({"key": keys.ravel(), "node": np.repeat(nodes(index, row + some), bands)})
                row += len(batch)

    keys = for_parts(parts, sign)
    if not keys.count():
        storage.delete(folder)
        return 0
    partitions = partitions_for(keys, partitions)
    log.debug("near-duplicates: %d bands of %d rows, %d partitions", bands, rows, partitions)
    edges = compact(map_blocks(shuffle(keys, "key", partitions), _link))
    if settings.min_similarity > 0:
        edges = _with_similarity(edges, "a", "b", signed, partitions)
        edges = compact(map_blocks(edges, functools.partial(_at_least, settings.min_similarity)))
    labels = connected_components(edges, partitions)
    labels = _with_similarity(labels, "node", "root", signed, partitions)
    dropped = write_duplicates(labels, parts, output, partitions)
    storage.delete(folder)
    return dropped


def _link(table: pa.Table) -> pa.Table:
    """Edges from the first node of every band key to the others that have it, each once."""
    key, node = column(table, "key"), column(table, "node")
    order = np.lexsort((node, key))
    key, node = key[order], node[order]
    opens = np.ones(len(node), bool)
    opens[1:] = key[1:] != key[:-1]
    first = node[opens][np.cumsum(opens) - 1]
    # A document may hold a key once only, so that every later row of a key is another document.
    pairs = np.unique(np.stack((first[~opens], node[~opens]), axis=1), axis=0)
    return pa.table({"a": pairs[:, 0].astype(np.int64), "b": pairs[:, 1].astype(np.int64)})


def _as_binary(signature: np.ndarray) -> pa.Array:
    """Signatures, (documents, values) uint32, as fixed-size binary values."""
    size = 4 * signature.shape[1]
    return pa.Array.from_buffers(pa.binary(size), len(signature), [None, pa.py_buffer(np.ascontiguousarray(signature))])


def _as_signatures(values: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """The way back: (documents, values), uint32."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    count = values.type.byte_width // 4
    flat = np.frombuffer(values.buffers()[1], np.uint32)
    return flat[values.offset * count : (values.offset + len(values)) * count].reshape(len(values), count)


def _with_similarity(pairs: Dataset, a: str, b: str, signed: list[str], partitions: int) -> Dataset:
    """Pairs of nodes with the share in which their signatures agree, as a column ``similarity``."""

    def fetch(part: str, table: pa.Table, rows: np.ndarray) -> pa.Table:
        return table.append_column("signature", read_rows(part, "signature", rows))

    def compare(part: str, table: pa.Table, rows: np.ndarray) -> pa.Table:
        mine = _as_signatures(read_rows(part, "signature", rows))
        similarity = (mine == _as_signatures(table["signature"])).mean(axis=1)
        return table.drop_columns("signature").append_column("similarity", pa.array(similarity))

    return attach(attach(pairs, a, signed, partitions, fetch), b, signed, partitions, compare)


def _at_least(threshold: float, table: pa.Table) -> pa.Table:
    return table.filter(pa.array(column(table, "similarity") >= threshold)).select(["a", "b"])
