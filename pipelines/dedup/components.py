"""Connected components of a graph of any size over Ray Data.

Every round brings all edges of a node into the partition that owns it, contracts each partition's subgraph at once
(scipy), and replaces it by a star around its smallest node. A node thereby learns the smallest label of its
neighbours, as in hash-to-min (Rastogi et al. 2013) and the star operations of Kiveris et al. (2014), while whole
chains within a partition collapse in one round. When every node is either the centre of its neighbours or has one
single, smaller neighbour, the graph is a set of stars: the components.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipelines.dedup import column, compact, map_blocks, partitions_for, shuffle, total

if TYPE_CHECKING:
    from ray.data import Dataset

log = logging.getLogger("ingot")


def connected_components(edges: Dataset, partitions: int | None = None) -> Dataset:
    """The smallest node of every node's component.

    Args:
        edges: columns a and b, int64, undirected; repeated edges and loops do no harm.
        partitions: into how many the graph is cut; by default one for each 128 MB of edges.

    Returns:
        Columns node and root, int64; one row for each node that is not itself the smallest of its component.
    """
    stars = compact(map_blocks(edges, _contract_edges))
    partitions = partitions_for(stars, partitions)
    rounds = 0
    while stars.count():
        rounds += 1
        stars = compact(map_blocks(shuffle(map_blocks(stars, _both_ways), "u", partitions), _contract_partition))
        unsettled = total(stars, "unsettled")
        log.debug("components: round %d, %d nodes not settled", rounds, unsettled)
        if partitions == 1 or unsettled == 0:
            return compact(map_blocks(stars, _owned_leaves))
    return stars


def contract(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Components of a graph in memory.

    Args:
        a: one end of each edge, (edges,), int64.
        b: the other end, (edges,), int64.

    Returns:
        Nodes, ascending, without the smallest of each component; and that smallest one for each.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components as components

    names, ends = np.unique(np.concatenate((a, b)), return_inverse=True)
    graph = coo_matrix((np.ones(len(a), np.int8), (ends[: len(a)], ends[len(a) :])), shape=(len(names), len(names)))
    _, labels = components(graph.tocsr(), directed=False)
    # Names ascend, so the first entry of a label is the smallest node of its component.
    _, first = np.unique(labels, return_index=True)
    roots = names[first[labels]]
    leaf = names != roots
    return names[leaf], roots[leaf]


def _contract_edges(table: pa.Table) -> pa.Table:
    node, root = contract(column(table, "a"), column(table, "b"))
    return pa.table({"node": node, "root": root})


def _both_ways(table: pa.Table) -> pa.Table:
    node, root = column(table, "node"), column(table, "root")
    return pa.table({"u": np.concatenate((node, root)), "v": np.concatenate((root, node))})


def _contract_partition(table: pa.Table) -> pa.Table:
    """Stars in place of a partition's edges, and in the first row how many of its own nodes (u) are not settled."""
    u, v = column(table, "u"), column(table, "v")
    order = np.lexsort((v, u))
    u, v = u[order], v[order]
    new = np.ones(len(u), bool)
    new[1:] = (u[1:] != u[:-1]) | (v[1:] != v[:-1])
    u, v = u[new], v[new]
    own, first, degree = np.unique(u, return_index=True, return_counts=True)
    smallest = v[first]
    settled = (smallest > own) | (degree == 1)
    node, root = contract(u, v)
    unsettled = np.zeros(len(node), np.int64)
    unsettled[0] = np.count_nonzero(~settled)
    return pa.table({"node": node, "root": root, "owned": np.isin(node, own), "unsettled": unsettled})


def _owned_leaves(table: pa.Table) -> pa.Table:
    return table.filter(table["owned"]).select(["node", "root"])
