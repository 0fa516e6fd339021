"""Sets of duplicates: which document of each stays, and what they look like."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipelines import storage
from pipelines.dedup import collect, column, compact, log, map_blocks, nodes, partitions_for, shuffle, union
from pipelines.dedup.groups import LIMIT, first_of_groups, stars
from pipelines.dedup.rows import attach, read_rows

if TYPE_CHECKING:
    from ray.data import Dataset

REPORT = "clusters.json"
"""File of the report in the folder of the published set, or of the duplicates."""

_LARGEST = 20
_SMALL = 16 << 20  # bytes of labels that the report is made of at once
_SAMPLES = 5
_CHARACTERS = 300


def keep_best(labels: Dataset, files: list[str], before: int, partitions: int | None, limit: int = LIMIT) -> Dataset:
    """The same components around the member with the smallest rank instead of the smallest node.

    Args:
        labels: columns node and root, int64.
        files: of fingerprints and ranks, by number; the first ``before`` are published sets, whose documents stay.
        before: number of those.
        partitions: blocks to shuffle into.
        limit: members of one component that a partition may hold.
    """
    if not labels.count():
        return labels

    def fetch(file: int, table: pa.Table, rows: np.ndarray) -> pa.Table:
        ranks = np.full(len(rows), -np.inf) if file < before else column(read_rows(files[file], ["rank"], rows), "rank")
        return table.append_column("rank", pa.array(ranks))

    roots = first_of_groups(compact(map_blocks(labels, _roots)), ["root"], [], partitions)
    members = attach(union(labels, roots), "node", len(files), partitions, fetch)
    if not any(row["some"] for row in map_blocks(members, _any_rank).iter_rows()):
        log.warning("keep: no duplicate has the metadata that decides which to keep, so that the first ones stay")
    edges = stars(members, ["root"], ["rank"], partitions, new=int(nodes(before, 0)), limit=limit)
    return compact(map_blocks(edges, lambda table: table.rename_columns(["root", "node"])))


def _roots(table: pa.Table) -> pa.Table:
    roots = np.unique(column(table, "root"))
    return pa.table({"node": roots, "root": roots})


def _any_rank(table: pa.Table) -> pa.Table:
    return pa.table({"some": [bool(np.isfinite(column(table, "rank")).any())]})


def report(labels: Dataset, files: list[str], parts: list[str], partitions: int | None) -> dict[str, Any]:
    """Clusters by size, and the largest ones with samples of their text.

    Args:
        labels: columns node and root, int64.
        files: with the ids of documents, by number.
        parts: URIs of the corpus parts, which the last of the files belong to.
        partitions: blocks to shuffle into.

    Returns:
        ``clusters`` and ``documents`` in them; ``sizes``, the number of clusters of each size; ``largest``, each with
        its size, the id of the document that is ``kept``, and ``members``, some dropped ones with id and text.
    """
    found: dict[str, Any] = {"clusters": 0, "documents": 0, "sizes": {}, "largest": []}
    if not labels.count():
        return found
    small = labels.size_bytes() <= _SMALL
    if small:  # to start tasks would take longer than the work
        all_labels = collect(labels)
        all_sizes = _sum(_count(all_labels))
        every, top = _sizes(all_sizes), _top(all_sizes)
    else:
        counted = compact(map_blocks(labels, _count))
        sizes = compact(map_blocks(shuffle(counted, "root", partitions_for(counted, partitions)), _sum))
        every, top = collect(map_blocks(sizes, _sizes)), _top(collect(map_blocks(sizes, _top)))
    every = every.group_by("size").aggregate([("clusters", "sum")]).sort_by("size")
    for size, clusters in zip(every["size"].to_pylist(), every["clusters_sum"].to_pylist(), strict=True):
        found["clusters"] += clusters
        found["documents"] += clusters * size
        found["sizes"][str(size)] = clusters
    roots = column(top, "root")
    chosen = partial(_sample, np.sort(roots))
    members = chosen(all_labels if small else collect(compact(map_blocks(labels, chosen))))
    before = len(files) - len(parts)
    for root, size in zip(roots.tolist(), column(top, "size").tolist(), strict=True):
        some = column(members, "node")[column(members, "root") == root].tolist()
        kept = _document(root, files, parts, before)
        dropped = [_document(node, files, parts, before) for node in some]
        found["largest"].append({"size": size, "kept": kept["id"], "members": [kept, *dropped][:_SAMPLES]})
    return found


def write_report(found: dict[str, Any], folder: str) -> None:
    """Write a report into a folder."""
    storage.write_json(storage.join(folder, REPORT), found)


def _count(table: pa.Table) -> pa.Table:
    roots, counts = np.unique(column(table, "root"), return_counts=True)
    return pa.table({"root": roots, "count": counts.astype(np.int64)})


def _sum(table: pa.Table) -> pa.Table:
    roots, which = np.unique(column(table, "root"), return_inverse=True)
    counts = np.bincount(which, column(table, "count")).astype(np.int64)
    return pa.table({"root": roots, "size": counts + 1})  # and the one that stays


def _sizes(table: pa.Table) -> pa.Table:
    sizes, counts = np.unique(column(table, "size"), return_counts=True)
    return pa.table({"size": sizes, "clusters": counts.astype(np.int64)})


def _top(table: pa.Table) -> pa.Table:
    order = np.lexsort((column(table, "root"), -column(table, "size")))
    return table.take(order[:_LARGEST])


def _sample(roots: np.ndarray, table: pa.Table) -> pa.Table:
    """The first members of some components."""
    table = table.select(["root", "node"]).filter(pa.array(np.isin(column(table, "root"), roots)))
    table = table.take(np.lexsort((column(table, "node"), column(table, "root"))))
    root = column(table, "root")
    place = np.arange(len(root)) - np.searchsorted(root, root)
    return table.filter(pa.array(place < _SAMPLES))


def _document(node: int, files: list[str], parts: list[str], before: int) -> dict[str, str]:
    """Id and first characters of a document; those of published sets have no text here."""
    file, rows = node >> 32, np.array([node & 0xFFFFFFFF])
    if file < before:
        return {"id": read_rows(files[file], ["id"], rows)["id"][0].as_py(), "text": ""}
    row = read_rows(parts[file - before], ["id", "text"], rows).to_pylist()[0]
    return {"id": row["id"], "text": (row["text"] or "")[:_CHARACTERS]}
