"""A run's events as sentences, for its log and its page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

QUIET = ("checkpoint", "outlier")
"""What happens all the time, and is told only where all events are."""

_CAUSES = {
    "driver_restart": "the command was run again",
    "worker_restart": "workers were lost",
    "controller_restart": "Ray Train's controller was lost",
    "preemption": "a node went away",
    "resize": "the number of workers changed",
}


def sentence(event: dict[str, Any]) -> str:
    """What happened, with its numbers; also of kinds of events that are not known here."""
    kind = event["event"]
    try:
        return _SENTENCES[kind](event) if kind in _SENTENCES else _plainly(event)
    except (KeyError, TypeError, ValueError):  # of another version of Ingot
        return _plainly(event)


def counted(count: int, noun: str) -> str:
    """``1 worker``, ``2 workers``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def seconds(value: float) -> str:
    """A length of time: 0.42 s, 12 s, 4 min 05 s, 3 h 20 min, 2 d 4 h."""
    if value < 60:
        return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def value(fact: Any) -> str:
    """A fact in a few characters."""
    if isinstance(fact, float):
        return f"{fact:.4g}"
    if isinstance(fact, list):
        return "[" + ", ".join(map(value, fact)) + "]"
    return f"{fact:,}" if isinstance(fact, int) and not isinstance(fact, bool) else str(fact)


def _plainly(event: dict[str, Any]) -> str:
    told = {k: v for k, v in event.items() if k not in ("time", "event", "step", "documents") and v is not None}
    facts = ", ".join(f"{name.replace('_', ' ')} {value(fact)}" for name, fact in told.items())
    return event["event"].replace("_", " ") + (f": {facts}" if facts else "")


def _start(e: dict[str, Any]) -> str:
    again = f", attempt {e['attempt']}" if e["attempt"] > 1 else ""
    return f"started with {counted(e['world_size'], 'worker')}{again}"


def _resume(e: dict[str, Any]) -> str:
    took = f", read in {seconds(e['load'])}" if "load" in e else ""
    why = _CAUSES.get(e["cause"], e["cause"].replace("_", " "))
    return (
        f"goes on from the checkpoint of step {e['from_step']:,} with {counted(e['world_size'], 'worker')}{took}; {why}"
    )


def _checkpoint(e: dict[str, Any]) -> str:
    took = f"; training paused for {seconds(e['pause'])}, writing took {seconds(e['write'])}" if "write" in e else ""
    return f"checkpoint of step {e['step']:,} is safe{took}"


def _outlier(e: dict[str, Any]) -> str:
    return f"the update is skipped, {e['reason']}{_beside_median(e)}"


def _beside_median(e: dict[str, Any]) -> str:
    facts = [
        f"{name} {value(e[key])}" for key, name in (("loss", "loss"), ("median", "median")) if e.get(key) is not None
    ]
    return f" ({', '.join(facts)})" if facts else ""


def _rollback(e: dict[str, Any]) -> str:
    first, after = e["skipped"]
    source = f" from {e['source']}" if "source" in e else ""
    took = f" in {seconds(e['seconds'])}" if "seconds" in e else ""
    skipped = f"data steps {first:,} to {after - 1:,} are skipped for good"
    return f"went back from step {e['from_step']:,} to {e['to_step']:,}{source}{took}; {skipped}"


def _interrupt(e: dict[str, Any]) -> str:
    why = "a node is about to go" if e["reason"] == "preemption" else f"asked to by a {e['reason']}"
    if not e["saved"]:
        return f"{why}, but no checkpoint is there: amid outliers none is taken, or it could not be written"
    return f"{why}, and a checkpoint is taken{_in(e)}"


def _in(e: dict[str, Any]) -> str:
    return f" in {seconds(e['seconds'])}" if e.get("seconds") is not None else ""


def _preemption(e: dict[str, Any]) -> str:
    left = f", in {seconds(e['seconds_left'])}" if e.get("seconds_left") is not None else ""
    return f"{counted(len(e['nodes']), 'node')} with {_workers(e['ranks'])} will be taken away{left}"


def _workers(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"worker{'' if len(ranks) == 1 else 's'} {shown}"


def _resize(e: dict[str, Any]) -> str:
    saved = f", saved{_in(e)} before" if e["saved"] else ", without a checkpoint before"
    return f"goes from {counted(e['before'], 'worker')} to {e['after']}{saved}"


def _end(e: dict[str, Any]) -> str:
    told = [f"loss {e['loss']:.4f}"] if e.get("loss") is not None else []
    if e.get("validation_loss") is not None:
        told.append(f"validation loss {e['validation_loss']:.4f}")
    if e.get("validation_bits_per_byte") is not None:
        told.append(f"{e['validation_bits_per_byte']:.4f} bits per byte")
    return "finished" + (f": {', '.join(told)}" if told else "")


_SENTENCES: dict[str, Callable[[dict[str, Any]], str]] = {
    "start": _start,
    "resume": _resume,
    "checkpoint": _checkpoint,
    "checkpoint_failed": lambda e: (
        f"the checkpoint of step {e['step']:,} could not be written, training goes on: {e['error']}"
    ),
    "corrupt_checkpoint": lambda e: (
        f"the checkpoint of step {e['checkpoint_step']:,} is damaged and passed over ({e['folder']})"
    ),
    "outlier": _outlier,
    "spike": lambda e: f"{e['reason']}{_beside_median(e)}, since data step {e['data_step']:,}",
    "rollback": _rollback,
    "interrupt": _interrupt,
    "preemption": _preemption,
    "preempted": lambda e: f"the announced node is gone, and {_workers(e['ranks'])} with it",
    "resize": _resize,
    "waiting_for_nodes": lambda e: "waits for nodes" + (f": {e['error']}" if e.get("error") else ""),
    "worker_failure": lambda e: f"lost {_workers(e['ranks'])}: {e['error']}",
    "controller_failure": lambda e: f"lost Ray Train's controller: {e['error']}",
    "validation_failed": lambda e: f"the checkpoint of step {e['step']:,} could not be measured: {e['error']}",
    "scores": lambda e: f"scored {', '.join(f'{name} {score:.4f}' for name, score in e['scores'].items())}",
    "end": _end,
    "stop": lambda e: f"stopped: {e['diagnosis']}",
}
