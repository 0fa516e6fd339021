import numpy as np
import pyarrow as pa
import pytest

from pipelines.dedup.groups import heavy


@pytest.mark.parametrize("blocks", [1, 3, 40])
def test_heavy_values_are_those_above_the_limit_however_the_blocks_are_cut(ray_session, blocks):
    counts = {5: 99, 6: 100, 7: 101, 8: 150, 9: 400} | dict.fromkeys(range(100, 600), 1)
    values = np.random.default_rng(4).permutation(np.repeat(list(counts), list(counts.values())))
    data = ray_session.data.from_arrow([pa.table({"key": cut}) for cut in np.array_split(values, blocks)])
    found = heavy(data.materialize(), "key", limit=100)
    assert [array.tolist() for array in found] == [[7, 8, 9], [101, 150, 400]]
