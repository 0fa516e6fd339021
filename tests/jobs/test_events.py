import pytest

from jobs.events import seconds, sentence

TOLD = [
    ({"event": "start", "attempt": 1, "world_size": 1}, "started with 1 worker"),
    ({"event": "start", "attempt": 3, "world_size": 8}, "started with 8 workers, attempt 3"),
    (
        {"event": "resume", "cause": "controller_restart", "from_step": 4000, "world_size": 2, "load": 3.21},
        "goes on from the checkpoint of step 4,000 with 2 workers, read in 3.2 s; Ray Train's controller was lost",
    ),
    (
        {"event": "checkpoint", "step": 200, "folder": "c", "pause": 0.05, "write": 12.4},
        "checkpoint of step 200 is safe; training paused for 0.05 s, writing took 12 s",
    ),
    ({"event": "checkpoint", "step": 200, "folder": "c"}, "checkpoint of step 200 is safe"),
    (
        {"event": "checkpoint_failed", "step": 200, "folder": "c", "error": "no space left", "pause": 1, "write": 1},
        "the checkpoint of step 200 could not be written, training goes on: no space left",
    ),
    (
        {"event": "corrupt_checkpoint", "step": 9, "checkpoint_step": 200, "folder": "checkpoints/x"},
        "the checkpoint of step 200 is damaged and passed over (checkpoints/x)",
    ),
    (
        {"event": "outlier", "step": 7, "loss": 9.5, "median": 3.25, "reason": "loss far above its median"},
        "the update is skipped, loss far above its median (loss 9.5, median 3.25)",
    ),
    (
        {"event": "spike", "step": 7, "loss": None, "median": 3.25, "reason": "not finite", "data_step": 1234},
        "not finite (median 3.25), since data step 1,234",
    ),
    (
        {
            "event": "rollback",
            "from_step": 1310,
            "to_step": 1200,
            "source": "storage",
            "seconds": 75,
            "skipped": [3, 9],
        },
        "went back from step 1,310 to 1,200 from storage in 1 min 15 s; data steps 3 to 8 are skipped for good",
    ),
    (
        {"event": "interrupt", "reason": "preemption", "saved": True, "seconds": 2.5},
        "a node is about to go, and a checkpoint is taken in 2.5 s",
    ),
    (
        {"event": "interrupt", "reason": "resize", "saved": False, "seconds": 0.0},
        "asked to by a resize, but no checkpoint is there: amid outliers none is taken, or it could not be written",
    ),
    (
        {"event": "preemption", "ranks": [3], "nodes": ["a"], "seconds_left": 118.4},
        "1 node with worker 3 will be taken away, in 1 min 58 s",
    ),
    (
        {"event": "preempted", "ranks": list(range(16))},
        "the announced node is gone, and workers 0, 1, 2, 3, 4, 5, 6, 7 and 8 more with it",
    ),
    (
        {"event": "resize", "before": 1, "after": 4, "saved": True, "seconds": 3.0},
        "goes from 1 worker to 4, saved in 3 s before",
    ),
    ({"event": "waiting_for_nodes", "error": "no node fits"}, "waits for nodes: no node fits"),
    ({"event": "worker_failure", "ranks": [0, 1], "error": "killed"}, "lost workers 0, 1: killed"),
    ({"event": "controller_failure", "error": "killed"}, "lost Ray Train's controller: killed"),
    (
        {"event": "validation_failed", "step": 5, "error": "deleted"},
        "the checkpoint of step 5 could not be measured: deleted",
    ),
    (
        {"event": "end", "loss": 3.0, "validation_loss": 3.1, "validation_bits_per_byte": 1.2},
        "finished: loss 3.0000, validation loss 3.1000, 1.2000 bits per byte",
    ),
    ({"event": "stop", "diagnosis": "three rollbacks"}, "stopped: three rollbacks"),
]


@pytest.mark.parametrize(("event", "told"), TOLD)
def test_an_event_is_a_sentence_with_its_numbers(event, told):
    assert sentence({"time": 1.0, **event}) == told


@pytest.mark.parametrize("kind", sorted({event["event"] for event, _ in TOLD}))
def test_events_that_lack_facts_are_told_all_the_same(kind):
    assert kind.replace("_", " ") in sentence({"time": 1.0, "event": kind}) or sentence({"time": 1.0, "event": kind})


def test_events_of_a_kind_that_is_not_known_are_told_with_their_facts():
    event = {"time": 1.0, "event": "moon_landing", "step": 3, "crew": 3, "at": [0.67416, 23.47314], "gone": None}
    assert sentence(event) == "moon landing: crew 3, at [0.6742, 23.47]"


def test_lengths_of_time_read_well():
    told = [seconds(value) for value in (0.042, 9.96, 59, 61, 3599.7, 7260, 300_000)]
    assert told == ["0.042 s", "10 s", "59 s", "1 min 01 s", "1 h 00 min", "2 h 01 min", "3 d 11 h"]
