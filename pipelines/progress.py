"""How far a stage is: documents, bytes, and the time that is left, in log lines a few seconds apart.

Where Ray runs its dashboard has it too: counters ``ingot_stage_<quantity>`` with the tag ``stage``, which Ray exports
to Prometheus as ``ray_ingot_stage_<quantity>_total``; rates, such as documents per second, are Prometheus' to make.
"""

from __future__ import annotations

import functools
import logging
import sys
import time
from typing import Any

log = logging.getLogger("ingot")

_SHOW_EVERY = 1.0  # seconds between two additions to the counters while units run


class Progress:
    """Counts what the units of a stage have done and tells it now and then.

    Time left comes from the bytes that the units are expected to read; where a unit is compressed that is a guess,
    which the units that are done put right.

    Args:
        name: of the stage.
        sizes: bytes that each unit is expected to read, by its name; those that were done before are left out.
        done: units that an earlier run did.
        every: seconds between two lines.
    """

    def __init__(self, name: str, sizes: dict[str, int], done: int = 0, every: float = 5.0) -> None:
        self.name, self.sizes, self.every = name, {unit: max(size, 1) for unit, size in sizes.items()}, every
        self.before, self.total = done, done + len(sizes)
        self.running: dict[str, tuple[int, int]] = {}
        self.finished: dict[str, tuple[int, int]] = {}
        self.started = self.last = time.monotonic()
        self.shown, self.counted = self.started, (0, 0, 0)
        _count(name, units=self.total, units_done=done)

    def step(self, unit: str, documents: int, size: int, *, finished: bool) -> None:
        """A unit has read so many documents and bytes up to now, or in all."""
        if finished:
            self.running.pop(unit, None)
            self.finished[unit] = documents, size
        elif unit not in self.finished:
            self.running[unit] = documents, size
        now = time.monotonic()
        if now - self.last >= self.every and len(self.finished) < len(self.sizes):
            self.last = now
            left = self.seconds_left(now)
            told = "" if left is None else f", {_duration(left)} left"
            done = self.before + len(self.finished)
            log.info("%s: %d of %d units, %s%s", self.name, done, self.total, self._rate(now), told)
        if now - self.shown >= _SHOW_EVERY or len(self.finished) == len(self.sizes):
            self.shown = now
            self._show()

    def seconds_left(self, now: float) -> float | None:
        """Seconds until all units are done, None before anything is, or while nothing tells how much there is."""
        if not self.finished and sum(size for _, size in self.running.values()) > sum(self.sizes.values()):
            return None
        expected = sum(self.sizes[unit] for unit in self.finished)
        read = sum(size for _, size in self.finished.values())
        scale = read / expected if read else 1.0
        total = read + scale * sum(size for unit, size in self.sizes.items() if unit not in self.finished)
        # A unit that reads more than was expected is taken to be nearly done.
        read += sum(min(size, 0.95 * scale * self.sizes[unit]) for unit, (_, size) in self.running.items())
        return (now - self.started) * (total - read) / read if read else None

    def _seen(self) -> tuple[int, int]:
        """Documents and bytes up to now."""
        seen = [*self.finished.values(), *self.running.values()]
        return sum(count for count, _ in seen), sum(size for _, size in seen)

    def _show(self) -> None:
        """Tell Ray's metrics what is new."""
        before, now = self.counted, (*self._seen(), len(self.finished))
        self.counted = tuple(map(max, before, now))  # what a lost worker has read is read again
        documents, size, units = (now - then for now, then in zip(self.counted, before, strict=True))
        _count(self.name, documents=documents, bytes=size, units_done=units)

    def _rate(self, now: float) -> str:
        documents, size = self._seen()
        seconds = max(now - self.started, 1e-9)
        return f"{documents:,} documents, {size / 1e6:,.1f} MB, {size / 1e6 / seconds:.2f} MB/s"

    def finish(self, summary: str) -> None:
        """The stage is done."""
        now = time.monotonic()
        log.info("%s: done in %.1f s, %s; %s", self.name, now - self.started, summary, self._rate(now))


def _count(stage: str, **more: int) -> None:
    """Add to the stage's counters, where there is a Ray to tell."""
    if (ray := sys.modules.get("ray")) is None or not ray.is_initialized():
        return
    for name, value in more.items():
        if value:
            _counter(name).inc(value, tags={"stage": stage})


@functools.cache
def _counter(name: str) -> Any:
    from ray.util.metrics import Counter

    told = f"{name.replace('_', ' ')} of a stage of the pipelines"
    return Counter(f"ingot_stage_{name}", description=told, tag_keys=("stage",))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
