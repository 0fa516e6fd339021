"""Exact duplicates: documents whose text has the same 128-bit hash (xxh3)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa
import xxhash

from pipelines import storage
from pipelines.dedup import clusters, compact, for_parts, groups, keep, log, map_blocks, nodes, published
from pipelines.dedup.rows import begin, name_roots, write_duplicates


@dataclass
class ExactDedup:
    """Drops documents whose text another document has, and keeps one."""

    enabled: bool = True
    """Whether exact duplicates are dropped."""
    ignore_case_and_space: bool = False
    """Whether texts that differ only in case and white space count as the same."""
    keep: str = "first"
    """Which one stays: `first` in the corpus, `longest`, `newest` (by `date` in its metadata), or `best_score`."""
    score_field: str | None = None
    """Field of the metadata that holds the score of `best_score`; the highest stays, documents without one last."""
    against: list[str] = field(default_factory=list)
    """Corpora curated before, or folders of their published hashes: documents that are in one of them are dropped."""

    def validate(self) -> None:
        """Raises ValueError for values outside their range."""
        keep.validate(self.keep, self.score_field)

    def scheme(self) -> published.Scheme:
        """How hashes are made."""
        return published.Scheme("exact", {"hash": "xxh3-128", "ignore_case_and_space": self.ignore_case_and_space}, 16)


def find_duplicates(
    parts: list[str],
    output: str,
    settings: ExactDedup,
    partitions: int | None = None,
    publish: str | None = None,
    limit: int = groups.LIMIT,
) -> int:
    """Write which rows of a corpus are exact duplicates of another row that stays.

    The result does not depend on the number of partitions. An earlier result in ``output`` is deleted; hashes are kept
    below it while the search runs, and those that a search which was killed made of the same parts are used again.

    Args:
        parts: URIs of the corpus parts in order (Parquet, documents.SCHEMA).
        output: folder for the files of dedup.DUPLICATES_SCHEMA, one for each part that has duplicates.
        settings: what counts as the same.
        partitions: blocks to shuffle into; by default one for each 128 MB of hashes.
        publish: folder for the hashes of the documents that stay, as a set for ``against``.
        limit: documents of the same text that a partition may hold.

    Returns:
        How many documents are to be dropped.

    Raises:
        ValueError: a published set was made in another way, or two parts have the same name.
    """
    settings.validate()
    made = begin(parts, output)
    if not settings.enabled:
        return 0
    scheme = settings.scheme()
    earlier = published.set_files(settings.against, scheme)
    files = earlier + made
    before, policy = len(earlier), (settings.keep, settings.score_field)

    def hash_file(index: int, uri: str) -> Iterator[pa.Table]:
        if index < before:
            found = published.read_published(uri)
        else:
            make = partial(_digests, ignore=settings.ignore_case_and_space)
            found = published.fingerprints(parts[index - before], uri, scheme, policy, make)
        row = 0
        for ranks, digests in found:
            high, low = published.from_binary(digests, "<i8").T
            node = nodes(index, np.arange(row, row + len(ranks)))
            yield pa.table({"high": high.copy(), "low": low.copy(), "rank": ranks, "node": node})
            row += len(ranks)

    hashes = for_parts(files, hash_file)
    new = int(nodes(before, 0))
    labels = groups.stars(hashes, ["high", "low"], ["rank"], partitions, new=new, limit=limit)
    labels = compact(map_blocks(labels, lambda table: table.rename_columns(["root", "node"])))
    named = name_roots(labels, files, partitions)
    dropped = write_duplicates(named, files, parts, output, partitions)
    if publish is not None:
        published.publish(publish, scheme, made, output, dropped=False, against=settings.against)
    clusters.write_report(clusters.report(labels, files, parts, partitions), publish or output)
    log.debug("exact: %d duplicates in %d parts", dropped, len(parts))
    storage.delete(storage.join(output, published.FOLDER))
    return dropped


def text_digest(text: str | bytes | memoryview, ignore_case_and_space: bool = False) -> bytes:
    """16 bytes that are equal for texts (UTF-8 where bytes are given) that count as the same."""
    if ignore_case_and_space:
        text = text if isinstance(text, str) else str(text, "utf-8", "surrogatepass")
        text = " ".join(text.casefold().split())
    return xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)


def _digests(table: pa.Table, *, ignore: bool) -> np.ndarray:
    from pipelines.words.columns import buffers

    data, offsets = buffers(table["text"])
    data, ends = memoryview(data), offsets.tolist()
    made = b"".join(text_digest(data[a:b], ignore) for a, b in itertools.pairwise(ends))
    return np.frombuffer(made, np.uint8).reshape(-1, 16)
