"""Deduplication: which rows of a corpus repeat another, found without ever collecting the corpus in one place.

Documents are named by *nodes*, ``part index << 32 | row``, so that eight bytes stand for a document and the order of
nodes is the order of the corpus. The smallest node of each set of duplicates stays. Both kinds, exact and near, write
for each part with duplicates one Parquet file of DUPLICATES_SCHEMA.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipelines import storage

if TYPE_CHECKING:
    from ray.data import Dataset

log = logging.getLogger("ingot")

DUPLICATES_SCHEMA = pa.schema([("row", pa.int64()), ("duplicate_of", pa.string()), ("similarity", pa.float64())])
"""Row within the part, id of the document that is kept in its place, and how similar the two are (0 to 1)."""

_PARTITION_BYTES = 128 << 20


def nodes(part: int, rows: np.ndarray) -> np.ndarray:
    """Nodes of rows of a part, int64."""
    return (part << 32) + np.asarray(rows, np.int64)


def part_names(parts: list[str]) -> list[str]:
    """File names of the parts.

    Raises:
        ValueError: two parts have the same name, so that their duplicates would be written to one file.
    """
    names = [storage.file_name(part) for part in parts]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two parts are called {twice}; parts of one corpus need different file names")
    return names


def for_parts(parts: list[str], work: Callable[[int, str], Iterator[pa.Table]]) -> Dataset:
    """What ``work(part index, part)`` yields, one task a part."""
    import ray

    def run(batch: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        for index, part in zip(batch["index"].tolist(), batch["part"].tolist(), strict=True):
            yield from work(index, part)

    items = [{"index": index, "part": part} for index, part in enumerate(parts)]
    return compact(ray.data.from_items(items, override_num_blocks=max(1, len(items))).map_batches(run, batch_size=1))


def map_blocks(data: Dataset, function: Callable[[pa.Table], pa.Table]) -> Dataset:
    """``function`` of every block that has rows; after ``shuffle`` a block is a whole partition."""
    return data.map_batches(function, batch_size=None, batch_format="pyarrow", zero_copy_batch=True)


def shuffle(data: Dataset, column: str, partitions: int) -> Dataset:
    """Rows with the same value in ``column`` brought together in one of ``partitions`` blocks."""
    # One block needs no hashing, and the shuffle's own worker processes take seconds to start.
    return data.repartition(1) if partitions == 1 else data.repartition(partitions, keys=[column])


def compact(data: Dataset) -> Dataset:
    """Run a data set and keep its blocks that have rows.

    Ray Data passes empty blocks on without calling the function that was to give them their columns, and a later
    shuffle fails on the difference.
    """
    import ray

    data = data.materialize()
    blocks = [
        (block, metadata.num_rows)
        for bundle in data.iter_internal_ref_bundles()
        for block, metadata in zip(bundle.block_refs, bundle.metadata, strict=True)
    ]
    if all(rows for _, rows in blocks):
        return data
    filled = [block for block, rows in blocks if rows]
    return ray.data.from_arrow_refs(filled) if filled else ray.data.from_arrow(pa.table({}))


def total(data: Dataset, name: str) -> int:
    """Sum of a column of whole numbers; one number a block comes to the driver."""
    sums = map_blocks(data, lambda table: pa.table({"sum": pa.array([column(table, name).sum()], pa.int64())}))
    return sum(row["sum"] for row in sums.iter_rows())


def partitions_for(data: Dataset, wanted: int | None) -> int:
    """How many partitions to shuffle a materialized data set into: as wanted, else one for each 128 MB."""
    return wanted or max(1, -(-data.size_bytes() // _PARTITION_BYTES))


def column(table: pa.Table, name: str) -> np.ndarray:
    """A column without nulls as an array."""
    return table[name].to_numpy()


def attach(
    data: Dataset,
    node: str,
    parts: list[str],
    partitions: int,
    look_up: Callable[[str, pa.Table, np.ndarray], pa.Table],
) -> Dataset:
    """Bring rows to the part that holds their document ``node``, reading every part once.

    Args:
        data: with a column ``node`` of nodes.
        node: name of that column.
        parts: URIs of the parts.
        partitions: blocks to shuffle into.
        look_up: ``(part, rows of data for this part, their row numbers in it)`` to the table that takes their place.
    """
    where = f"part_of_{node}"

    def with_part(table: pa.Table) -> pa.Table:
        return table.append_column(where, pa.array(column(table, node) >> 32))

    def visit(table: pa.Table) -> pa.Table:
        part = column(table, where)
        table = table.drop_columns(where)
        found = [
            look_up(parts[p], table.filter(pa.array(part == p)), column(table, node)[part == p] & 0xFFFFFFFF)
            for p in np.unique(part).tolist()
        ]
        return pa.concat_tables(found)

    if not data.count():
        return data
    partitions = min(partitions, len(parts))
    return compact(map_blocks(shuffle(map_blocks(data, with_part), where, partitions), visit))


def write_duplicates(labels: Dataset, parts: list[str], output: str, partitions: int) -> int:
    """Write a file for each part that has duplicates.

    Args:
        labels: columns node, root (int64) and similarity (float64); one row for each document to drop.
        parts: URIs of the corpus parts.
        output: folder of the files, which get the names of the parts.
        partitions: blocks to shuffle into.

    Returns:
        How many documents are to be dropped.
    """

    def with_id(part: str, table: pa.Table, rows: np.ndarray) -> pa.Table:
        return table.append_column("duplicate_of", read_rows(part, "id", rows).cast(pa.string()))

    def write(part: str, table: pa.Table, rows: np.ndarray) -> pa.Table:
        columns = {"row": rows, "duplicate_of": table["duplicate_of"], "similarity": table["similarity"]}
        found = pa.table(columns, DUPLICATES_SCHEMA).take(np.argsort(rows))
        with storage.parquet_writer(storage.join(output, storage.file_name(part)), DUPLICATES_SCHEMA) as out:
            out.write_table(found)
        return pa.table({"written": pa.array([len(rows)], pa.int64())})

    named = attach(labels, "root", parts, partitions, with_id)
    return total(attach(named, "node", parts, partitions, write), "written") if named.count() else 0


def read_rows(uri: str, name: str, rows: np.ndarray) -> pa.Array:
    """Values of one column of a Parquet file at some rows, in the order of ``rows``; reads that column once."""
    wanted = np.unique(rows)
    chunks, start = [], 0
    for batch in storage.open_parquet(uri).iter_batches(columns=[name], batch_size=8192):
        low, high = np.searchsorted(wanted, (start, start + len(batch)))
        if high > low:
            chunks.append(batch.column(0).take(pa.array(wanted[low:high] - start)))
        start += len(batch)
    values = pa.chunked_array(chunks).combine_chunks()
    return values.take(pa.array(np.searchsorted(wanted, rows)))
