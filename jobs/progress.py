"""A run's progress in the log of whoever started it, from the files that the workers write."""

from __future__ import annotations

import json
import logging
import threading
import time

from jobs.run_folder import StoredRun
from jobs.settings import PretrainJob

log = logging.getLogger("ingot")


class Progress(threading.Thread):
    """A thread that logs a line every few seconds, and the run's events as they come."""

    def __init__(self, folder: StoredRun, settings: PretrainJob, every: float = 5.0) -> None:
        super().__init__(daemon=True, name="progress")
        self.folder, self.settings, self.every = folder, settings, every
        self.stopped = threading.Event()
        self.events_seen = len(folder.events())
        self.last_step = max((row["step"] for row in folder.newest_metrics()[-1:]), default=-1)
        self.held_out = ""

    def stop(self) -> None:
        """Tell what is left to tell and end."""
        self.stopped.set()
        if self.is_alive():
            self.join(timeout=30)

    def run(self) -> None:
        """Tell until stopped."""
        while not self.stopped.wait(self.every):
            self._tell()
        self._tell()

    def _tell(self) -> None:
        try:
            events = self.folder.events()
            rows = self.folder.newest_metrics()
        except (OSError, ValueError):  # storage is slow or away: the next turn tells it
            return
        for event in events[self.events_seen :]:
            if event["event"] not in ("start", "checkpoint"):
                facts = {k: v for k, v in event.items() if k not in ("time", "event", "documents")}
                log.info("pretrain: %s %s", event["event"], json.dumps(facts))
        self.events_seen = len(events)
        if all(row.get("loss") is None for row in rows) or rows[-1]["step"] == self.last_step:
            return
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
