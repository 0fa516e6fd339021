import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.dedup import kernels
from pipelines.dedup.keep import ranks
from pipelines.documents import to_table

sets = st.lists(st.lists(st.integers(0, 40), max_size=30), min_size=1, max_size=6)


def flat(lists):
    offsets = np.concatenate(([0], np.cumsum([len(x) for x in lists]))).astype(np.int64)
    return np.array([v for x in lists for v in x], np.uint32), offsets


@settings(deadline=None)  # the first call compiles
@given(sets, st.data())
def test_similarity_is_that_of_the_sets(lists, data):
    ones = data.draw(st.lists(st.lists(st.integers(0, 40), max_size=30), min_size=1, max_size=6))
    which = np.array(data.draw(st.lists(st.integers(0, len(lists) - 1), min_size=len(ones), max_size=len(ones))))
    found = kernels.jaccard(*kernels.sort_sets(*flat(ones)), *kernels.sort_sets(*flat(lists)), which)
    for similarity, one, other in zip(found, ones, which, strict=True):
        a, b = set(one), set(lists[other])
        assert similarity == (len(a & b) / len(a | b) if a | b else 0)


def test_ranks_order_documents_by_the_policy_and_put_those_without_a_value_last():
    metadata = [
        '{"date": "2024-05-01T00:00:00Z"}',
        '{"date": 1714521601}',
        '{"date": "soon"}',
        None,
        "[1]",
        '{"s": "3.5"}',
    ]
    table = to_table({"id": str(i), "text": "x" * i, "metadata": m} for i, m in enumerate(metadata))
    assert ranks(table, "newest", None).tolist() == [-1714521600.0, -1714521601.0] + [np.inf] * 4
    assert ranks(table, "best_score", "s").tolist() == [np.inf] * 5 + [-3.5]
    assert ranks(table, "longest", None).tolist() == [0, -1, -2, -3, -4, -5]
    assert ranks(table, "first", None).tolist() == [0] * 6
