"""The events of a run: what happened beside its steps, a line each in ``events.jsonl``, told by rank 0."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from models.training.run_folder import RunFolder, patiently
from models.training.state import TrainState

log = logging.getLogger("ingot")

EVENTS = "events.jsonl"


class Events:
    """Tells events in their order; while storage fails they wait, and training does not.

    Args:
        run: the run's folder.
        state: whose step events bear that name none of their own.
        rank: this process's rank; all but the first stay silent.
    """

    def __init__(self, run: RunFolder, state: TrainState, rank: int) -> None:
        self.run, self.state, self.rank = run, state, rank
        self.lines: list[str] = []  # that storage did not take yet

    def add(self, event: str, **facts: Any) -> None:
        """An event of this moment, with facts as JSON."""
        if self.rank == 0:
            self.lines.append(json.dumps({"time": time.time(), "event": event, "step": self.state.step, **facts}))
            self.tell()

    def tell(self) -> None:
        """Write those that are not on storage yet; where it fails they wait for the next time."""
        try:
            while self.lines:
                self.run.append_line(EVENTS, self.lines[0])
                del self.lines[0]
        except OSError as error:
            log.warning("%s: %s; %d events wait", self.run.uri(EVENTS), error, len(self.lines))

    def tell_at_last(self) -> None:
        """Wait for a storage that fails: after this nobody is left to tell the events.

        Raises:
            OSError: it failed to the end.
        """
        while self.lines:
            patiently(self.run.append_line, EVENTS, self.lines[0])
            del self.lines[0]
