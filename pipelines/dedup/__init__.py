"""Deduplication: which rows of a corpus repeat another, found without ever collecting the corpus in one place.

Documents are named by *nodes*, ``file index << 32 | row``, so that eight bytes stand for a document and the order of
nodes is the order of the corpus; documents of corpora that were published before come first. Exact and near search
write for each part with duplicates one Parquet file of DUPLICATES_SCHEMA.

Memory is bounded by the partition, not by the corpus or by what its documents have in common: a value that very many
rows share (a text that half the web repeats) is found by counting first and is not brought together in one place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipelines import storage
from pipelines.documents import InputError

if TYPE_CHECKING:
    from ray.data import Dataset

log = logging.getLogger("ingot")

DUPLICATES_SCHEMA = pa.schema([("row", pa.int64()), ("duplicate_of", pa.string()), ("similarity", pa.float64())])
"""Row within the part, id of the document that is kept in its place, and how similar the two are (0 to 1)."""

PARTITION_BYTES = 128 << 20
"""About what a partition holds."""

PIECES = 1 << 14
"""Pieces up to which a shuffle is a task for each block and one for each partition, beyond Ray Data's hash shuffle."""


def nodes(file: int, rows: np.ndarray) -> np.ndarray:
    """Nodes of rows of a file, int64."""
    return (file << 32) + np.asarray(rows, np.int64)


def part_names(parts: list[str]) -> list[str]:
    """File names of the parts.

    Raises:
        InputError: two parts have the same name, so that their duplicates would be written to one file.
    """
    names = [storage.file_name(part) for part in parts]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"two parts are called {twice}; parts of one corpus need different file names")
    return names


def for_parts(parts: list[str], work: Callable[[int, str], Iterator[pa.Table]]) -> Dataset:
    """What ``work(part index, part)`` yields, one task a part, in blocks of about the size of a partition."""
    import ray

    def run(index: int, part: str) -> Iterator[pa.Table]:
        held: list[pa.Table] = []
        size = 0
        for table in work(index, part):
            held.append(table)
            size += table.nbytes
            if size >= PARTITION_BYTES:
                yield pa.concat_tables(held)
                held, size = [], 0
        if size:
            yield pa.concat_tables(held)

    remote = ray.remote(run).options(num_returns="streaming", max_retries=-1)
    running = [remote.remote(index, part) for index, part in enumerate(parts)]
    return _from_blocks([block for blocks in running for block in blocks])


def map_blocks(data: Dataset, function: Callable[[pa.Table], pa.Table | Iterator[pa.Table]]) -> Dataset:
    """``function`` of every block that has rows; after ``shuffle`` a block is a whole partition."""
    return data.map_batches(function, batch_size=None, batch_format="pyarrow", zero_copy_batch=True)


def shuffle(data: Dataset, name: str, partitions: int) -> Dataset:
    """Rows with the same value in a column of whole numbers brought together in one of ``partitions`` blocks.

    Args:
        data: materialized, as ``compact`` returns it.
        name: of the column.
        partitions: blocks; those that stay empty are left out, except by Ray Data's hash shuffle.
    """
    if partitions == 1:
        return data.repartition(1)
    groups = _grouped_blocks(data)
    if len(groups) * partitions > PIECES:
        return data.repartition(partitions, keys=[name])
    # Far fewer seconds than the hash shuffle, whose worker processes have to start; it is made for more pieces.
    import ray

    cut = ray.remote(_cut).options(num_returns=partitions + 1)
    counts, *pieces = zip(*(cut.remote(name, partitions, *group) for group in groups), strict=True)
    filled = np.stack(ray.get(list(counts))).T > 0
    parts = [
        [piece for piece, some in zip(part, rows, strict=True) if some]
        for part, rows in zip(pieces, filled, strict=True)
    ]
    join = ray.remote(lambda *tables: pa.concat_tables(tables))
    return _from_blocks([part[0] if len(part) == 1 else join.remote(*part) for part in parts if part])


def _cut(name: str, partitions: int, *blocks: pa.Table) -> list[Any]:
    """Rows of each partition in order, and the table of each."""
    table = pa.concat_tables(blocks)
    where = mix(column(table, name)) % np.uint64(partitions)
    table = table.take(np.argsort(where, kind="stable"))
    counts = np.bincount(where.astype(np.int64), minlength=partitions)
    starts = np.cumsum(counts) - counts
    return [counts, *(table.slice(i, n) for i, n in zip(starts.tolist(), counts.tolist(), strict=True))]


def _grouped_blocks(data: Dataset) -> list[list[Any]]:
    """Blocks in groups of about the size of a partition."""
    groups: list[list[Any]] = []
    size = PARTITION_BYTES
    for bundle in data.iter_internal_ref_bundles():
        for ref, metadata in zip(bundle.block_refs, bundle.metadata, strict=True):
            if size + metadata.size_bytes > PARTITION_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(ref)
            size += metadata.size_bytes
    return groups


def mix(x: np.ndarray) -> np.ndarray:
    """Whole numbers scattered over 64 bits, uint64."""
    x = x.astype(np.uint64)
    x ^= x >> np.uint64(32)
    x *= np.uint64(0xD6E8FEB86659FD93)
    x ^= x >> np.uint64(32)
    return x


def _blocks(data: Dataset) -> list:
    return [ref for bundle in data.iter_internal_ref_bundles() for ref in bundle.block_refs]


def _from_blocks(blocks: list) -> Dataset:
    import ray

    # The stages tell their progress themselves; every data set here begins with blocks.
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray.data.from_arrow_refs(blocks) if blocks else ray.data.from_arrow(pa.table({}))


def compact(data: Dataset) -> Dataset:
    """Run a data set and keep its blocks that have rows.

    Ray Data passes empty blocks on without calling the function that was to give them their columns, and a later
    shuffle fails on the difference.
    """
    data = data.materialize()
    blocks = [
        (block, metadata.num_rows)
        for bundle in data.iter_internal_ref_bundles()
        for block, metadata in zip(bundle.block_refs, bundle.metadata, strict=True)
    ]
    if all(rows for _, rows in blocks):
        return data
    return _from_blocks([block for block, rows in blocks if rows])


def union(*data: Dataset) -> Dataset:
    """All rows of materialized data sets with the same columns; those without rows are left out."""
    filled = [one for one in data if one.count()]
    return _from_blocks([block for one in filled for block in _blocks(one)])


def total(data: Dataset, name: str) -> int:
    """Sum of a column of whole numbers or of truths; one number a block comes to the driver."""
    sums = map_blocks(data, lambda table: pa.table({"sum": pa.array([column(table, name).sum()], pa.int64())}))
    return sum(row["sum"] for row in sums.iter_rows())


def collect(data: Dataset) -> pa.Table:
    """A data set known to be small as one table."""
    import ray

    return pa.concat_tables([ray.get(block) for block in _blocks(data.materialize())])


def partitions_for(data: Dataset, wanted: int | None) -> int:
    """How many partitions to shuffle a materialized data set into: as wanted, else one for each 128 MB."""
    return wanted or max(1, -(-data.size_bytes() // PARTITION_BYTES))


def column(table: pa.Table, name: str) -> np.ndarray:
    """A column without nulls as an array."""
    return table[name].to_numpy()
