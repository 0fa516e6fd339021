"""A run while it lives, from the files that its workers write: lines in the log of whoever started it, and its page."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time

from jobs.events import QUIET, sentence
from jobs.report import RunPage
from jobs.run_folder import StoredRun
from jobs.settings import PretrainJob

log = logging.getLogger("ingot")

_DRAWING_SHARE = 0.02  # of the time, at most, goes into drawing the page, however long the run gets

_SAMPLES_AT_ONCE = 1_000_000  # looked up for the mixture in one drawing: half a second of work


class Progress(threading.Thread):
    """A thread that logs a line every few seconds and the run's events as they come, and draws the run's page.

    The page is drawn anew every ``report_every`` seconds of the settings and after events. Nothing that goes wrong
    here, such as a storage that fails, is of consequence for the run.
    """

    def __init__(self, folder: StoredRun, settings: PretrainJob, every: float = 5.0) -> None:
        super().__init__(daemon=True, name="progress")
        self.folder, self.settings, self.every = folder, settings, every
        self.stopped = threading.Event()
        self.events_seen = len(folder.events())
        self.last_step = max((row["step"] for row in folder.newest_metrics()[-1:]), default=-1)
        self.held_out = ""
        self.page = RunPage(settings.workspace, folder, settings.name) if settings.report_every > 0 else None
        self.due = 0.0  # when to draw the page next, by the monotonic clock
        self.rested = 0.0  # until when not to, whatever happens
        self.page_fails = False

    def stop(self) -> None:
        """Tell what is left to tell, draw the page as it stays, and end."""
        self.stopped.set()
        if self.is_alive():
            self.join(timeout=60)

    def run(self) -> None:
        """Tell and draw until stopped."""
        with contextlib.suppress(OSError, AttributeError):  # no such thing but on Linux, where it is of this thread
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        while not self.stopped.wait(self.every):
            happened = self._tell()
            now = time.monotonic()
            if self.page is not None and now >= self.rested and (happened or now >= self.due):
                self._draw(again=self.settings.report_every)
        self._tell()
        if self.page is not None:
            self._draw(again=None)

    def _draw(self, again: float | None) -> None:
        began = time.monotonic()
        try:
            self.page.write(again, most=_SAMPLES_AT_ONCE)
            self.page_fails = False
        except Exception as error:
            if not self.page_fails:
                log.warning("pretrain: the run's page could not be drawn, which is tried again: %s", error)
            self.page_fails = True
        now = time.monotonic()
        self.rested = now + (now - began) / _DRAWING_SHARE
        self.due = max(began + self.settings.report_every, self.rested)

    def _tell(self) -> bool:
        """Log what is new; True when events are."""
        try:
            events = self.folder.events()
            rows = self.folder.newest_metrics()
        except (OSError, ValueError):  # storage is slow or away: the next turn tells it
            return False
        new = events[self.events_seen :]
        for event in new:
            if event["event"] not in ("start", *QUIET):
                step = "" if event.get("step") is None else f"step {event['step']:,}: "
                log.info("pretrain: %s%s", step, sentence(event))
        self.events_seen = len(events)
        if any(row.get("loss") is not None for row in rows) and rows[-1]["step"] != self.last_step:
            self._tell_step(rows)
        return bool(new)

    def _tell_step(self, rows: list[dict]) -> None:
        row = next(row for row in reversed(rows) if row.get("loss") is not None)
        self.last_step = rows[-1]["step"]
        speed = row["tokens_per_second"]
        left = (self.settings.steps - row["step"]) * self.settings.global_batch * self.settings.length() / speed
        mfu = f", MFU {row['mfu']:.1%}" if row["mfu"] else ""
        losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
        self.held_out = f", validation {losses[-1]:.3f}" if losses else self.held_out
        log.info(
            "pretrain: step %d/%d, loss %.3f%s, lr %.2e, gradient norm %.2f, %s tokens/s%s, %s left",
            row["step"],
            self.settings.steps,
            row["loss"],
            self.held_out,
            row["lr"],
            row["grad_norm"] if row["grad_norm"] is not None else float("nan"),
            f"{speed:,.0f}",
            mfu,
            time.strftime("%H:%M:%S", time.gmtime(left)),
        )
