import numpy as np
import pytest

from jobs.provenance import Mixture, data_steps, mixture_section
from models.training.state import TrainState
from pipelines import storage
from pipelines.shards import DOCUMENTS_SCHEMA, shard_name, write_shard

FACTS = {"tokens_manifest": "f", "settings": {"global_batch": 4, "seed": 0, "sequence_length": 16}, "model": {}}


@pytest.fixture
def workspace(tmp_path):
    """A split of 4,001 tokens: web and code by turns, 100 tokens each."""
    import pyarrow as pa

    folder = f"{tmp_path}/tokens/train"
    write_shard(f"{folder}/{shard_name(0)}", np.zeros(4001, np.uint16), 64, 0)
    rows = [
        {"id": str(i), "start": 100 * i, "length": 100, "source": ("web", "code")[i % 2], "url": None}
        for i in range(41)
    ]
    with storage.parquet_writer(f"{folder}/documents/{shard_name(0)}", DOCUMENTS_SCHEMA) as out:
        out.write_table(pa.Table.from_pylist(rows, DOCUMENTS_SCHEMA))
    manifest = {"tokens": 4001, "block": 64, "shard_tokens": 64 * 32 * 8, "dtype": "uint16", "documents": 41}
    storage.write_json(f"{folder}/manifest.json", manifest | {"fingerprint": "f"})
    return str(tmp_path)


def columns(steps, many=None):
    steps = np.array(steps, float)
    return {"data_step": steps, "data_steps": np.full(len(steps), np.nan) if many is None else np.array(many, float)}


def test_the_mixture_of_a_whole_epoch_is_that_of_the_split(workspace):
    assert len(range(0, 4000, 16)) == 250
    mixture = Mixture(workspace, FACTS)
    seen = mixture.update(columns(range(125)), [])  # two epochs of 250 samples in batches of 4
    assert seen == {"web": 2 * 1999 + 2, "code": 2 * 2000}  # without the first token, which is no target
    assert sum(seen.values()) == 125 * 4 * 16


def test_going_on_and_going_back_give_what_counting_anew_gives(workspace):
    mixture = Mixture(workspace, FACTS)
    for steps in (range(10), range(40), [*range(20), *range(50, 60)], [*range(20), *range(50, 90)]):
        assert mixture.update(columns(steps), []) == Mixture(workspace, FACTS).update(columns(steps), [])
    assert mixture.update(columns([]), []) == {}


def test_a_long_run_is_counted_bit_by_bit(workspace):
    mixture = Mixture(workspace, FACTS)
    whole = Mixture(workspace, FACTS).update(columns(range(100)), [])
    left = []
    for _ in range(4):
        seen = mixture.update(columns(range(100)), [], most=120)
        left.append(mixture.left)
    assert left == [70, 40, 10, 0]
    assert seen == whole
    assert "data steps are still to be counted" not in mixture_section(seen, mixture, 4001)


@pytest.mark.parametrize("change", [{"fingerprint": "g"}, None, {"documents": 10**9}])
def test_tokens_that_are_not_the_runs_are_not_counted(workspace, change):
    uri = f"{workspace}/tokens/train/manifest.json"
    if change is None:
        storage.delete(uri)
    else:
        storage.write_json(uri, {**storage.read_json(uri), **change})
    mixture = Mixture(workspace, FACTS)
    assert mixture.update(columns(range(10)), []) == {}
    told = mixture_section({}, mixture, None)
    assert ("too many to look" if change == {"documents": 10**9} else "not in the workspace any more") in told


def test_a_ramp_of_the_batch_counts_data_in_its_smallest_unit(workspace):
    settings = {**FACTS["settings"], "global_batch": 8, "batch_ramp": [[0, 4], [10, 12]]}
    ramped = Mixture(workspace, {**FACTS, "settings": settings})
    valid = columns([0, 1, 2, 4, 6], many=[1, 1, 2, 2, 3])  # nine data steps of four samples
    assert ramped.update(valid, []) == Mixture(workspace, FACTS).update(columns(range(9)), [])


@pytest.mark.parametrize("skips", [[], [[0, 2]], [[3, 5], [9, 10], [20, 30]], [[40, 50]]])
def test_data_steps_are_those_that_the_loop_takes(skips):
    state, rows = TrainState(skips=skips), []
    for many in [1] * 5 + [2] * 4 + [3] * 4:
        taken = []
        for _ in range(many):
            taken.append(state.next_data_step(state.data_step))
            state.data_step = taken[-1] + 1
        rows.append(taken)
    found = data_steps(columns([taken[0] for taken in rows], [len(taken) for taken in rows]), skips)
    assert found.tolist() == [step for taken in rows for step in taken]
