import numpy as np
import pyarrow as pa
import pytest

from pipelines import storage
from pipelines.batches import Batches
from pipelines.shards import DOCUMENTS_SCHEMA, TokenShards, shard_name, write_shard

BLOCK, SHARD = 8, 8 * 32 * 4
SOURCES = ["web", "books", "code"]


def make_split(folder, lengths, gaps, rng):
    """A split of documents of random sources with padding after some; gives each token's source, -1 for padding."""
    rows, owner = [], []
    for number, (length, gap) in enumerate(zip(lengths, gaps, strict=True)):
        source = int(rng.integers(len(SOURCES)))
        rows.append({"id": str(number), "start": len(owner), "length": length, "source": SOURCES[source], "url": None})
        owner += [source] * length + [-1] * gap
    for index, first in enumerate(range(0, len(owner), SHARD)):
        tokens = np.zeros(min(SHARD, len(owner) - first), np.uint16)
        write_shard(f"{folder}/{shard_name(index)}", tokens, BLOCK, 0)
        mine = [row for row in rows if first <= row["start"] < first + SHARD]
        with storage.parquet_writer(f"{folder}/documents/{shard_name(index)}", DOCUMENTS_SCHEMA) as out:
            out.write_table(pa.Table.from_pylist(mine, DOCUMENTS_SCHEMA))
    manifest = {"tokens": len(owner), "block": BLOCK, "shard_tokens": SHARD, "dtype": "uint16", "fingerprint": "f"}
    storage.write_json(f"{folder}/manifest.json", manifest)
    return np.array(owner)


@pytest.mark.parametrize("padded", [False, True])
def test_tokens_of_each_source_are_those_counted_one_by_one(tmp_path, padded):
    rng = np.random.default_rng(0)
    lengths = [1, *rng.geometric(1 / 40, 100).tolist(), 2 * SHARD + 5, 3, *rng.geometric(1 / 40, 20).tolist()]
    gaps = rng.integers(0, 3, len(lengths)) if padded else [0] * len(lengths)
    owner = make_split(tmp_path, lengths, gaps, rng)
    batches = Batches(TokenShards(str(tmp_path)), sequence_length=10, global_batch=8, seed=3)
    data_steps = np.array([0, 5, 5, 2 * batches.n_samples // 8])  # one twice, and one of a later epoch
    expected = dict.fromkeys(SOURCES, 0)
    for step in data_steps:
        for sample in batches.sample_indices(int(step)):
            for source in owner[sample * 10 + 1 : sample * 10 + 11]:
                if source >= 0:
                    expected[SOURCES[source]] += 1
    assert batches.tokens_by_source(data_steps) == expected
    assert padded or sum(expected.values()) == 4 * 8 * 10
    whole = batches.shards.tokens_by_source(np.array([0]), len(owner))
    assert whole == {name: int((owner == i).sum()) for i, name in enumerate(SOURCES)}
    assert batches.tokens_by_source(np.array([], np.int64)) == {}
