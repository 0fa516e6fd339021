import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.history import History, counting, parse
from jobs.run_folder import StoredRun, valid_steps


def row(step, time, **numbers):
    return {"step": step, "data_step": step - 1, "loss": 5.0 - step / 100, "lr": 1e-3, "time": time, **numbers}


def put(run, name, rows):
    run.write_text(f"metrics/{name}.jsonl", "".join(json.dumps(r) + "\n" for r in rows))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=40))
def test_rows_that_count_are_those_that_no_later_marker_undoes(told):
    rows = [
        {"step": step, "undone_after": step} if undo else {"step": step, "loss": float(place)}
        for place, (undo, step) in enumerate(told)
    ]
    steps = np.array([r["step"] for r in rows], float)
    undone = np.array([r.get("undone_after", np.nan) for r in rows], float)
    counts = counting(steps, undone)
    expected = [r["loss"] for r in valid_steps(rows).values()]
    newest = {r["step"]: r["loss"] for r, valid in zip(rows, counts, strict=True) if valid}
    assert [newest[step] for step in sorted(newest)] == expected


def test_what_was_written_since_is_read_and_the_rest_is_not_read_again(tmp_path, monkeypatch):
    from pipelines import storage

    run, read = StoredRun(str(tmp_path)), []
    original = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda uri: read.append(uri.rsplit("/", 1)[1]) or original(uri))
    history = History(run)
    assert not history.update()
    put(run, "1", [row(s, s) for s in range(1, 6)])
    put(run, "2", [row(6, 6)])
    assert history.update()
    put(run, "2", [row(6, 6), row(7, 7)])
    assert history.update()
    assert not history.update()
    assert read == ["1.jsonl", "2.jsonl", "2.jsonl"]
    assert history.valid()["step"].tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_rows_of_several_writers_are_in_the_order_of_their_time_and_undone_ones_do_not_count(tmp_path):
    run = StoredRun(str(tmp_path))
    rows = [row(1, 1), row(2, 2), row(3, 3), {"step": 1, "undone_after": 1, "time": 4}, row(2, 5, loss=9.0)]
    put(run, "5", rows)
    put(run, "0-validation", [{"step": s, "validation_loss": 4.0 + s, "time": s + 0.5} for s in (2, 3, 1)])
    history = History(run)
    history.update()
    assert history.steps["step"].tolist() == [1, 2, 3, 2]
    assert history.counts.tolist() == [True, False, False, True]
    assert history.valid()["loss"].tolist() == [4.99, 9.0]
    assert history.validation["step"].tolist() == [1]  # those of steps 2 and 3 went with them


def test_numbers_that_are_missing_or_of_another_kind_are_read():
    text = b"\n".join(
        json.dumps(r).encode()
        for r in (
            {"step": 1, "loss": None, "lr": 0.1, "time": 1, "skipped": True, "batch_hash": "00ff", "new": [1]},
            {"step": 2.0, "loss": 3, "lr": 0, "mfu": 0.5, "time": 2.5},
        )
    )
    columns = parse(text)
    assert columns["step"].tolist() == [1, 2]
    np.testing.assert_array_equal(columns["loss"], [np.nan, 3])
    np.testing.assert_array_equal(columns["skipped"], [1, np.nan])
    assert {column.dtype for column in columns.values()} == {np.dtype(float)}


@pytest.mark.parametrize("rest", [b'{"step": 3, "lo', b"\xff\xfe", b"[1, 2]", b'"text"'])
def test_a_line_that_a_crash_cut_short_is_left_out(rest):
    text = b'{"step": 1, "loss": 2.5, "time": 1}\n{"step": 2, "loss": 2.25, "time": 2}\n'
    assert parse(text + rest)["loss"].tolist() == [2.5, 2.25]
    assert len(parse(b"")["step"]) == len(parse(b"\n")["step"]) == 0
