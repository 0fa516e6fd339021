"""Connected components of a graph of any size over Ray Data.

Every round brings all edges of a node into the partition that owns it, contracts each partition's subgraph at once,
and replaces it by a star around its smallest node. A node thereby learns the smallest label of its neighbours, as in
hash-to-min (Rastogi et al. 2013) and the star operations of Kiveris et al. (2014), while whole chains within a
partition collapse in one round. When every node is either the centre of its neighbours or has one single, smaller
neighbour, the graph is a set of stars: the components.

The centre of a very large star is not given its edges: the few nodes with so many are known to every block, which
hangs their leaves onto the centre's own smallest neighbour (large-star) without moving them to one partition.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipelines.dedup import collect, column, compact, kernels, log, map_blocks, partitions_for, shuffle, total
from pipelines.dedup.groups import LIMIT, heavy

if TYPE_CHECKING:
    from ray.data import Dataset


def connected_components(edges: Dataset, partitions: int | None = None, limit: int = LIMIT) -> Dataset:
    """The smallest node of every node's component.

    Args:
        edges: columns a and b, int64, not negative, undirected; repeated edges and loops do no harm.
        partitions: into how many the graph is cut; by default one for each 128 MB of edges.
        limit: neighbours of one node that a partition may hold.

    Returns:
        Columns node and root, int64; one row for each node that is not itself the smallest of its component.
    """
    stars = compact(map_blocks(edges, _contract_edges))
    rounds = 0
    while stars.count():
        if partitions_for(stars, partitions) == 1:
            return compact(map_blocks(stars.repartition(1), _contract_stars))
        rounds += 1
        hubs, _ = heavy(stars, "root", limit)
        targets = _targets(stars, hubs) if len(hubs) else hubs
        both = compact(map_blocks(stars, partial(_both_ways, hubs, targets)))
        stars = compact(map_blocks(shuffle(both, "u", partitions_for(stars, partitions)), _contract_partition))
        unsettled = total(stars, "unsettled")
        log.debug("components: round %d, %d nodes not settled", rounds, unsettled)
        if unsettled == 0:
            return compact(map_blocks(stars, _owned_leaves))
    return stars


def contract(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Components of a graph in memory.

    Args:
        a: one end of each edge, (edges,), int64, not negative.
        b: the other end, (edges,), int64, not negative.

    Returns:
        Nodes without the smallest of each component; and that smallest one for each.
    """
    names, roots, *_ = kernels.components(a, b)
    leaf = names != roots
    return names[leaf], roots[leaf]


def _contract_edges(table: pa.Table) -> pa.Table:
    node, root = contract(column(table, "a"), column(table, "b"))
    return pa.table({"node": node, "root": root})


def _contract_stars(table: pa.Table) -> pa.Table:
    node, root = contract(column(table, "node"), column(table, "root"))
    return pa.table({"node": node, "root": root})


def _targets(stars: Dataset, hubs: np.ndarray) -> np.ndarray:
    """What the leaves of each hub are to hang on: its smallest neighbour, followed as far as that is a hub, or itself.

    A block holds a node at most once as a leaf, so that few rows come to the driver.
    """
    upward = compact(map_blocks(stars, partial(_leaves_among, hubs)))
    targets = hubs.copy()
    if upward.count():
        rows = collect(upward)
        np.minimum.at(targets, np.searchsorted(hubs, column(rows, "node")), column(rows, "root"))
    while True:
        at = np.minimum(np.searchsorted(hubs, targets), len(hubs) - 1)
        further = np.where(hubs[at] == targets, targets[at], targets)
        if (further == targets).all():
            return targets
        targets = further


def _leaves_among(hubs: np.ndarray, table: pa.Table) -> pa.Table:
    return table.filter(pa.array(np.isin(column(table, "node"), hubs)))


def _both_ways(hubs: np.ndarray, targets: np.ndarray, table: pa.Table) -> pa.Table:
    """Every edge for both of its ends; those of a hub's leaves for the leaf only, from what is in the hub's place."""
    node, root = column(table, "node"), column(table, "root")
    if not len(hubs):
        return pa.table({"u": np.concatenate((node, root)), "v": np.concatenate((root, node))})
    at = np.minimum(np.searchsorted(hubs, root), len(hubs) - 1)
    of_hub = hubs[at] == root
    # A hub that is a leaf itself keeps its edges both ways, so that its centre is known to have more neighbours.
    moved = hubs[targets != hubs]
    u = (node[~of_hub], root[~of_hub], node[of_hub], moved, targets[targets != hubs])
    v = (root[~of_hub], node[~of_hub], targets[at[of_hub]], targets[targets != hubs], moved)
    return pa.table({"u": np.concatenate(u), "v": np.concatenate(v)})


def _contract_partition(table: pa.Table) -> pa.Table:
    """Stars in place of a partition's edges, and which of its own nodes (u) are not settled.

    A leaf that another partition owns needs no row if it had that edge before, for its owner has it too.
    """
    names, roots, lowest, highest, seen = kernels.components(column(table, "u"), column(table, "v"))
    owned = lowest >= 0
    unsettled = owned & (lowest < names) & (lowest != highest)
    stays = (names != roots) & (owned | (seen != roots))
    rows = pa.table({"node": names, "root": roots, "owned": owned, "unsettled": unsettled})
    return rows.filter(pa.array(stays))


def _owned_leaves(table: pa.Table) -> pa.Table:
    return table.filter(table["owned"]).select(["node", "root"])
