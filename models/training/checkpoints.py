"""Sharded checkpoints and the ledger that says which of them can be trusted.

Weights and optimizer state are written by ``torch.distributed.checkpoint``, every rank its own shards, straight to
their place; ``checkpoint.json``, written last with sizes and checksums, makes the folder a checkpoint. The ledger is
the one truth about a run: whoever starts or goes back reads it, and it is written before anything that relies on it.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from models.training.state import RunFolder

Status = Literal["pending", "clean", "poisoned", "corrupt"]

LEDGER = "ledger.json"
RECEIPT = "checkpoint.json"


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


@dataclass
class Ledger:
    """All checkpoints of a run by step, the data steps to skip, and the steps at which it went back."""

    entries: list[Entry] = field(default_factory=list)
    skips: list[list[int]] = field(default_factory=list)
    rollbacks: list[int] = field(default_factory=list)

    @classmethod
    def from_dict(cls, value: dict[str, Any] | None) -> Ledger:
        """The ledger of ``ledger.json``'s content; an empty one of None."""
        if value is None:
            return cls()
        return cls([Entry(**entry) for entry in value["checkpoints"]], value["skips"], value["rollback_steps"])

    def to_dict(self) -> dict[str, Any]:
        """Content of ``ledger.json``."""
        return {
            "checkpoints": [asdict(entry) for entry in self.entries],
            "skips": self.skips,
            "rollbacks": len(self.rollbacks),
            "rollback_steps": self.rollbacks,
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

    def expire(self, keep: int) -> list[Entry]:
        """Mark as deleted all but the ``keep`` newest usable checkpoints and the newest clean one; returns those."""
        usable = list(self.usable())
        kept = usable[:keep] + [e for e in usable if e.status == "clean"][:1]
        expired = [e for e in self.entries if e not in kept and not e.deleted]
        for entry in expired:
            entry.deleted = True
        return expired


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def save(
    run: RunFolder, folder: str, model: nn.Module, optimizer: torch.optim.Optimizer, facts: dict[str, Any]
) -> None:
    """Write a checkpoint; a collective of all ranks. ``facts`` (JSON) come back from ``load``."""
    rank, world = rank_and_world()
    if rank == 0:
        run.delete(folder)  # what an attempt that was killed may have left
    barrier()
    with _alone():
        dcp.save(_states(model, optimizer), checkpoint_id=run.uri(folder))
    barrier()
    sums = _gather(run.checksums(folder, rank, world))
    if rank == 0:
        run.write_json(f"{folder}/{RECEIPT}", {**facts, "files": sums, "world_size": world})
    barrier()


def load(run: RunFolder, folder: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Read a checkpoint into model and optimizer, at any number of ranks; a collective of all of them.

    Returns:
        The facts given to ``save``, or None when the checkpoint is torn or was changed since; then nothing was loaded.
    """
    rank, world = rank_and_world()
    receipt = run.read_json(f"{folder}/{RECEIPT}")
    if receipt is None:
        return None
    if _gather(_files(run, folder, rank, world)) != receipt["files"]:
        return None
    state = _states(model, optimizer)
    with _alone():
        dcp.load(state, checkpoint_id=run.uri(folder))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return receipt


def load_weights(run: RunFolder, folder: str, model: nn.Module) -> None:
    """Read a checkpoint's weights alone, into a model that is not sharded.

    Raises:
        FileNotFoundError: the folder is not a finished checkpoint.
        ValueError: it was changed since it was written.
    """
    receipt = run.read_json(f"{folder}/{RECEIPT}")
    if receipt is None:
        raise FileNotFoundError(f"{run.uri(folder)}: not a finished checkpoint (it has no {RECEIPT})")
    if _files(run, folder, 0, 1) != receipt["files"]:
        raise ValueError(f"{run.uri(folder)}: its files are not those that were written; take another checkpoint")
    weights = model.state_dict()
    with _alone():
        dcp.load({"model": weights}, checkpoint_id=run.uri(folder), no_dist=True)
    model.load_state_dict(weights)


def _files(run: RunFolder, folder: str, part: int, of: int) -> dict[str, list]:
    """Size and hash of a share of a checkpoint's files, all but the receipt that lists them."""
    return {name: value for name, value in run.checksums(folder, part, of).items() if name != RECEIPT}


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and optimizer state as ``torch.distributed.checkpoint`` wants them, shards included."""
    fresh = not optimizer.state
    weights, moments = get_state_dict(model, optimizer)
    if fresh:
        # It makes the state of an optimizer that has none by a step of length 0, which must not count as one: it would
        # shift the bias correction of all that follow.
        for state in optimizer.state.values():
            state["step"].zero_()
        weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Without the warning that a process without a group saves or loads alone: here it is meant to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _gather(mine: dict[str, Any]) -> dict[str, Any]:
    """The ranks' dictionaries as one, on every rank, sorted."""
    shares = [mine]
    if dist.is_initialized():
        shares = [None] * dist.get_world_size()
        dist.all_gather_object(shares, mine)
    return dict(sorted(item for share in shares for item in share.items()))
