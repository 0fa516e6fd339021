import logging

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipelines import statistics
from pipelines.documents import to_table
from pipelines.filters import Measure
from pipelines.progress import Progress


def test_documents_are_counted_by_source_language_and_length():
    rows = [
        {"id": "1", "text": "ä" * 50, "source": "web", "language": "de"},
        {"id": "2", "text": "a" * 100, "source": "web", "language": "en"},
        {"id": "3", "text": "a" * 7, "source": "books", "language": None},
    ]
    found = statistics.of_documents(to_table(rows))
    assert found["sources"] == {"web": {"documents": 2, "bytes": 200}, "books": {"documents": 1, "bytes": 7}}
    assert found["languages"] == {"de": 1, "en": 1, "und": 1}
    assert found["bytes"] == {"20": 2, "8": 1}  # 10 ** 2.0 = 100; 10 ** 0.8 = 6.3


def test_measures_fall_into_shares_or_decades_by_their_limits_and_nan_is_not_counted():
    share = Measure("a share", np.array([0.0, 0.305, 1.0, np.nan]), maximum=0.3)
    count = Measure("a count", np.array([0.0, 49.0, 100.0]), minimum=50)
    found = statistics.of_measures([share, count])
    assert found["a share"]["shares"]["bins"] == {"0": 1, "30": 1, "100": 1}
    assert found["a share"]["shares"]["limits"] == {"-inf 0.3": 3}
    assert found["a count"]["decades"]["bins"] == {"-1000": 1, "16": 1, "20": 1}


@given(st.lists(st.floats(1e-6, 1e9), min_size=1, max_size=50), st.sampled_from(["shares", "decades"]))
def test_every_value_lies_within_the_range_of_its_bin(values, scale):
    limit = 0.5 if scale == "shares" else 50.0
    array = np.clip(values, 0, 1) if scale == "shares" else np.array(values)
    bins = statistics.of_measures([Measure("m", array, maximum=limit)])["m"][scale]["bins"]
    ranges = [statistics.bin_range(int(place), scale) for place in bins]
    for value in array:
        assert any(low <= value * (1 + 1e-9) and value <= high * (1 + 1e-9) for low, high in ranges)


@given(st.permutations(range(6)))
def test_sums_do_not_depend_on_the_order(order):
    parts = [{"a": {str(i % 2): i}, "n": i} for i in range(6)]
    total: dict = {}
    for i in order:
        statistics.add(total, parts[i])
    assert total == {"a": {"0": 6, "1": 9}, "n": 15}


def test_progress_tells_documents_bytes_and_time_left_while_units_run(caplog, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("pipelines.progress.time.monotonic", lambda: now[0])
    progress = Progress("filter", {"a": 50_000_000, "b": 50_000_000}, done=1)
    now[0] += 10
    with caplog.at_level(logging.INFO, "ingot"):
        progress.step("a", 1000, 25_000_000, finished=False)
        now[0] += 10
        progress.step("a", 2000, 50_000_000, finished=True)
    assert caplog.messages == [
        "filter: 1 of 3 units, 1,000 documents, 25.0 MB, 2.50 MB/s, 30 s left",
        "filter: 2 of 3 units, 2,000 documents, 50.0 MB, 2.50 MB/s, 20 s left",
    ]
