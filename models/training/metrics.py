"""A run's numbers: to files in its folder and to whatever else wants them; and what the hardware could do at most."""

from __future__ import annotations

import json
import logging
import math
import queue
import threading
import time
from collections.abc import Iterable
from typing import Any, Protocol

import torch

from models.training.run_folder import RunFolder

log = logging.getLogger("ingot")

# Dense bf16 peak in FLOP/s by the vendors' data sheets; the name is matched as a part of the device's own.
PEAK_FLOPS = {
    "H200": 989.5e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.5e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "V100": 125e12,
}

_SEGMENT = 1000  # rows in a file; the file is written anew at each flush, which works on object stores too
_PATIENCE = 20  # rows in a row that a sink may fail at before it gets no more
_CLOSING_SECONDS = 30.0  # that sinks have for what they still hold


def peak_flops(device: torch.device) -> float | None:
    """Peak of the device in FLOP/s, or None when it is not known (any CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


class Sink(Protocol):
    """Something that wants a run's numbers beside the files, such as a dashboard; called by one thread only."""

    def write(self, row: dict[str, Any]) -> None:
        """Take a row: ``step``, ``time`` (Unix seconds), and numbers by name, some of which may be None."""

    def flush(self) -> None:
        """Pass on what is held back."""

    def close(self) -> None:
        """Pass on what is held back, and end; no row follows."""


class MetricsWriter:
    """Writes a run's metrics from rank 0: ``metrics/*.jsonl``, one object a line, and to sinks.

    A step that was undone by a rollback or a crash stays in the files; a row with ``undone_after`` says that the rows
    before it count only up to that step.

    Training neither waits for a row nor fails because of one: files and sinks have a thread each. What a storage that
    fails does not take is kept and tried again every ``every`` seconds. A sink that fails time and again is left out,
    with a warning.

    Args:
        run: the run's folder.
        sinks: what else gets every row; they belong to the writer from now on.
        every: seconds between two writes to storage, and between two flushes of the sinks.
    """

    def __init__(self, run: RunFolder, sinks: Iterable[Sink] = (), every: float = 2.0) -> None:
        self.run, self.every = run, every
        self._rows: list[str] = []
        self._stored = 0  # how many of them, from the first on, are on storage
        self._segment = self._new_segment()
        self._failing = False
        self._lock = threading.Lock()  # of the four above
        self._writing = threading.Lock()  # held while storage is written to
        self._closed = threading.Event()
        threading.Thread(target=self._store_now_and_then, daemon=True, name="metrics").start()
        self._queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        sinks = list(sinks)
        self._feeder = threading.Thread(target=self._feed, args=(sinks,), daemon=True, name="metrics sinks")
        if sinks:
            self._feeder.start()

    @staticmethod
    def _new_segment() -> str:
        return f"metrics/{time.time_ns()}.jsonl"

    def write(self, row: dict[str, Any]) -> None:
        """Add a row; it has a ``step``, and gets the ``time``. Numbers that are not finite become None."""
        row = {**{name: _plain(value) for name, value in row.items()}, "time": time.time()}
        line = json.dumps(row)
        with self._lock:
            self._rows.append(line)
        if self._feeder.is_alive():
            self._queue.put(row)

    def flush(self) -> bool:
        """Write what is not on storage yet; False when storage fails, and the rows are kept for the next time."""
        with self._writing:
            with self._lock:
                rows, segment = self._rows.copy(), self._segment
                if len(rows) == self._stored:
                    return True
            try:
                self.run.write_text(segment, "\n".join(rows) + "\n")
            except Exception as error:  # whatever it is, it is no reason to stop training
                if not self._failing:
                    log.warning("metrics: %s cannot be written, its rows are kept: %s", self.run.uri(segment), error)
                self._failing = True
                return False
            if self._failing:
                log.info("metrics: %s is written again, %d rows were kept", self.run.uri(segment), len(rows))
            self._failing = False
            with self._lock:
                self._stored = len(rows)
                if self._stored >= _SEGMENT:
                    del self._rows[: self._stored]
                    self._stored, self._segment = 0, self._new_segment()
            return True

    def close(self) -> None:
        """Write what is left, close the sinks and end the threads; the writer takes no more rows."""
        self._closed.set()
        self.flush()
        if self._feeder.is_alive():
            self._queue.put(None)
            self._feeder.join(_CLOSING_SECONDS)
            if self._feeder.is_alive():
                log.warning("metrics: sinks did not take all rows in %.0f s; the files have them", _CLOSING_SECONDS)

    def _store_now_and_then(self) -> None:
        while not self._closed.wait(self.every):
            self.flush()

    def _feed(self, sinks: list[Sink]) -> None:
        """Hand rows on until there are no more."""
        failures: dict[int, int] = {}

        def call(sink: Sink, method: str, *args: Any) -> None:
            try:
                getattr(sink, method)(*args)
            except Exception as error:
                count = failures[id(sink)] = failures.get(id(sink), 0) + 1
                name = type(sink).__name__
                if count == 1:
                    log.warning("metrics: %s failed: %s", name, error)
                elif count == _PATIENCE:
                    log.warning("metrics: %s gets no more rows, it failed %d times in a row: %s", name, count, error)
                    sinks.remove(sink)
            else:
                failures.pop(id(sink), None)

        flushed = time.monotonic()
        while True:
            try:
                row = self._queue.get(timeout=self.every)
            except queue.Empty:
                row = {}
            if row is None:
                break
            if row:
                for sink in list(sinks):
                    call(sink, "write", row)
            if time.monotonic() - flushed >= self.every:
                for sink in list(sinks):
                    call(sink, "flush")
                flushed = time.monotonic()
        for sink in list(sinks):
            call(sink, "close")


def _plain(value: Any) -> Any:
    """JSON has no infinities."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
