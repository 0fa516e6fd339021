import json
import re

import numpy as np
import pytest

from jobs.clock import clock_of
from jobs.history import History
from jobs.panels import marks_of, run_picture, step_at, undone_stretches
from jobs.run_folder import StoredRun

NUMBERS = {"lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 1000.0, "seconds": 1.0, "mfu": 0.5, "memory_gb": 60.0}


def history_of(tmp_path, rows):
    run = StoredRun(str(tmp_path))
    run.write_text("metrics/1.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    history = History(run)
    history.update()
    return history


def row(step, time, loss=3.0, **facts):
    return {"step": step, "data_step": step - 1, "loss": loss, "tokens": step * 10, "time": time, **NUMBERS, **facts}


@pytest.fixture
def eventful(tmp_path):
    """Steps of a second: 1 to 10, then 4 seconds down and back to 5, 6 to 12, rolled back to 8, on to 20."""
    rows = [row(s, 100 + s) for s in range(1, 11)]
    rows += [{"step": 5, "undone_after": 5, "time": 114.0}]
    rows += [row(s, 109 + s) for s in range(6, 12)] + [row(12, 121, loss=9.0, skipped=True)]
    rows += [{"step": 8, "undone_after": 8, "time": 121.2}]
    rows += [row(s, 113 + s, data_step=s + 5, skipped=s == 15) for s in range(9, 21)]
    events = [
        {"time": 100.0, "event": "start", "attempt": 1, "world_size": 2},
        {"time": 110.5, "event": "worker_failure", "ranks": [1], "error": "killed"},
        {"time": 114.0, "event": "resume", "step": 5, "cause": "worker_restart", "from_step": 5, "world_size": 2},
        {"time": 121.1, "event": "rollback", "step": 12, "from_step": 12, "to_step": 8, "skipped": [8, 13]},
        {"time": 125.1, "event": "checkpoint", "step": 12, "folder": "c"},
        {"time": 133.5, "event": "end", "step": 20},
    ]
    return history_of(tmp_path, rows), events


def test_undone_steps_are_those_that_were_trained_again(eventful):
    history, _ = eventful
    stretches = {(xs[0], xs[-1]) for xs, _ in undone_stretches(history)}
    assert stretches == {(6, 10), (9, 12)}
    assert history.valid()["step"].tolist() == list(range(1, 21))


def test_marks_are_at_the_steps_that_training_had_reached(eventful):
    history, events = eventful
    assert [step_at(history, when) for when in (99, 101, 110.9, 114, 115, 1e9)] == [0, 1, 10, 10, 6, 20]
    marks = [(mark.kind, mark.step, mark.undone_from) for mark in marks_of(history, events)]
    assert marks == [
        ("restart", 10, None), ("restart", 10, 5), ("rollback", 12, 8), ("checkpoint", 12, None), ("outlier", 15, None),
    ]  # fmt: skip
    svg = run_picture(history, events, [[8, 13]])
    for told in (
        "step 10: lost worker 1: killed\nstep 10: goes on from the checkpoint of step 5",  # one mark, they nearly touch
        "data steps 8 to 12 were skipped before step 9",
        "step 15: the update was skipped, loss 3",
        "Gradient norm before clipping",
        "GPU memory at its peak (GB)",
        ">update skipped<",
    ):
        assert told in svg, told
    assert len(re.findall('class="shade rollback"', svg)) == 6  # in every panel


def test_the_clock_adds_up_by_hand(eventful):
    history, events = eventful
    clock = clock_of(history, events)
    assert (clock.begin, clock.end) == (100.0, 133.5)
    assert clock.trained == [(100.0, 110.0), (114.0, 133.0)]
    assert [(first, last) for first, last, _ in clock.down] == [(110.0, 114.0)]
    assert clock.again == [(105.0, 110.0), (117.0, 121.0)]
    svg = run_picture(history, events, [])
    assert "34 s in all, 4 s of them down (11.9%), 9 s undone (26.9%)" in svg
    assert "down for 4 s: goes on from the checkpoint of step 5 with 2 workers; workers were lost" in svg


def test_a_spike_that_was_undone_does_not_squeeze_the_rest(tmp_path):
    rows = [row(s, s, loss=8 - s / 20 if s < 100 else 3.0) for s in range(1, 150)]
    rows += [row(s, s, loss=500.0) for s in range(150, 155)] + [{"step": 149, "undone_after": 149, "time": 154.5}]
    svg = run_picture(history_of(tmp_path, rows), [], [], only=("Loss",))
    lines = re.findall(r'class="line train[^"]*" points="([^"]*)"', svg)
    heights = [float(point.split(",")[1]) for line in lines for point in line.split()]
    assert max(heights) - min(heights) > 120  # of 230


def test_losses_that_are_not_finite_interrupt_the_line_and_nothing_else(tmp_path):
    rows = [row(s, s, loss=None if s in (4, 5) else 3.0, grad_norm=None if s == 5 else 1.0) for s in range(1, 11)]
    svg = run_picture(history_of(tmp_path, rows), [], [])
    assert "nan" not in svg
    assert svg.count('class="line train"') == 2 + 1  # two pieces, and the legend


@pytest.mark.parametrize(
    "rows", [[], [{"step": 0, "validation_loss": 9.0, "validation_bits_per_byte": 3.0, "time": 1}]]
)
def test_a_run_without_a_step_can_be_drawn(tmp_path, rows):
    history = history_of(tmp_path, rows) if rows else History(StoredRun(str(tmp_path)))
    assert run_picture(history, [], []).startswith("<svg")
    assert clock_of(history, []) is None


@pytest.mark.parametrize("steps", [1, 2, 10, 882, 883, 60_000])
def test_runs_of_any_length_are_drawn_small_and_with_their_spikes(tmp_path, steps):
    rng = np.random.default_rng(0)
    losses = 3 + np.exp(-3 * np.arange(steps) / steps) + rng.normal(0, 0.01, steps)
    losses[steps // 2] = 4.4
    rows = [row(s + 1, s + 1, loss=float(loss)) for s, loss in enumerate(losses)]
    svg = run_picture(history_of(tmp_path, rows), [], [])
    assert "nan" not in svg
    assert len(svg) < 200_000
    shapes = re.findall(r'<poly\w+ class="(?:line|band) train[^"]*" points="([^"]*)"', svg)
    loss = " ".join(shapes[: 2 if steps > 80 else 1])
    places = [tuple(map(float, point.split(","))) for point in loss.split()]
    (top,) = {y for _, y in places if y == min(y for _, y in places)}
    spike = min(x for x, y in places if y == top)
    if steps > 10:
        assert spike == pytest.approx(62 + (steps // 2 + 1) / steps * 882, abs=4)
