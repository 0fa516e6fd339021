import json
import time
from pathlib import Path

import pytest

from jobs.progress import Progress
from jobs.run_folder import StoredRun
from jobs.settings import PretrainJob


@pytest.fixture
def run(tmp_path):
    folder = StoredRun(str(tmp_path / "runs/base"))
    folder.write_json("run.json", {"name": "base", "n_params": 5, "settings": {}, "model": {}})
    return folder


def settings(run, **changes):
    workspace = str(Path(run.folder).parents[1])
    return PretrainJob(workspace=workspace, name="base", steps=100, **changes)


def event(run, kind, **facts):
    run.append_line("events.jsonl", json.dumps({"time": time.time(), "event": kind, **facts}))


def rows(run, steps, name="1"):
    facts = {"lr": 1e-3, "grad_norm": None, "tokens": 10, "tokens_per_second": 500.0, "mfu": None, "seconds": 1.0}
    lines = [json.dumps({"step": s, "data_step": s, "loss": 3.0, "time": time.time(), **facts}) for s in steps]
    run.write_text(f"metrics/{name}.jsonl", "\n".join(lines) + "\n")


def page_of(run):
    path = Path(run.uri("report.html"))
    return path.read_text() if path.exists() else ""


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_events_are_logged_as_sentences_and_steps_with_the_time_left(run, caplog):
    event(run, "start", attempt=1, world_size=2)
    progress = Progress(run, settings(run, report_every=0.0), every=0.02)
    progress.start()
    event(run, "worker_failure", ranks=[1], error="killed")
    event(run, "checkpoint", step=10, folder="c")
    event(run, "rollback", step=31, from_step=31, to_step=10, skipped=[20, 32], source="memory", seconds=0.5)
    rows(run, [1, 2])
    wait_for(lambda: "step 2/100" in caplog.text)
    progress.stop()
    assert "pretrain: lost worker 1: killed\n" in caplog.text
    assert "pretrain: step 31: went back from step 31 to 10 from memory in 0.5 s; data steps 20 to 31" in caplog.text
    assert "is safe" not in caplog.text
    assert "loss 3.000, lr 1.00e-03, gradient norm nan, 500 tokens/s" in caplog.text
    assert page_of(run) == ""


def test_the_page_is_drawn_while_the_run_lives_after_events_and_at_its_end(run):
    event(run, "start", attempt=1, world_size=2)
    progress = Progress(run, settings(run, report_every=1e4), every=0.02)
    progress.start()
    wait_for(lambda: "running" in page_of(run))
    progress.rested = 0.0
    event(run, "worker_failure", ranks=[1], error="killed")  # long before the page is due
    wait_for(lambda: "lost worker 1: killed" in page_of(run))
    event(run, "end", step=100, loss=3.0)
    progress.stop()
    assert "finished" in page_of(run)
    assert "http-equiv" not in page_of(run)


def test_a_page_that_cannot_be_drawn_is_no_reason_to_end(run, caplog):
    run.write_text("ledger.json", "{")
    progress = Progress(run, settings(run, report_every=0.01), every=0.01)
    progress.start()
    wait_for(lambda: "could not be drawn, which is tried again" in caplog.text)
    progress.rested = 0.0
    run.delete("ledger.json")
    wait_for(lambda: "running" in page_of(run) or setattr(progress, "rested", 0.0))
    progress.stop()
    assert caplog.text.count("could not be drawn") == 1


def test_drawing_takes_a_small_share_of_the_time_however_long_it_takes(run, monkeypatch):
    progress = Progress(run, settings(run, report_every=1.0))
    monkeypatch.setattr(progress.page, "write", lambda again, most: time.sleep(0.05))
    before = time.monotonic()
    progress._draw(again=1.0)
    assert progress.rested - before >= 50 * 0.05
    assert progress.due >= progress.rested
