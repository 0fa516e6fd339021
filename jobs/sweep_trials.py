"""What a sweep remembers of its trials: one line in ``trials.jsonl`` for each thing that happened.

It is the one truth about a sweep, written before anything relies on it. A sweep that was killed is put together again
from it: which settings were tried, how far each got, and from them the state of every search and scheduler.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from jobs.run_folder import StoredRun
from jobs.sweep_space import Settings

METRIC = "validation_loss"
FILE = "trials.jsonl"

State = Literal["running", "waiting", "finished", "stopped", "diverged", "failed"]
"""waiting: a stretch of it is done and it will go on; stopped: by the scheduler; diverged: by its loss; failed: by an
error, which is no fault of its settings."""


@dataclass
class Stretch:
    """Steps that a trial trains in one go with the same settings; only PBT has more than one of them.

    Attributes:
        start: step before its first.
        end: its last step.
        settings: by their dotted names.
        parent: the trial whose weights it starts from; None starts anew.
    """

    start: int
    end: int
    settings: Settings
    parent: str | None = None


@dataclass
class Trial:
    """One trial.

    Attributes:
        name: its number, and that of its folder.
        stretches: what it trains; the last is the one it is at.
        state: how it stands.
        losses: validation losses by step; infinite where it was not a number.
        seconds: for which it has held what it trains on.
        error: why it failed or diverged.
    """

    name: str
    stretches: list[Stretch]
    state: State = "running"
    losses: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    error: str = ""

    @property
    def settings(self) -> Settings:
        """Those of now."""
        return self.stretches[-1].settings

    @property
    def step(self) -> int:
        """The last step that was measured."""
        return max(self.losses, default=0)

    @property
    def loss(self) -> float:
        """There."""
        return self.losses[self.step] if self.losses else math.inf


class Trials:
    """All trials of a sweep, in the order in which they were drawn.

    Args:
        folder: of the sweep.

    Attributes:
        all: by name.
        told: trial, step and loss of each result in the order of their time.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.all: dict[str, Trial] = {}
        self.told: list[tuple[str, int, float]] = []
        for event in StoredRun(folder).lines(FILE):
            self._apply(event)

    def begin(self, stretch: Stretch, name: str | None = None) -> Trial:
        """Add a trial, or a stretch to the one of that name."""
        name = name or f"{len(self.all):03d}"
        self._add("begin", name, **vars(stretch))
        return self.all[name]

    def again(self, name: str) -> Trial:
        """Try a trial that failed once more."""
        self._add("again", name)
        return self.all[name]

    def result(self, name: str, step: int, loss: float, seconds: float) -> None:
        """Take down a validation loss, and for how many seconds the trial has trained since the last event."""
        if step not in self.all[name].losses:  # a trial that goes on after a kill tells all from its beginning
            self._add("result", name, step=step, loss=loss if math.isfinite(loss) else None, seconds=round(seconds, 3))

    def end(self, name: str, state: State, seconds: float, error: str = "") -> None:
        """Take down that a trial, or its stretch, is over."""
        self._add("end", name, state=state, error=error, seconds=round(seconds, 3))

    def ranked(self) -> list[Trial]:
        """Those with a loss; the furthest and best first."""
        measured = [trial for trial in self.all.values() if math.isfinite(trial.loss)]
        return sorted(measured, key=lambda trial: (-trial.step, trial.loss))

    def hours(self) -> float:
        """For which trials have trained."""
        return sum(trial.seconds for trial in self.all.values()) / 3600

    def count(self, *states: State) -> int:
        """Trials in one of these states."""
        return sum(trial.state in states for trial in self.all.values())

    def run_folder(self, trial: Trial, stretch: int = -1) -> str:
        """Where a stretch of a trial trains, within the sweep's folder."""
        place = range(len(trial.stretches))[stretch]
        return f"trials/{trial.name}" if place == 0 else f"trials/{trial.name}/{place}"

    def _add(self, kind: str, name: str, **facts: Any) -> None:
        event = {"time": time.time(), "event": kind, "trial": name, **facts}
        StoredRun(self.folder).append_line(FILE, json.dumps(event))
        self._apply(event)

    def _apply(self, event: dict[str, Any]) -> None:
        name, kind = event["trial"], event["event"]
        if kind == "begin":
            stretch = Stretch(event["start"], event["end"], event["settings"], event["parent"])
            if name in self.all:
                self.all[name].stretches.append(stretch)
                self.all[name].state = "running"
            else:
                self.all[name] = Trial(name, [stretch])
            return
        trial = self.all[name]
        trial.seconds += event.get("seconds", 0.0)
        if kind == "again":
            trial.state, trial.error = "running", ""
        elif kind == "result":
            loss = math.inf if event["loss"] is None else event["loss"]
            trial.losses[event["step"]] = loss
            self.told.append((name, event["step"], loss))
        elif kind == "end":
            trial.state, trial.error = event["state"], event["error"]
