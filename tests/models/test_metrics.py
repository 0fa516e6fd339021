import json
import os
import threading
import time

import pytest

from jobs.run_folder import StoredRun
from models.training import metrics
from models.training.metrics import MetricsWriter


class Collected:
    """A sink that remembers what it got."""

    def __init__(self):
        self.rows, self.calls = [], []

    def write(self, row):
        self.rows.append(row)

    def flush(self):
        self.calls.append("flush")

    def close(self):
        self.calls.append("close")


class Broken(Collected):
    def write(self, row):
        super().write(row)
        raise ConnectionError("nobody answers")


class Flaky(StoredRun):
    """A run whose storage fails while ``away``."""

    away = False

    def write_text(self, name, text):
        if self.away:
            raise OSError("storage is away")
        super().write_text(name, text)


@pytest.fixture
def run(tmp_path):
    return Flaky(str(tmp_path))


def steps(run):
    return [row["step"] for row in run.metrics()]


def test_rows_are_on_storage_after_a_flush_and_numbers_that_json_lacks_are_none(run):
    writer = MetricsWriter(run, every=1e6)
    writer.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "mfu": None, "skipped": True})
    assert steps(run) == []
    assert writer.flush()
    (row,) = run.metrics()
    assert row.pop("time") == pytest.approx(time.time(), abs=60)
    assert row == {"step": 1, "loss": None, "grad_norm": None, "mfu": None, "skipped": True}


def test_a_storage_that_fails_loses_no_row_and_stops_nothing(run, caplog):
    writer = MetricsWriter(run, every=1e6)
    writer.write({"step": 1})
    assert writer.flush()
    run.away = True
    for step in (2, 3):
        writer.write({"step": step})
        assert not writer.flush()
    assert caplog.text.count("cannot be written, its rows are kept: storage is away") == 1
    run.away = False
    assert writer.flush()
    assert steps(run) == [1, 2, 3]
    writer.close()


def test_rows_reach_storage_by_themselves(run):
    writer = MetricsWriter(run, every=0.02)
    writer.write({"step": 1})
    deadline = time.monotonic() + 20
    while not steps(run) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert steps(run) == [1]
    writer.close()


def test_files_are_of_bounded_length_and_their_names_in_order(run, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "_SEGMENT", 10)
    writer = MetricsWriter(run, every=1e6)
    for step in range(35):
        writer.write({"step": step})
        if step % 5 == 4:
            writer.flush()
    writer.close()
    files = sorted(os.listdir(tmp_path / "metrics"))
    assert len(files) == 4
    texts = [(tmp_path / "metrics" / name).read_text() for name in files]
    told = [json.loads(line)["step"] for text in texts for line in text.splitlines()]
    assert told == list(range(35))


def test_sinks_get_every_row_from_a_thread_of_their_own_and_are_closed(run):
    class Slow(Collected):
        def write(self, row):
            super().write(row)
            self.thread = threading.current_thread()
            free.wait(20)

    free, slow, quick = threading.Event(), Slow(), Collected()
    writer = MetricsWriter(run, [slow, quick], every=0.01)
    for step in range(100):
        writer.write({"step": step, "loss": 1.0})  # waits for nobody
    free.set()
    writer.close()
    assert slow.thread is not threading.current_thread()
    for sink in (slow, quick):
        assert [row["step"] for row in sink.rows] == list(range(100))
        assert sink.calls[-1] == "close"
        assert sink.rows[0]["time"] > 0


def test_a_sink_that_fails_time_and_again_is_left_out_and_the_others_go_on(run, caplog):
    broken, good = Broken(), Collected()
    writer = MetricsWriter(run, [broken, good], every=1e6)
    for step in range(50):
        writer.write({"step": step})
    writer.close()
    assert len(broken.rows) == 20
    assert broken.calls == []
    assert len(good.rows) == len(steps(run)) == 50
    assert "Broken gets no more rows, it failed 20 times in a row: nobody answers" in caplog.text
