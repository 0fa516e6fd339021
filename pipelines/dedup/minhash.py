"""Near-duplicate removal by MinHash and banded LSH (Broder 1997; Lee et al. 2021, section 4.2).

Documents are shingled into word 5-grams, each signature is cut into bands, documents that agree on any whole band
become an edge to the first of them, and one document of each connected component stays. Two documents of Jaccard
similarity s become an edge with probability ``1 - (1 - s**rows)**bands``.

Signatures are those of ``datasketch.MinHash`` (2.0, scheme affine32) with the same seed and the same 32-bit hash
values of the shingles.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipelines import storage
from pipelines.dedup import (
    clusters,
    column,
    compact,
    for_parts,
    groups,
    keep,
    log,
    map_blocks,
    nodes,
    published,
)
from pipelines.dedup.rows import attach, begin, name_roots, read_rows, write_duplicates

if TYPE_CHECKING:
    from ray.data import Dataset

VERIFY = ("none", "signature", "jaccard")

_EMPTY = np.uint32(0xFFFFFFFF)


@dataclass
class MinHashDedup:
    """Drops documents that are nearly the same as another one, and keeps one."""

    enabled: bool = True
    """Whether near-duplicates are dropped."""
    jaccard: float = 0.75
    """Similarity of two documents' shingles at which bands and rows are aimed; half of such pairs are found or more."""
    permutations: int = 112
    """Most hash functions of a signature; bands times rows of them are used."""
    bands: int | None = None
    """Bands of a signature, given together with rows in place of what follows from jaccard and permutations."""
    rows: int | None = None
    """Values of a band; two documents become a pair when they agree on all values of any band."""
    shingle: int = 5
    """Words of a shingle; words are runs of letters and digits, without regard to case."""
    seed: int = 1
    """Seed of the permutations."""
    verify: str = "none"
    """Whether pairs that share a band are looked at again: `none`, by the share of the `signature` in which they agree,
    or by the true `jaccard` similarity of their shingles, for which the documents are read once more. Pairs with a
    published document, whose text is not at hand, are compared by signature in both cases."""
    min_similarity: float | None = None
    """Pairs that verify finds less similar are not linked; by default the value of jaccard."""
    keep: str = "first"
    """Which one stays: `first` in the corpus, `longest`, `newest` (by `date` in its metadata), or `best_score`."""
    score_field: str | None = None
    """Field of the metadata that holds the score of `best_score`; the highest stays, documents without one last."""
    against: list[str] = field(default_factory=list)
    """Corpora curated before, or folders of their published signatures: documents like one of theirs are dropped."""

    def validate(self) -> None:
        """Raises ValueError for values outside their range."""
        keep.validate(self.keep, self.score_field)
        if self.verify not in VERIFY:
            raise ValueError(f"verify is {self.verify}, must be one of {', '.join(VERIFY)}")
        ranges = [("jaccard", 0.1, 0.99), ("permutations", 4, 1024), ("shingle", 1, 100)]
        ranges += [("min_similarity", 0.0, 1.0)] if self.min_similarity is not None else []
        if self.bands is not None or self.rows is not None:
            if self.bands is None or self.rows is None:
                raise ValueError(f"bands is {self.bands} and rows is {self.rows}; give both or none")
            ranges += [("bands", 1, 1024), ("rows", 1, 1024)]
        for name, low, high in ranges:
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}, must be between {low} and {high}")
        if self.verify == "none" and self.min_similarity is not None:
            raise ValueError(
                f"min_similarity is {self.min_similarity}, but verify is none; set it to signature or jaccard"
            )
        try:
            self.bands_and_rows()
        except ValueError:
            raise ValueError(
                f"permutations is {self.permutations}, must be more for a jaccard of {self.jaccard}: "
                "they do not make two bands"
            ) from None

    def bands_and_rows(self) -> tuple[int, int]:
        """As given, or those that weigh missed pairs and false ones the same (datasketch's arithmetic)."""
        if self.bands is not None and self.rows is not None:
            return self.bands, self.rows
        return _bands_and_rows(self.jaccard, self.permutations)

    @property
    def threshold(self) -> float:
        """Similarity from which verify links a pair."""
        return self.jaccard if self.min_similarity is None else self.min_similarity

    def scheme(self) -> published.Scheme:
        """How signatures are made; a changed way to hash words changes the value of ``words``."""
        from pipelines.words import shingles

        bands, rows = self.bands_and_rows()
        probe, _ = shingles(pa.array(["Straße 12, don't 日本"], pa.large_string()), 1)
        settings = {
            "values": bands * rows,
            "shingle": self.shingle,
            "seed": self.seed,
            "words": probe.tobytes().hex()[:16],
        }
        return published.Scheme("near", settings, 4 * bands * rows)


@functools.lru_cache
def _bands_and_rows(jaccard: float, permutations: int) -> tuple[int, int]:
    from datasketch import MinHashLSH

    lsh = MinHashLSH(threshold=jaccard, num_perm=permutations)
    return lsh.b, lsh.r


