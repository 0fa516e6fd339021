"""The ledger of a run: which checkpoints there are, which of them can be trusted, and which data is left out for good.

It is the one truth about a run: whoever starts or goes back reads it, and it is written before anything relies on it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["pending", "clean", "poisoned", "corrupt"]

LEDGER = "ledger.json"


@dataclass
class Entry:
    """One checkpoint: where the run stood, whether the steps after it went well, whether its folder still exists."""

    step: int
    data_step: int
    tokens: int
    loss: float | None
    folder: str
    status: Status = "pending"
    deleted: bool = False
    time: float = field(default_factory=time.time)
    validation_loss: float | None = None


@dataclass
class Ledger:
    """All checkpoints of a run by step, the data steps to skip, and the steps at which it went back.

    Attributes:
        entries: checkpoints, sorted by step.
        skips: half-open ranges of data steps, sorted.
        rollbacks: steps at which the run went back.
        rolled_back_to: the step that the last rollback went back to, None before the first.
    """

    entries: list[Entry] = field(default_factory=list)
    skips: list[list[int]] = field(default_factory=list)
    rollbacks: list[int] = field(default_factory=list)
    rolled_back_to: int | None = None

    @classmethod
    def from_dict(cls, value: dict[str, Any] | None) -> Ledger:
        """The ledger of ``ledger.json``'s content; an empty one of None."""
        if value is None:
            return cls()
        entries = [Entry(**entry) for entry in value["checkpoints"]]
        return cls(entries, value["skips"], value["rollback_steps"], value.get("rolled_back_to"))

    def to_dict(self) -> dict[str, Any]:
        """Content of ``ledger.json``."""
        return {
            "checkpoints": [asdict(entry) for entry in self.entries],
            "skips": self.skips,
            "rollbacks": len(self.rollbacks),
            "rollback_steps": self.rollbacks,
            "rolled_back_to": self.rolled_back_to,
        }

    def add(self, entry: Entry) -> None:
        """Add a checkpoint; one of the same step, left by an undone attempt, gives way."""
        self.entries = sorted([e for e in self.entries if e.step != entry.step] + [entry], key=lambda e: e.step)

    def usable(self) -> Iterator[Entry]:
        """Checkpoints to resume from after a crash, newest first: clean ones and those not yet proven."""
        return (e for e in reversed(self.entries) if e.status in ("clean", "pending") and not e.deleted)

    def clean_before(self, data_step: int) -> Iterator[Entry]:
        """Checkpoints to go back to when data from ``data_step`` on is bad, newest first."""
        return (e for e in self.usable() if e.status == "clean" and e.data_step <= data_step)

    def mark_clean(self, step: int, clean_after: int) -> bool:
        """Call clean what has stood ``clean_after`` steps by ``step``; True when that changed something."""
        ripe = [e for e in self.entries if e.status == "pending" and e.step + clean_after <= step]
        for entry in ripe:
            entry.status = "clean"
        return bool(ripe)

    def poison_after(self, step: int) -> None:
        """Mark every checkpoint after ``step`` as holding weights that met bad data."""
        for entry in self.entries:
            if entry.step > step and entry.status != "corrupt":
                entry.status = "poisoned"

    def expire(self, keep: int, every: int | None = None, best: bool = False) -> list[Entry]:
        """Mark as deleted what no rule keeps; returns those checkpoints.

        Args:
            keep: newest usable checkpoints that stay; the newest clean one stays too.
            every: usable checkpoints of steps that this divides stay for good; None keeps none for that.
            best: the usable checkpoint with the lowest validation loss stays too.
        """
        usable = list(self.usable())
        kept = usable[:keep] + [e for e in usable if e.status == "clean"][:1]
        if every is not None:
            kept += [e for e in usable if e.step > 0 and e.step % every == 0]
        measured = [e for e in usable if e.validation_loss is not None]
        if best and measured:
            kept.append(min(measured, key=lambda e: e.validation_loss))
        expired = [e for e in self.entries if e not in kept and not e.deleted]
        for entry in expired:
            entry.deleted = True
        return expired
