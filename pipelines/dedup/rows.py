"""Work that needs a document's own file: rows are brought to it, so that every file is read once and in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipelines import storage
from pipelines.dedup import (
    DUPLICATES_SCHEMA,
    PARTITION_BYTES,
    column,
    compact,
    map_blocks,
    mix,
    part_names,
    partitions_for,
    published,
    shuffle,
    total,
)
from pipelines.dedup.groups import heavy

if TYPE_CHECKING:
    from ray.data import Dataset

_ROWS = 1024  # of a file that are held at a time

Visit = Callable[[int, pa.Table, np.ndarray], "pa.Table | Iterator[pa.Table]"]
"""``(file index, rows of the data for this file in the order of their row in it, those row numbers)`` to new rows."""


def attach(
    data: Dataset, node: str, files: int, partitions: int | None, visit: Visit, spread: str | None = None
) -> Dataset:
    """Bring rows to the file that holds their document ``node``, so that each file is read once.

    Args:
        data: materialized, with a column ``node`` of nodes.
        node: name of that column.
        files: how many there are.
        partitions: blocks to shuffle into; by default one for each 128 MB, but enough to use the cluster.
        visit: gives the rows that take the place of a file's.
        spread: a column by whose hash rows of one file may be spread over several partitions where they do not fit
            into one (the file is then read once for each); None when they have to stay together.
    """
    if not data.count():
        return data
    import ray

    data = compact(map_blocks(data, partial(_with_file, node)))
    if partitions is None:
        partitions = max(partitions_for(data, None), 2 * int(ray.cluster_resources().get("CPU", 1)))
        partitions = min(partitions, max(files, partitions_for(data, None)))
    if spread is not None:
        rows = max(1, PARTITION_BYTES * data.count() // max(1, data.size_bytes()))
        full, counts = heavy(data, "_file", rows)
        if len(full):
            data = compact(map_blocks(data, partial(_slice, full, -(-counts // rows), spread)))
    return compact(map_blocks(shuffle(data, "_file", partitions), partial(_visit_files, node, visit)))


def _with_file(node: str, table: pa.Table) -> pa.Table:
    return table.append_column("_file", pa.array(column(table, node) >> 32))


def _slice(full: np.ndarray, slices: np.ndarray, spread: str, table: pa.Table) -> pa.Table:
    """Number the slices of the files that need several in the upper bits of the column that is shuffled by."""
    file = column(table, "_file")
    at = np.minimum(np.searchsorted(full, file), len(full) - 1)
    of = np.where(full[at] == file, slices[at], 1).astype(np.uint64)
    place = (mix(column(table, spread)) % of).astype(np.int64)
    return table.set_column(table.schema.get_field_index("_file"), "_file", pa.array(file | place << 32))


def _visit_files(node: str, visit: Visit, table: pa.Table) -> Iterator[pa.Table]:
    at = column(table, node)
    order = np.argsort(at, kind="stable")
    table, at = table.drop_columns("_file").take(order), at[order]
    found = np.unique(at >> 32, return_index=True, return_counts=True)
    for file, start, count in np.stack(found, axis=1).tolist():
        new = visit(file, table.slice(start, count), at[start : start + count] & 0xFFFFFFFF)
        yield from [new] if isinstance(new, pa.Table) else new


def begin(parts: list[str], output: str) -> list[str]:
    """Delete an earlier result, but not the fingerprints that an unfinished search made; the files of these."""
    names = part_names(parts)
    folder = storage.join(output, published.FOLDER)
    if storage.exists(output):
        for file in _all_files(output):
            if not file.startswith(storage.absolute(folder) + "/"):
                storage.delete(file)
    return [storage.join(folder, name) for name in names]


def _all_files(folder: str) -> list[str]:
    try:
        return [file.uri for file in storage.list_files(folder, hidden=True)]
    except FileNotFoundError:  # an empty folder
        return []


def name_roots(labels: Dataset, files: list[str], partitions: int | None) -> Dataset:
    """Labels with the id of the root, as ``write_duplicates`` takes them.

    Args:
        labels: columns node and root, int64, and optionally fingerprint, the signature of the node; the share in which
            it agrees with that of the root is the similarity, which is 1 otherwise.
        files: with ids and fingerprints, by number.
        partitions: blocks to shuffle into.
    """

    def visit(file: int, table: pa.Table, rows: np.ndarray) -> Iterator[pa.Table]:
        signed = "fingerprint" in table.column_names
        names = ["id", "fingerprint"] if signed else ["id"]
        for start, stop, which, found in iterate_rows(files[file], names, rows):
            some = table.slice(start, stop - start)
            similarity = np.ones(stop - start)
            if signed:
                mine = published.from_binary(found["fingerprint"], "<u4")[which]
                similarity = (mine == published.from_binary(some["fingerprint"], "<u4")).mean(axis=1)
            yield pa.table({"node": some["node"], "duplicate_of": found["id"].take(which), "similarity": similarity})

    return attach(labels, "root", len(files), partitions, visit, spread="node")


def write_duplicates(labels: Dataset, files: list[str], parts: list[str], output: str, partitions: int | None) -> int:
    """Write a file for each part that has duplicates.

    Args:
        labels: columns node (int64), duplicate_of (string) and similarity (float64), one row for each document to drop.
        files: how documents are numbered; the last of them stand for the parts.
        parts: URIs of the corpus parts.
        output: folder of the files, which get the names of the parts.
        partitions: blocks to shuffle into.

    Returns:
        How many documents are to be dropped.
    """
    before = len(files) - len(parts)

    def write(file: int, table: pa.Table, rows: np.ndarray) -> pa.Table:
        found = pa.table([rows, table["duplicate_of"], table["similarity"]], DUPLICATES_SCHEMA)
        uri = storage.join(output, storage.file_name(parts[file - before]))
        with storage.parquet_writer(uri, DUPLICATES_SCHEMA) as out:
            out.write_table(found)
        return pa.table({"written": pa.array([len(rows)], pa.int64())})

    written = attach(labels, "node", len(files), partitions, write)
    return total(written, "written") if written.count() else 0


def read_rows(uri: str, names: list[str], rows: np.ndarray) -> pa.Table:
    """Some columns of a Parquet file at some rows, in the order of ``rows``; row groups without any are not read."""
    order = np.argsort(rows, kind="stable")
    place = np.empty(len(rows), np.int64)
    place[order] = np.arange(len(rows))
    return pa.concat_tables([found.take(which) for _, _, which, found in iterate_rows(uri, names, rows[order])]).take(
        place
    )


def iterate_rows(
    uri: str, names: list[str], rows: np.ndarray, at_most: int = 8192
) -> Iterator[tuple[int, int, np.ndarray, pa.Table]]:
    """Some columns of a Parquet file at some rows, without holding more of it than a few row groups.

    Args:
        uri: of the file.
        names: of the columns.
        rows: ascending, int64; a row may be wanted several times.
        at_most: entries of ``rows`` that are answered at a time.

    Yields:
        ``start, stop, which, table``: the rows of the table, taken at ``which``, are those at ``rows[start:stop]``.
    """
    with storage.open_parquet(uri) as file:
        begins = 0
        for group in range(file.num_row_groups):
            ends = begins + file.metadata.row_group(group).num_rows
            low, high = np.searchsorted(rows, (begins, ends))
            if high > low:
                yield from _iterate_group(file, group, begins, names, rows, at_most)
            begins = ends


def _iterate_group(
    file: Any, group: int, begins: int, names: list[str], rows: np.ndarray, at_most: int
) -> Iterator[tuple[int, int, np.ndarray, pa.Table]]:
    for batch in file.iter_batches(columns=names, row_groups=[group], batch_size=_ROWS):
        low, high = np.searchsorted(rows, (begins, begins + len(batch))).tolist()
        for start in range(low, high, at_most):
            stop = min(start + at_most, high)
            wanted, which = np.unique(rows[start:stop], return_inverse=True)
            yield start, stop, which, pa.Table.from_batches([batch]).take(wanted - begins)
        begins += len(batch)
