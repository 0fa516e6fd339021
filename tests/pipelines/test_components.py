import numpy as np
import pyarrow as pa
import pytest
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components as scipy_components

from pipelines.dedup.components import connected_components, contract


def labels(ray, a, b, partitions, blocks=3, **options):
    cuts = np.array_split(np.arange(len(a)), blocks)
    edges = ray.data.from_arrow([pa.table({"a": a[cut], "b": b[cut]}) for cut in cuts])
    return {row["node"]: row["root"] for row in connected_components(edges, partitions, **options).iter_rows()}


def expected(a, b):
    names, ends = np.unique(np.concatenate((a, b)), return_inverse=True)
    graph = coo_matrix((np.ones(len(a)), (ends[: len(a)], ends[len(a) :])), shape=(len(names), len(names)))
    _, component = scipy_components(graph, directed=False)
    roots = {c: names[component == c].min() for c in np.unique(component)}
    return {n: roots[c] for n, c in zip(names.tolist(), component, strict=True) if roots[c] != n}


def random_graph(seed):
    rng = np.random.default_rng(seed)
    names = rng.choice(1 << 40, 600)
    return rng.choice(names, 450), rng.choice(names, 450)


def chain(length, seed):
    order = np.random.default_rng(seed).permutation(length).astype(np.int64)
    return order[:-1], order[1:]


@pytest.mark.parametrize("partitions", [1, 2, 7])
@pytest.mark.parametrize("seed", [0])
def test_random_graphs_have_the_components_that_scipy_finds(ray_session, partitions, seed):
    a, b = random_graph(seed)
    found = labels(ray_session, a, b, partitions)
    assert found == expected(a, b)
    assert len(set(found.values())) > 20


@pytest.mark.parametrize("partitions", [1, 2, 7])
def test_a_long_chain_in_random_order_is_one_component(ray_session, partitions):
    a, b = chain(3000, seed=7)
    found = labels(ray_session, a, b, partitions)
    assert set(found) == set(range(1, 3000))
    assert set(found.values()) == {0}


def test_an_ordered_chain_is_one_component(ray_session):
    a = np.arange(1000, dtype=np.int64)
    found = labels(ray_session, a, a + 1, 5, blocks=10)
    assert set(found.values()) == {0}
    assert len(found) == 1000


def test_loops_and_repeated_edges_do_no_harm(ray_session):
    a, b = np.array([5, 5, 7, 9, 9]), np.array([5, 7, 5, 2, 2])
    assert labels(ray_session, a, b, 2, blocks=2) == {7: 5, 9: 2}


def test_no_edges_no_components(ray_session):
    none = np.empty(0, np.int64)
    assert labels(ray_session, none, none, 2, blocks=1) == {}


def test_contract_gives_the_smallest_node_of_each_component():
    node, root = contract(np.array([4, 9, 8]), np.array([9, 3, 10]))
    assert dict(zip(node.tolist(), root.tolist(), strict=True)) == {4: 3, 9: 3, 10: 8}


@pytest.mark.parametrize("partitions", [2, 7])
def test_nodes_with_very_many_neighbours_are_joined_without_their_edges_in_one_place(ray_session, partitions):
    rng = np.random.default_rng(12)
    names = rng.permutation(3000).astype(np.int64)
    hubs, leaves = names[:12], names[12:]
    of = rng.integers(0, 12, len(leaves))
    # hubs in a chain, leaves that hang on two hubs, and an edge between leaves of different hubs
    a = np.concatenate((hubs[of], hubs[:5], hubs[7:8], leaves[of == 9][:1]))
    b = np.concatenate((leaves, hubs[1:6], leaves[of == 6][:1], leaves[of == 10][:1]))
    found = labels(ray_session, a, b, partitions, blocks=5, limit=50)
    assert found == expected(a, b)
    assert len(set(found.values())) == 5
