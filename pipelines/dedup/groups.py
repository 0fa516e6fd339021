"""Rows that have a value in common, brought together partition by partition.

A value shared by more rows than a partition should hold is *heavy*. Such values are found by counting and are few (of n
rows fewer than n / limit values are), so that they can be told to every block, whose rows then need not move at all.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipelines.dedup import collect, column, compact, map_blocks, partitions_for, shuffle, union

if TYPE_CHECKING:
    from ray.data import Dataset

LIMIT = 1 << 22
"""Rows with one value that a partition may hold: 64 MB of pairs."""


def heavy(data: Dataset, name: str, limit: int = LIMIT) -> tuple[np.ndarray, np.ndarray]:
    """Values that more rows than ``limit`` have, however the blocks are cut, and how many have them.

    Args:
        data: materialized.
        name: of a column of whole numbers.
        limit: rows.

    Returns:
        Values, ascending, and counts.
    """
    none = np.empty(0, np.int64)
    if data.count() <= limit:
        return none, none
    # What is rarer than this in every block adds up to less than half the limit, so that the other half was seen.
    least = max(1, limit // (2 * data.num_blocks()))
    likely, _ = _total(compact(map_blocks(data, partial(_frequent, name, least))), limit // 2)
    if not len(likely):
        return none, none
    return _total(compact(map_blocks(data, partial(_count_of, name, likely))), limit)


def _frequent(name: str, least: int, table: pa.Table) -> pa.Table:
    values, counts = np.unique(column(table, name), return_counts=True)
    often = counts >= least
    return pa.table({"value": values[often], "count": counts[often]})


def _count_of(name: str, wanted: np.ndarray, table: pa.Table) -> pa.Table:
    return _frequent(name, 1, _among(name, wanted, True, table))


def _total(counted: Dataset, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Values, ascending, whose counts add up to more than ``limit``, and these sums."""
    if counted.count():
        summed = compact(map_blocks(shuffle(counted, "value", partitions_for(counted, None)), partial(_sum, limit)))
        if summed.count():
            found = collect(summed).sort_by("value")
            return column(found, "value"), column(found, "count")
    return np.empty(0, np.int64), np.empty(0, np.int64)


def _sum(limit: int, table: pa.Table) -> pa.Table:
    values, which = np.unique(column(table, "value"), return_inverse=True)
    counts = np.bincount(which, column(table, "count")).astype(np.int64)
    return pa.table({"value": values[counts > limit], "count": counts[counts > limit]})


def ordered(table: pa.Table, names: list[str], groups: int) -> tuple[pa.Table, np.ndarray]:
    """A table sorted by columns, and which rows are the first with their values in the first ``groups`` of these."""
    table = table.take(np.lexsort([column(table, name) for name in reversed(names)]))
    opens = np.zeros(table.num_rows, bool)
    opens[:1] = True
    for name in names[:groups]:
        values = column(table, name)
        opens[1:] |= values[1:] != values[:-1]
    return table, opens


def first_of_groups(data: Dataset, keys: list[str], order: list[str], partitions: int | None = None) -> Dataset:
    """The first row, by ``order``, of every group of rows that have the same ``keys``.

    Each block first reduces its own rows, so that a group of any size weighs at most one row a block.
    """
    reduce = partial(_firsts, keys, order)
    firsts = compact(map_blocks(data, reduce))
    if not firsts.count():
        return firsts
    return compact(map_blocks(shuffle(firsts, keys[0], partitions_for(firsts, partitions)), reduce))


def _firsts(keys: list[str], order: list[str], table: pa.Table) -> pa.Table:
    table, opens = ordered(table, [*keys, *order], len(keys))
    return table.filter(pa.array(opens))


def stars(
    data: Dataset,
    keys: list[str],
    order: list[str],
    partitions: int | None,
    *,
    new: int = 0,
    chain: bool = False,
    limit: int = LIMIT,
) -> Dataset:
    """Edges that connect the rows of every group with the same ``keys``: from the first of them to each other one.

    Args:
        data: materialized; columns of keys, order and ``node``; a node occurs in a group once.
        keys: columns of whole numbers.
        order: columns that decide which row is the first; the node is always the last of them.
        partitions: blocks to shuffle into.
        new: smallest node that counts; edges between two smaller ones are left out.
        chain: also join each row to the next in order (in groups that are not heavy).
        limit: rows of a group that a partition may hold.

    Returns:
        Columns a (the first) and b (the other), int64; an edge may occur more than once.
    """
    order = [*order, "node"]
    central = None
    values, _ = heavy(data, keys[0], limit)
    if len(values):
        rows = compact(map_blocks(data, partial(_among, keys[0], values, True)))
        centres = collect(first_of_groups(rows, keys, order)).select([*keys, "node"])
        central = compact(map_blocks(rows, partial(_to_centre, centres, keys, new)))
        data = compact(map_blocks(data, partial(_among, keys[0], values, False)))
    edges = compact(
        map_blocks(shuffle(data, keys[0], partitions_for(data, partitions)), partial(_link, keys, order, new, chain))
    )
    return edges if central is None else union(edges, central)


def _among(name: str, values: np.ndarray, inside: bool, table: pa.Table) -> pa.Table:
    return table.filter(pa.array(np.isin(column(table, name), values) == inside))


def _to_centre(centres: pa.Table, keys: list[str], new: int, table: pa.Table) -> pa.Table:
    centres = centres.rename_columns([*keys, "a"])
    pairs = table.select([*keys, "node"]).join(centres, keys, join_type="inner").combine_chunks()
    return _edges(column(pairs, "a"), column(pairs, "node"), new)


def _link(keys: list[str], order: list[str], new: int, chain: bool, table: pa.Table) -> pa.Table:
    table, opens = ordered(table, [*keys, *order], len(keys))
    node = column(table, "node")
    first = node[opens][np.cumsum(opens) - 1]
    if not chain:
        return _edges(first[~opens], node[~opens], new)
    onward = ~opens[1:] & ~opens[:-1]  # the second of a group has its edge from the first already
    return _edges(
        np.concatenate((first[~opens], node[:-1][onward])), np.concatenate((node[~opens], node[1:][onward])), new
    )


def _edges(a: np.ndarray, b: np.ndarray, new: int) -> pa.Table:
    some = (a != b) & (np.maximum(a, b) >= new)
    pairs = np.stack((a[some], b[some]), axis=1)
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    again = np.zeros(len(pairs), bool)
    again[1:] = (pairs[1:] == pairs[:-1]).all(axis=1)
    return pa.table({"a": pairs[~again, 0].copy(), "b": pairs[~again, 1].copy()})
