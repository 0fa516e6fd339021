"""How often each pre-token occurs in a sample of a corpus, counted by the whole cluster.

Every part of the corpus is counted by a task of its own, which sorts its words into buckets by their hash; a task for
each bucket then adds up what all parts say. What a task holds is bounded, and what it has finished is not done again.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from pipelines import storage
from pipelines.pretokens import Kind
from pipelines.progress import Progress
from pipelines.stage import Unit, for_each, read_part, text_bytes

log = logging.getLogger("ingot")

SCHEMA = pa.schema([("word", pa.large_binary()), ("count", pa.int64())])
_BUCKET_BYTES = 1 << 29  # of sampled text to a bucket
_ROWS = 1 << 21  # of counts that are gathered before they are added up


class WordCounts(NamedTuple):
    """Counts of the words of a sample.

    Attributes:
        files: Parquet files of distinct words with their counts, as SCHEMA.
        documents: documents in the sample.
        bytes: bytes of their text.
    """

    files: list[str]
    documents: int
    bytes: int

    def read(self) -> pa.Table:
        """All words with their counts."""
        return pa.concat_tables([storage.open_parquet(uri).read() for uri in self.files])


def is_sampled(document: str, share: float) -> bool:
    """Whether the document with this id belongs to the sample: the same wherever it lies."""
    return share >= 1 or xxhash.xxh32_intdigest(f"tokenizer\0{document}".encode()) < share * 2**32


def count_words(folder: str, parts: list[tuple[str, int]], sample_bytes: int, kind: Kind, digits: int) -> WordCounts:
    """Count the words of a sample of the documents in tasks, and say where the counts are.

    Args:
        folder: where the counts go; what is there already is taken as it is.
        parts: URI and bytes of text of each part of the corpus.
        sample_bytes: bytes of text to take, as a share of the documents that their ids choose.
        kind: the pre-tokenizer.
        digits: its most digits in a pre-token.
    """
    total = sum(size for _, size in parts)
    share = min(sample_bytes / max(total, 1), 1.0)
    n_buckets = min(max(-(-min(total, sample_bytes) // _BUCKET_BYTES), 1), 256)
    counts, buckets = storage.join(folder, "counts"), storage.join(folder, "buckets")
    task = functools.partial(_count_part, counts, share, kind, digits, n_buckets)
    units = [Unit(f"part-{i:05d}", {"part": uri}, size=int(share * size)) for i, (uri, size) in enumerate(parts)]
    done = _each_once("tokenizer: words", counts, units, task)
    where: list[list[tuple[str, list[int]]]] = [[] for _ in range(n_buckets)]
    for unit in units:
        groups = np.array(done[unit.name]["buckets"], int)
        for bucket in np.unique(groups):
            where[bucket].append((_file(counts, unit), np.flatnonzero(groups == bucket).tolist()))
    units = [Unit(f"bucket-{i:05d}", {"groups": groups}) for i, groups in enumerate(where)]
    _each_once("tokenizer: counts", buckets, units, functools.partial(_add_up, buckets))
    documents, size = (sum(part[name] for part in done.values()) for name in ("documents", "bytes"))
    return WordCounts([_file(buckets, unit) for unit in units], documents, size)


def add_up(tables: Iterator[pa.Table]) -> pa.Table:
    """One table of distinct words out of tables in which they may come again."""
    gathered: list[pa.Table] = [SCHEMA.empty_table()]
    for table in tables:
        gathered.append(table)
        if sum(t.num_rows for t in gathered[1:]) > max(_ROWS, gathered[0].num_rows):
            gathered = [_distinct(gathered)]
    return _distinct(gathered)


def _distinct(tables: list[pa.Table]) -> pa.Table:
    summed = pa.concat_tables(tables).group_by("word").aggregate([("count", "sum")])
    return summed.select(["word", "count_sum"]).rename_columns(SCHEMA.names)


def _each_once(
    name: str, folder: str, units: list[Unit], task: Callable[[Unit], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Run a task that writes one file for each unit that has no receipt yet; the receipts of all by unit."""
    receipts = {}
    for unit in units:
        uri = _receipt(_file(folder, unit))
        if storage.exists(uri):
            receipts[unit.name] = storage.read_json(uri)
    pending = [unit for unit in units if unit.name not in receipts]
    progress = Progress(name, {unit.name: unit.size for unit in pending}, len(receipts))
    for receipt in for_each(pending, task):
        receipts[receipt["name"]] = receipt
        progress.step(receipt["name"], receipt["documents"], receipt["bytes"], finished=True)
    progress.finish(f"{sum(receipt['words'] for receipt in receipts.values()):,} distinct words")
    return receipts


def _file(folder: str, unit: Unit) -> str:
    return storage.join(folder, f"{unit.name}.parquet")


def _receipt(uri: str) -> str:
    return uri.removesuffix(".parquet") + ".json"


def _count_part(folder: str, share: float, kind: Kind, digits: int, n_buckets: int, unit: Unit) -> dict[str, Any]:
    from pipelines.pretokens import count, word_buckets

    facts: dict[str, Any] = {"name": unit.name, "documents": 0, "bytes": 0, "words": 0, "buckets": []}

    def texts() -> Iterator[pa.ChunkedArray]:
        for table in read_part(unit.arguments["part"], columns=["id", "text"]):
            mine = table.filter(pa.array([is_sampled(i, share) for i in table["id"].to_pylist()], pa.bool_()))
            if mine.num_rows:
                facts["documents"] += mine.num_rows
                facts["bytes"] += text_bytes(mine)
                yield mine["text"]

    with storage.parquet_writer(_file(folder, unit), SCHEMA) as writer:
        for table in count(texts(), kind, digits):
            facts["words"] += table.num_rows
            place = word_buckets(table["word"], n_buckets)
            for bucket in np.unique(place):
                writer.write_table(table.filter(pa.array(place == bucket)), row_group_size=table.num_rows)
                facts["buckets"].append(int(bucket))
    storage.write_json(_receipt(_file(folder, unit)), facts)
    return facts


def _add_up(folder: str, unit: Unit) -> dict[str, Any]:
    def groups() -> Iterator[pa.Table]:
        for uri, numbers in unit.arguments["groups"]:
            file = storage.open_parquet(uri)
            for number in numbers:
                yield file.read_row_group(number)

    table = add_up(groups())
    with storage.parquet_writer(_file(folder, unit), SCHEMA) as writer:
        writer.write_table(table)
    facts = {"name": unit.name, "documents": 0, "bytes": table.nbytes, "words": table.num_rows}
    storage.write_json(_receipt(_file(folder, unit)), facts)
    return facts
