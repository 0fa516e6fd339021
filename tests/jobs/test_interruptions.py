"""When a run saves beyond its usual checkpoints: for a node that is about to go, and before a resize."""

from types import SimpleNamespace

import pytest
import ray.train

from jobs import interruptions as module
from jobs.interruptions import Asked, Interruptions, ask_for_checkpoint, checkpoint_taken


class Bench:
    """A clock and a watcher of nodes in our hands."""

    def __init__(self, monkeypatch):
        self.now, self.info, self.looks = 1000.0, None, 0
        monkeypatch.setattr(module, "time", SimpleNamespace(time=self.clock, monotonic=self.clock, sleep=self.sleep))
        monkeypatch.setattr(module, "ASKED", Asked())
        monkeypatch.setattr(ray.train, "get_preemption_info", self.look)

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def look(self):
        self.looks += 1
        return self.info

    def announce(self, node, seconds):
        self.info = SimpleNamespace(preempted_node_ids=[node], deadline_ms=(self.now + seconds) * 1000)


@pytest.fixture
def bench(monkeypatch):
    return Bench(monkeypatch)


def told(bench, interrupt, seconds, step=0.1, saving=0.0):
    """What the loop is told in some seconds of steps, with the time since the start; each answer costs ``saving``."""
    began, found = bench.now, []
    while bench.now < began + seconds:
        if reason := interrupt():
            found.append((reason, round(bench.now - began, 1)))
            bench.now += saving
        bench.now += step
    return found


def test_a_node_that_will_go_is_told_once_at_once_and_once_when_there_is_just_time_left(bench):
    interrupt = Interruptions(0, 1)
    assert told(bench, interrupt, 30) == []
    bench.announce("a", 60)
    (first, at), (last, late) = told(bench, interrupt, 60, saving=4)
    assert first == last == "preemption"
    assert at < 8
    assert 60 - late > 4  # it is saved before the node goes
    assert 60 - late < 20
    assert bench.looks < 90 / 2  # not at every step: each look costs milliseconds
    bench.announce("b", 60)
    assert told(bench, interrupt, 10)[0][0] == "preemption"


def test_a_notice_too_short_for_two_checkpoints_is_answered_with_one(bench):
    interrupt = Interruptions(0, 1)
    bench.announce("a", 8)
    assert [reason for reason, _ in told(bench, interrupt, 8, saving=3)] == ["preemption"]


def test_a_resize_is_told_once_and_answered_by_a_checkpoint_of_that_step_or_a_later_one(bench):
    interrupt = Interruptions(0, 1)
    interrupt.step = 20
    ask_for_checkpoint()
    assert [reason for reason, _ in told(bench, interrupt, 5)] == ["resize"]
    interrupt.saved(20)  # an older one, which was still being written
    assert not checkpoint_taken()
    interrupt.saved(21)
    assert checkpoint_taken()


def test_a_resize_is_answered_by_a_run_that_has_gone_back_since(bench):
    interrupt = Interruptions(0, 1)
    interrupt.step = 20
    ask_for_checkpoint()
    assert [reason for reason, _ in told(bench, interrupt, 5)] == ["resize"]
    interrupt.saved(10)  # what it has gone back to
    interrupt.step = 10
    assert not checkpoint_taken()
    interrupt.saved(11)
    assert checkpoint_taken()


def test_the_talk_keeps_its_pace_whatever_a_step_takes(bench, monkeypatch):
    for step in (0.001, 0.1, 30.0):
        talks = []
        interrupt = Interruptions(0, 1)
        monkeypatch.setattr(interrupt, "_due", lambda talks=talks: talks.append(bench.now) or 0)
        told(bench, interrupt, 40 * max(step, 1.0), step=step)
        pauses = [b - a for a, b in zip(talks[-4:], talks[-3:], strict=False)]
        assert all(0.5 < pause <= max(3.0, step * 1.001) for pause in pauses), (step, pauses)


def test_after_an_error_workers_whose_peer_will_go_wait_for_the_controller(bench):
    interrupt = Interruptions(0, 1)
    interrupt.wait_for_the_end(60)
    assert bench.now == 1000  # nothing was announced
    bench.announce("a", 5)
    told(bench, interrupt, 5)
    before = bench.now
    interrupt.wait_for_the_end(60)
    assert bench.now - before >= 60