@functools.lru_cache
def _permutations(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    from datasketch import MinHash

    a, b = MinHash(num_perm=count, seed=seed).permutations
    return a, b


def signatures(shingles: np.ndarray, offsets: np.ndarray, permutations: int, seed: int) -> np.ndarray:
    """MinHash signatures, bit for bit those of ``datasketch.MinHash(permutations, seed)`` over the same hash values.

    Args:
        shingles: 32-bit hashes of the shingles of all documents, one document after the other, uint32.
        offsets: range of each document in them, (documents + 1,), int64.
        permutations: hash functions of a signature.
        seed: of the permutations.

    Returns:
        (documents, permutations), uint32; all ones for a document without shingles.
    """
    from pipelines.dedup import kernels

    return kernels.minhash(shingles, offsets, *_permutations(permutations, seed))


def sign(table: pa.Table, shingle: int, permutations: int, seed: int) -> np.ndarray:
    """Signatures of the texts of documents, (documents, permutations), uint32."""
    from pipelines.words import shingles

    return signatures(*shingles(table["text"], shingle), permutations, seed)


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


def find_duplicates(
    parts: list[str],
    output: str,
    settings: MinHashDedup,
    partitions: int | None = None,
    publish: str | None = None,
    limit: int = groups.LIMIT,
) -> int:
    """Write which rows of a corpus are near-duplicates of another row that stays.

    The result does not depend on the number of partitions. An earlier result in ``output`` is deleted; signatures are
    kept below it while the search runs, and those that a search which was killed made of the same parts are used again.
    The similarity written is the share in which the signatures of the dropped and the kept document agree; they may be
    linked through others.

    Args:
        parts: URIs of the corpus parts in order (Parquet, documents.SCHEMA).
        output: folder for the files of dedup.DUPLICATES_SCHEMA, one for each part that has duplicates.
        settings: of the search.
        partitions: blocks to shuffle into; by default one for each 128 MB of band keys.
        publish: folder for the signatures of all documents, as a set for ``against``.
        limit: documents with a band in common, or members of a component, that a partition may hold.

    Returns:
        How many documents are to be dropped.

    Raises:
        ValueError: a published set was made in another way, or two parts have the same name.
    """
    from pipelines.dedup.components import connected_components

    settings.validate()
    made = begin(parts, output)
    if not settings.enabled:
        return 0
    scheme = settings.scheme()
    earlier = published.set_files(settings.against, scheme)
    files, before = earlier + made, len(earlier)
    new = int(nodes(before, 0))
    bands, rows = settings.bands_and_rows()
    log.debug("near-duplicates: %d bands of %d rows", bands, rows)

    verified = settings.verify != "none"
    keys = for_parts(files, functools.partial(_keys_of_file, files, parts, scheme, settings))
    # A pair that has to be verified may fail, so that a group is tied together in an order that its documents alone
    # decide, and more tightly.
    order = ["digest"] if verified else []
    edges = groups.stars(keys, ["key"], order, partitions, new=new, chain=verified, limit=limit)
    if verified:
        from pipelines.dedup.verify import verify

        edges = verify(edges, files, parts, settings, partitions)
    labels = connected_components(edges, partitions, limit)
    if settings.keep != "first":
        labels = clusters.keep_best(labels, files, before, partitions, limit)
    elif before:
        labels = compact(map_blocks(labels, lambda table: table.filter(pa.array(column(table, "node") >= new))))
    named = name_roots(_with_signature(labels, files, partitions), files, partitions)
    dropped = write_duplicates(named, files, parts, output, partitions)
    if publish is not None:
        published.publish(publish, scheme, made, output, dropped=True, against=settings.against)
    clusters.write_report(clusters.report(labels, files, parts, partitions), publish or output)
    storage.delete(storage.join(output, published.FOLDER))
    return dropped


def _keys_of_file(
    files: list[str], parts: list[str], scheme: published.Scheme, settings: MinHashDedup, index: int, uri: str
) -> Iterator[pa.Table]:
    """Band keys of the documents of a part, or of a file of a published set."""
    bands, rows = settings.bands_and_rows()
    before = len(files) - len(parts)
    if index < before:
        found = published.read_published(uri)
    else:
        make = functools.partial(sign, shingle=settings.shingle, permutations=bands * rows, seed=settings.seed)
        policy = (settings.keep, settings.score_field)
        found = published.fingerprints(parts[index - before], uri, scheme, policy, make)
    row = 0
    for ranks, binary in found:
        signed = published.from_binary(binary, "<u4")
        some = np.flatnonzero((signed != _EMPTY).any(axis=1))  # documents without words are nobody's duplicates
        keys = band_keys(signed[some], bands, rows)
        table = pa.table({"key": keys.ravel(), "node": np.repeat(nodes(index, row + some), bands)})
        if settings.verify != "none":
            digests = band_keys(signed[some], 1, bands * rows)[:, 0]
            table = table.append_column("digest", pa.array(np.repeat(digests, bands)))
        yield table
        row += len(ranks)


def _with_signature(labels: Dataset, files: list[str], partitions: int | None) -> Dataset:
    """Labels with the signature of the node, to be compared where that of the root lies."""

    def fetch(file: int, table: pa.Table, rows: np.ndarray) -> pa.Table:
        return table.append_column("fingerprint", read_rows(files[file], ["fingerprint"], rows)["fingerprint"])

    return attach(labels, "node", len(files), partitions, fetch)
