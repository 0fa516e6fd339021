"""What lets a run go on: its checkpoints and their ledger, the resume at a start, the way back from a spike.

All ranks call the same methods in the same order. The ledger is written before anything relies on it, so that a crash
at any point finds what was decided.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from models.training.checkpoints import rank_and_world
from models.training.events import Events
from models.training.ledger import LEDGER, Entry, Ledger, Status
from models.training.metrics import MetricsWriter
from models.training.run_folder import RunFolder, patiently
from models.training.snapshots import Checkpointer, Written
from models.training.spikes import SpikeDetector, Verdict
from models.training.state import Losses, TrainingStoppedError, TrainState

if TYPE_CHECKING:
    from models.training.loop import LoopConfig

log = logging.getLogger("ingot")

WORST_SAMPLES = 5
"""How many the event of a rollback names."""


class Spike(NamedTuple):
    """Why the run has to go back, and the step that showed it."""

    step: int
    data_steps: list[int]
    loss: float
    verdict: Verdict


class Recovery:
    """What a run must not lose, and how it comes back to it.

    Args:
        model: built and sharded.
        optimizer: over its parameters.
        config: of the loop.
        run: the run's folder.
        report: called by all ranks with metrics and a pointer (JSON) to a durable checkpoint.
        device: where the model is.
        metrics: where the numbers go; rank 0 alone has it.
        worst: this rank's samples with the highest losses between two data steps, at most so many: their losses, data
            steps, and places in the global batch.
        documents: what stands in samples, given as (data step, place); called by rank 0 alone.
        resume_cause: what to call a resume in the events.

    Attributes:
        state: where the run stands.
        detector: of spikes.
        losses: the newest.
        ledger: which checkpoints there are.
        events: of the run.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: LoopConfig,
        *,
        run: RunFolder,
        report: Callable[[dict[str, Any], dict[str, Any] | None], None],
        device: torch.device,
        metrics: MetricsWriter | None,
        worst: Callable[[int, int, int], list[tuple[float, int, int]]],
        documents: Callable[[list[tuple[int, int]]], list[dict[str, Any]]] | None,
        resume_cause: str,
    ) -> None:
        self.optimizer, self.config, self.run, self.report = optimizer, config, run, report
        self.metrics, self.worst, self.documents, self.resume_cause = metrics, worst, documents, resume_cause
        self.rank, self.world = rank_and_world()
        self.state, self.detector, self.losses = TrainState(), SpikeDetector(config.spikes), Losses()
        self.ledger, self.events = Ledger(), Events(run, self.state, self.rank)
        self.checkpoints = Checkpointer(
            run,
            model,
            optimizer,
            device,
            snapshots=config.host_snapshots,
            background=config.async_checkpoints,
        )

    # Checkpoints

    def save(self, status: Status = "pending") -> None:
        """Begin a checkpoint of this step, unless there is one; the one before is waited for."""
        self.commit()
        if self.saved():
            return
        validation = self.losses.validation if self.losses.validated_at == self.state.step else {}
        facts = {
            "state": self.state.state_dict(),
            "detector": self.detector.state_dict(),
            "loss": self.losses.training,
            "status": status,
            "validation": validation,
        }
        self.checkpoints.begin(self.state.step, f"checkpoints/step-{self.state.step:08d}", facts)
        if not self.checkpoints.background:
            self.commit()

    def saved(self) -> bool:
        """Whether there is a checkpoint of this step."""
        return any(entry.step == self.state.step for entry in self.ledger.usable())

    def commit(self) -> None:
        """Enter the checkpoint that was begun into the ledger, once every rank has written its part."""
        written = self.checkpoints.collect()
        if written is None:
            return
        times = {"pause": round(written.pause, 4), "write": round(written.seconds, 3)}
        if written.error is not None:
            log.warning("step %d: the checkpoint was not written: %s", written.step, written.error)
            self.events.add("checkpoint_failed", step=written.step, folder=written.folder, error=written.error, **times)
            return
        if self._undone(written):
            if self.rank == 0:
                self._delete(written.folder)
            return
        state = TrainState.from_dict(written.facts["state"])
        self.ledger.add(
            Entry(
                state.step,
                state.data_step,
                state.tokens,
                written.facts["loss"],
                written.folder,
                written.facts["status"],
                validation_loss=written.facts["validation"].get("validation_loss"),
            )
        )
        expired = self.ledger.expire(self.config.keep_checkpoints, self.config.keep_every, self.config.keep_best)
        if self.metrics is not None:
            self.metrics.flush()
        self._write_ledger()
        if self.rank == 0:
            for entry in expired:
                self._delete(entry.folder)
        self.events.add("checkpoint", step=written.step, folder=written.folder, **times)
        # Its own: there may have been another one while it was written.
        self._report(written.folder, written.step, written.facts["loss"], written.facts["validation"])

    def mark_clean(self) -> None:
        """Call clean the checkpoints that have stood long enough by this step."""
        if self.ledger.mark_clean(self.state.step, self.config.clean_after):
            self._write_ledger()

    def finish(self) -> None:
        """Save the last step; all usable checkpoints are clean then, as no step follows that could show otherwise.

        Raises:
            OSError: it could not be saved.
        """
        before = next((entry for entry in self.ledger.usable() if entry.step == self.state.step), None)
        self.save()
        self.commit()
        if not self.saved():
            raise OSError(
                f"{self.run.uri('checkpoints')}: the last checkpoint, of step {self.state.step}, was not written"
            )
        if before is not None:  # an attempt that was killed at the very end may not have come to that
            self._report(before.folder, before.step, self.losses.training, self.losses.validation)
        for entry in self.ledger.usable():
            entry.status = "clean"
        self._write_ledger()

    def _undone(self, written: Written) -> bool:
        """Whether the run went back to before a checkpoint while it was written."""
        return written.facts["state"]["skips"] != self.ledger.skips

    def _delete(self, folder: str) -> None:
        with contextlib.suppress(OSError):  # the next start deletes what the ledger calls deleted
            self.run.delete(folder)

    def _report(self, folder: str, step: int, loss: float | None, validation: dict[str, float]) -> None:
        metrics = {"step": step, "loss": loss, **validation}
        self.report(metrics, {"folder": folder, "skips": self.ledger.skips, **metrics})

    def _write_ledger(self) -> None:
        if self.rank == 0:
            patiently(self.run.write_json, LEDGER, self.ledger.to_dict())

    # Start

    def resume(self) -> bool:
        """Go on from the newest usable checkpoint; False when there is none, and the run begins."""
        content = [self.run.read_json(LEDGER) if self.rank == 0 else None]
        if dist.is_initialized():
            dist.broadcast_object_list(content, src=0)
        self.ledger = Ledger.from_dict(content[0])
        if self.rank == 0:
            for entry in self.ledger.entries:
                if entry.deleted:  # a kill between the ledger and the deletion may have left it
                    self._delete(entry.folder)
        for entry in list(self.ledger.usable()):
            began = time.perf_counter()
            if self._restore(self.checkpoints.load(entry.folder)):
                if self.config.host_snapshots:
                    facts = {"state": self.state.state_dict(), "detector": self.detector.state_dict()}
                    self.checkpoints.remember(entry.step, entry.folder, {**facts, "loss": self.losses.training})
                seconds = round(time.perf_counter() - began, 3)
                self.events.add(
                    "resume", cause=self.resume_cause, from_step=entry.step, world_size=self.world, load=seconds
                )
                self._undo_metrics()
                return True
            self._corrupt(entry)
            self._write_ledger()
        self.state.skips = [list(r) for r in self.ledger.skips]  # bad data stays bad when every checkpoint is lost
        return False

    def _restore(self, facts: dict[str, Any] | None) -> bool:
        """Put state and detector to what a checkpoint holds, if it holds anything; the ledger's skips outlive it."""
        if facts is None:
            return False
        self.state.load_state_dict(facts["state"])
        self.state.skips = [list(r) for r in self.ledger.skips]
        # the checkpoint may lie right before data that was given up since
        self.state.data_step = self.state.next_data_step(self.state.data_step)
        self.detector.load_state_dict(facts["detector"])
        self.losses.restore(facts["loss"])
        self.optimizer.zero_grad(set_to_none=True)
        return True

    def _corrupt(self, entry: Entry) -> None:
        entry.status = "corrupt"
        self.events.add("corrupt_checkpoint", checkpoint_step=entry.step, folder=entry.folder)

    def _undo_metrics(self) -> None:
        """Tell readers of the metrics that the rows so far count only up to the step the run has gone back to."""
        if self.metrics is not None:
            self.metrics.write({"step": self.state.step, "undone_after": self.state.step})

    # Spikes

    def roll_back(self, spike: Spike) -> None:
        """Go back to the newest clean checkpoint before the spike, for good skip the data that led into it.

        Raises:
            TrainingStoppedError: this would be one rollback too many, or no clean checkpoint can be read.
        """
        began = time.perf_counter()
        config, verdict, step, last = self.config.spikes, spike.verdict, spike.step, spike.data_steps[-1]
        first = self.detector.first_outlier if self.detector.first_outlier is not None else spike.data_steps[0]
        told = {"step": step, "reason": verdict.reason}
        self.events.add("spike", loss=number(spike.loss), median=number(verdict.median), data_step=first, **told)
        recent = [s for s in self.ledger.rollbacks if s > step - config.rollback_window]
        if len(recent) >= config.max_rollbacks:
            self._stop(
                f"step {step}: {verdict.reason}; the run has gone back {len(recent)} times within "
                f"{config.rollback_window} steps (at {', '.join(map(str, recent))}), which is all that "
                "spikes.max_rollbacks allows. Look at the learning rate, the gradient norms before the spikes, and the "
                f"data steps that were skipped: {self.ledger.skips}"
            )
        if not any(self.ledger.clean_before(last)):
            self.commit()  # the first checkpoint, still being written; before the skips change, which would undo it
        skip = [max(first - config.lead_in, 0), last + 1 + config.skip_after]
        state = TrainState(skips=self.ledger.skips)
        state.skip(*skip)
        self.ledger.skips = state.skips
        self.ledger.rollbacks.append(step)
        self.ledger.mark_clean(step - self.detector.in_a_row, self.config.clean_after)
        entry, source = self._go_back(step, skip[0], last, verdict)
        self.ledger.poison_after(entry.step)
        self.ledger.rolled_back_to = entry.step
        self.checkpoints.forget_after(entry.step)
        self._write_ledger()  # before any step is taken: a crash from here on finds the skip and the poisoned ones
        worst = self._worst(first, last)
        seconds = time.perf_counter() - began
        self.events.add(
            "rollback",
            from_step=step,
            to_step=entry.step,
            checkpoint_status=entry.status,
            source=source,
            seconds=round(seconds, 3),
            skipped=skip,
            documents=worst,
            **told,
        )
        self._undo_metrics()
        log.warning(
            "step %d: %s; back to step %d from %s, data steps %s skipped",
            step,
            verdict.reason,
            entry.step,
            source,
            skip,
        )
        self._report(entry.folder, entry.step, self.losses.training, {})

    def _go_back(self, step: int, before: int, last: int, verdict: Verdict) -> tuple[Entry, str]:
        """Put everything back to the newest clean checkpoint that can be read: it, and where it was read from."""
        better = list(self.ledger.clean_before(before))
        for entry in [*better, *(e for e in self.ledger.clean_before(last) if e not in better)]:
            if self._restore(self.checkpoints.recall(entry.step)):
                return entry, "memory"
            if self._restore(self.checkpoints.load(entry.folder)):
                return entry, "storage"
            self._corrupt(entry)
        self._stop(f"step {step}: {verdict.reason}; no clean checkpoint is left to go back to")
        raise AssertionError  # _stop does not return

    def _worst(self, first: int, last: int) -> list[dict[str, Any]]:
        """The samples with the highest losses in the data steps from ``first`` to ``last``, and what stands in them."""
        shares = [self.worst(first, last, WORST_SAMPLES)]
        if dist.is_initialized():
            mine, shares = shares[0], [None] * self.world
            dist.all_gather_object(shares, mine, group=self.checkpoints.read_group)
        if self.rank != 0 or self.documents is None:
            return []
        rows = sorted((row for share in shares for row in share), key=lambda row: -_finite(row[0]))[:WORST_SAMPLES]
        try:
            found = self.documents([(data_step, place) for _, data_step, place in rows])
        except Exception as error:  # they are for people to look at, and no reason to stop
            log.warning("the documents of the spike could not be read: %s: %s", type(error).__name__, error)
            return []
        return [
            {"loss": number(loss), "data_step": data_step, "sample": place, **document}
            for (loss, data_step, place), document in zip(rows, found, strict=True)
        ]

    def _stop(self, diagnosis: str) -> None:
        self.events.add("stop", diagnosis=diagnosis)
        self.events.tell_at_last()
        raise TrainingStoppedError(diagnosis)


def number(value: float) -> float | None:
    """JSON has no infinities."""
    return value if math.isfinite(value) else None


def _finite(value: float) -> float:
    """A number to sort by: what is not finite comes first."""
    return value if math.isfinite(value) else math.inf
