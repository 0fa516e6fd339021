"""The training loop: one visible loop over steps, which skips outliers, and goes back when the loss spikes.

It knows neither Ray nor files: batches, validation, the run's folder and the way to report are handed in, so that it
runs in a unit test without a process group and in a thousand workers unchanged. Between checkpoints the host never
waits for the device: it issues a step, and reads what the one before came to.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.config import OptimizerConfig, ScheduleConfig
from models.loss import IGNORE, inputs_and_targets
from models.optimizer import easing, learning_rate
from models.training import checkpoints
from models.training.checkpoints import Checkpointer, Written, persistently
from models.training.ledger import LEDGER, Entry, Ledger, Status
from models.training.metrics import MetricsWriter, peak_flops
from models.training.profile import Profiler
from models.training.spikes import LAG, Limits, SpikeConfig, SpikeDetector, Verdict
from models.training.state import RunFolder, TrainingStoppedError, TrainState
from models.training.step import Issued, Outcome, Stepper

log = logging.getLogger("ingot")

_WORST_SAMPLES = 5  # named in the event of a rollback


@dataclass
class LoopConfig:
    """What the loop does when; lengths in optimizer steps.

    A data step is ``global_batch`` samples, in the order of the data. A step takes one of them, or as many as
    ``batch_ramp`` says: pairs of a step and the number of data steps that each step from there on takes.
    """

    steps: int
    global_batch: int
    sequence_length: int
    microbatch: int
    checkpoint_every: int
    keep_checkpoints: int
    clean_after: int
    validate_every: int
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    spikes: SpikeConfig
    keep_every: int | None = None
    keep_best: bool = False
    host_snapshots: int = 2
    async_checkpoints: bool = True
    interrupt_every: int = 10
    batch_ramp: list[tuple[int, int]] = field(default_factory=list)
    profile: tuple[int, int] | None = None

    def data_steps(self, step: int) -> int:
        """How many data steps the step after ``step`` ones takes."""
        return next((many for start, many in reversed(self.batch_ramp) if step >= start), 1)


class Pending(NamedTuple):
    """A step that was issued and not read yet."""

    step: int
    data_steps: list[int]
    tokens: int
    rate: float
    limits: Limits
    issued: Issued


class Spike(NamedTuple):
    """Why the run has to go back, and the step that showed it."""

    pending: Pending
    loss: float
    verdict: Verdict


class Training:
    """One run: the parts handed in, and the state that checkpoints carry.

    Args:
        model: built and sharded; ``model(tokens, targets, reduction=...)`` gives the loss in nats.
        optimizer: over its parameters.
        config: lengths and settings.
        batches: from a data step on, yields this rank's tokens, (global_batch / data_world rounded up,
            sequence_length + 1) int64, of the data steps that the second argument maps to (it skips ranges); -100 is
            padding at a sequence's end, and fills whole sequences where the batch does not divide.
        validation: yields this rank's ``(tokens, weights)`` of the validation split, every rank the same number; None
            when it is measured elsewhere.
        byte_lengths: bytes each token stands for, (vocab_size,) int64.
        run: the run's folder.
        report: called by all ranks at the same step with metrics and a pointer (JSON) to a durable checkpoint.
        device: where the model is.
        flops_per_token: of forward and backward pass, for the model FLOPs utilization.
        metrics: where the numbers go; rank 0 alone has it.
        before_step: called with the step about to be taken.
        documents: what stands in samples of the global batches, given as (data step, place in its batch); called by
            rank 0 alone.
        document_index: which document each of the input tokens (B, T) belongs to; None has attention cross documents.
        interrupt: called by all ranks every ``interrupt_every`` steps; a reason to save at once, or None.
        resume_cause: what to call a resume in the events.
        data_rank: this rank's place among those that share a global batch, and their number; None is its rank in the
            whole group.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: LoopConfig,
        *,
        batches: Callable[[int, Callable[[int], int]], Iterator[Tensor]],
        validation: Callable[[], Iterable[tuple[Tensor, Tensor]]] | None,
        byte_lengths: Tensor,
        run: RunFolder,
        report: Callable[[dict[str, Any], dict[str, Any] | None], None],
        device: torch.device,
        flops_per_token: float,
        metrics: MetricsWriter | None = None,
        before_step: Callable[[int], None] | None = None,
        documents: Callable[[list[tuple[int, int]]], list[dict[str, Any]]] | None = None,
        document_index: Callable[[Tensor], Tensor] | None = None,
        interrupt: Callable[[], str | None] | None = None,
        resume_cause: str = "driver_restart",
        data_rank: tuple[int, int] | None = None,
    ) -> None:
        self.model, self.optimizer, self.config = model, optimizer, config
        self.batches, self.validation, self.byte_lengths = batches, validation, byte_lengths.to(device)
        self.run, self.report, self.device, self.metrics = run, report, device, metrics
        self.before_step, self.documents, self.interrupt = before_step, documents, interrupt
        self.resume_cause = resume_cause
        self.rank, self.world = checkpoints.rank_and_world()
        self.data_rank, data_world = data_rank or (self.rank, self.world)
        # ranks that hold the same samples follow one another: the first of them speaks
        self.speaks = self.rank % (self.world // data_world) == 0
        self.share = -(-config.global_batch // data_world)
        self.state, self.detector, self.ledger = TrainState(), SpikeDetector(config.spikes), Ledger()
        self.checkpoints = Checkpointer(
            run,
            model,
            optimizer,
            device,
            snapshots=config.host_snapshots,
            background=config.async_checkpoints,
        )
        self.stepper = Stepper(
            model,
            optimizer,
            device,
            microbatch=config.microbatch,
            grad_clip=config.optimizer.grad_clip,
            data_world=data_world,
            speaks=self.speaks,
            remember=config.spikes.patience + 2 * LAG + 2,
            before_update=self.checkpoints.before_update,
            document_index=document_index,
        )
        self.profiler = Profiler(run, config.profile, self.rank)
        peak = peak_flops(device)
        self.peak_tokens_per_second = peak * self.world / flops_per_token if peak else None
        self.pending: deque[Pending] = deque()
        self.events: list[str] = []  # lines that storage did not take yet
        self.last_loss: float | None = None
        self.validation_losses: dict[str, float] = {}
        self.validated_at = -1

    def train(self) -> dict[str, float]:
        """Run from the newest usable checkpoint, or from the start, to ``config.steps``; returns the final losses.

        Raises:
            TrainingStoppedError: too many rollbacks.
        """
        try:
            self._start()
            stream = self._stream()
            while True:
                ended = self.state.step == self.config.steps
                reason = None
                if not ended:
                    self._issue(stream)
                    reason = self._interrupted()
                due = ended or self._due() or reason is not None
                spike = self._read(behind=0 if due else LAG)
                if spike is not None:
                    stream.close()
                    self._roll_back(spike)
                    stream = self._stream()
                elif ended:
                    break
                elif due:
                    self._housekeeping(reason)
            stream.close()
            return self._finish()
        finally:
            self.profiler.stop()
            self.checkpoints.close()
            if self.metrics is not None:
                self.metrics.flush()

    # Steps

    def _stream(self) -> Iterator[Tensor]:
        self.stepper.start_clock()
        return self.batches(self.state.data_step, self.state.next_data_step)

    def _issue(self, stream: Iterator[Tensor]) -> None:
        """Issue the next step to the device and move on as if it had been taken."""
        config, state = self.config, self.state
        if self.before_step is not None:
            self.before_step(state.step)
        self.profiler.before(state.step)
        rate = learning_rate(state.step, config.steps, config.optimizer.lr, config.schedule)
        rate *= easing(state.step, self.ledger.rolled_back_to, config.spikes.ease, config.spikes.ease_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        data_steps, parts = [], []
        for _ in range(config.data_steps(state.step)):
            data_steps.append(state.next_data_step(state.data_step))
            state.data_step = data_steps[-1] + 1
            parts.append(next(stream))
        limits = self.detector.next_limits()
        # each on its own: joined on the host they would not be page-locked any more
        parts = [part.to(self.device, non_blocking=True) for part in parts]
        samples = parts[0] if len(parts) == 1 else torch.cat(parts)
        issued = self.stepper.step(samples, data_steps, limits, signal=self.checkpoints.written)
        state.step += 1
        state.data_step = state.next_data_step(state.data_step)
        state.tokens += len(data_steps) * config.global_batch * config.sequence_length
        self.pending.append(Pending(state.step, data_steps, state.tokens, rate, limits, issued))

    def _read(self, behind: int) -> Spike | None:
        """Read what the steps came to, all but the last ``behind``; a spike among them makes the rest void."""
        while len(self.pending) > behind:
            pending = self.pending.popleft()
            outcome = pending.issued.read()
            verdict = self.detector.observe(pending.data_steps[0], outcome.loss, outcome.grad_norm, pending.limits)
            if verdict.spike:
                self.pending.clear()
                return Spike(pending, outcome.loss, verdict)
            if outcome.applied:
                self.last_loss = outcome.loss
            else:
                self._event(
                    "outlier",
                    step=pending.step,
                    data_step=pending.data_steps[0],
                    loss=_number(outcome.loss),
                    grad_norm=_number(outcome.grad_norm),
                    median=_number(verdict.median),
                    reason=verdict.reason,
                )
            if self.metrics is not None:
                self._record(pending, outcome)
            if outcome.signals == self.stepper.data_world:
                self._commit()
        return None

    def _record(self, pending: Pending, outcome: Outcome) -> None:
        seconds = outcome.seconds
        speed = len(pending.data_steps) * self.config.global_batch * self.config.sequence_length / seconds
        row = {
            "step": pending.step,
            "data_step": pending.data_steps[0],
            "loss": _number(outcome.loss),
            "lr": pending.rate,
            "grad_norm": _number(outcome.grad_norm),
            "tokens": pending.tokens,
            "tokens_per_second": speed,
            "mfu": speed / self.peak_tokens_per_second if self.peak_tokens_per_second else None,
            "seconds": seconds,
            "batch_hash": f"{outcome.batch_hash:016x}",
        }
        if len(pending.data_steps) > 1:
            row["data_steps"] = len(pending.data_steps)
        if not outcome.applied:
            row["skipped"] = True
        if self.device.type == "cuda":
            row["memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        self.metrics.write(row)

    # Between steps

    def _interrupted(self) -> str | None:
        """Ask now and then whether to save at once; the device goes on meanwhile."""
        if self.interrupt is None or self.state.step % self.config.interrupt_every:
            return None
        return self.interrupt()

    def _due(self) -> bool:
        """Whether something is to be done after this step for which all steps have to be read."""
        config, step = self.config, self.state.step
        often = (config.validate_every, config.checkpoint_every)
        return any(step % every == 0 for every in often) or self.profiler.ends_at(step)

    def _housekeeping(self, interrupted: str | None) -> None:
        """Validate and save when it is time, and save at once when the run is about to be interrupted."""
        config, step = self.config, self.state.step
        self.profiler.after(step)
        # Not in the middle of outliers: such weights may be what is wrong, or about to be undone.
        sound = self.detector.in_a_row == 0
        if sound and self.ledger.mark_clean(step, config.clean_after):
            self._write_ledger()
        if step < config.steps and step % config.validate_every == 0:
            self._validate()
        if step < config.steps and step % config.checkpoint_every == 0 and sound:
            self._save()
        if interrupted is not None:
            began = time.perf_counter()
            if sound:
                self._save()
                self._commit()
            seconds = round(time.perf_counter() - began, 3)
            self._event("interrupt", reason=interrupted, saved=self._saved(), seconds=seconds)
        self._tell()
        self.stepper.start_clock()  # what is done here is not the steps' own time

    @torch.no_grad()
    def _validate(self) -> None:
        """Mean loss over the validation samples, in nats a token and in bits a byte of their text."""
        if self.validation is None or self.validated_at == self.state.step:
            return
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for batch in self.validation():
            tokens, weights = (part.to(self.device) for part in batch)
            inputs, targets = inputs_and_targets(tokens)
            losses = self.model(inputs, targets, reduction="none", **self.stepper.mask(inputs)).view(targets.shape)
            counted = (targets != IGNORE) * weights[:, None]
            sums[0] += (losses.double() * counted).sum()
            sums[1] += counted.sum()
            sums[2] += (self.byte_lengths[targets.clamp(min=0)] * counted).sum()
        if self.world > 1:
            dist.all_reduce(sums)
        nats, tokens, size = sums.tolist()
        self.validation_losses = {
            "validation_loss": nats / tokens,
            "validation_bits_per_byte": nats / math.log(2) / size,
        }
        self.validated_at = self.state.step
        if self.metrics is not None:
            self.metrics.write({"step": self.state.step, **self.validation_losses})

    # Checkpoints

    def _save(self, status: Status = "pending") -> None:
        """Begin a checkpoint of this step, unless there is one; the one before is waited for."""
        state = self.state
        self._commit()
        if self._saved():
            return
        facts = {
            "state": state.state_dict(),
            "detector": self.detector.state_dict(),
            "loss": self.last_loss,
            "status": status,
            "validation_loss": self.validation_losses.get("validation_loss")
            if self.validated_at == state.step
            else None,
        }
        self.checkpoints.begin(state.step, f"checkpoints/step-{state.step:08d}", facts)
        if not self.checkpoints.background:
            self._commit()

    def _saved(self) -> bool:
        """Whether there is a checkpoint of this step."""
        return any(entry.step == self.state.step for entry in self.ledger.usable())

    def _commit(self) -> None:
        """Enter the checkpoint that was begun into the ledger, once every rank has written its part."""
        written = self.checkpoints.collect()
        if written is None:
            return
        times = {"pause": round(written.pause, 4), "write": round(written.seconds, 3)}
        if written.error is not None:
            log.warning("step %d: the checkpoint was not written: %s", written.step, written.error)
            self._event("checkpoint_failed", step=written.step, folder=written.folder, error=written.error, **times)
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
                validation_loss=written.facts["validation_loss"],
            )
        )
        expired = self.ledger.expire(self.config.keep_checkpoints, self.config.keep_every, self.config.keep_best)
        if self.metrics is not None:
            self.metrics.flush()
        self._write_ledger()
        if self.rank == 0:
            for entry in expired:
                self._delete(entry.folder)
        self._event("checkpoint", step=written.step, folder=written.folder, **times)
        self._report(written.folder, written.step, written.facts["loss"])

    def _undone(self, written: Written) -> bool:
        """Whether the run went back to before a checkpoint while it was written."""
        return written.facts["state"]["skips"] != self.ledger.skips

    def _delete(self, folder: str) -> None:
        with contextlib.suppress(OSError):  # the next start deletes what the ledger calls deleted
            self.run.delete(folder)

    def _report(self, folder: str, step: int, loss: float | None) -> None:
        metrics = {"step": step, "loss": loss, **self.validation_losses}
        self.report(metrics, {"folder": folder, "skips": self.ledger.skips, **metrics})

    def _write_ledger(self) -> None:
        if self.rank == 0:
            content = self.ledger.to_dict()
            persistently(lambda: self.run.write_json(LEDGER, content), self.run.uri(LEDGER))

    # Start and recovery

    def _start(self) -> None:
        """Resume from the newest usable checkpoint; a new run validates and saves its untrained weights first."""
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
                    self.checkpoints.remember(entry.step, entry.folder, {**facts, "loss": self.last_loss})
                seconds = round(time.perf_counter() - began, 3)
                self._event(
                    "resume", cause=self.resume_cause, from_step=entry.step, world_size=self.world, load=seconds
                )
                self._undo_metrics()
                return
            entry.status = "corrupt"
            self._event("corrupt_checkpoint", checkpoint_step=entry.step, folder=entry.folder)
            self._write_ledger()
        self.state.skips = [list(r) for r in self.ledger.skips]  # bad data stays bad when every checkpoint is lost
        self._validate()
        self._save(status="clean")  # nothing that could be wrong has happened to these weights

    def _restore(self, facts: dict[str, Any] | None) -> bool:
        """Put state and detector to what a checkpoint holds, if it holds anything; the ledger's skips outlive it."""
        if facts is None:
            return False
        self.state = TrainState.from_dict(facts["state"])
        self.state.skips = [list(r) for r in self.ledger.skips]
        # the checkpoint may lie right before data that was given up since
        self.state.data_step = self.state.next_data_step(self.state.data_step)
        self.detector.load_state_dict(facts["detector"])
        self.last_loss = facts["loss"]
        self.validation_losses, self.validated_at = {}, -1
        self.optimizer.zero_grad(set_to_none=True)
        return True

    def _roll_back(self, spike: Spike) -> None:
        """Go back to the newest clean checkpoint before the spike, for good skip the data that led into it.

        Raises:
            TrainingStoppedError: this would be one rollback too many, or no clean checkpoint can be read.
        """
        began = time.perf_counter()
        config, verdict = self.config.spikes, spike.verdict
        step, last = spike.pending.step, spike.pending.data_steps[-1]
        first = self.detector.first_outlier if self.detector.first_outlier is not None else spike.pending.data_steps[0]
        told = {"step": step, "reason": verdict.reason}
        self._event("spike", loss=_number(spike.loss), median=_number(verdict.median), data_step=first, **told)
        recent = [s for s in self.ledger.rollbacks if s > step - config.rollback_window]
        if len(recent) >= config.max_rollbacks:
            self._stop(
                f"step {step}: {verdict.reason}; the run has gone back {len(recent)} times within "
                f"{config.rollback_window} steps (at {', '.join(map(str, recent))}), which is all that "
                "spikes.max_rollbacks allows. Look at the learning rate, the gradient norms before the spikes, and the "
                f"data steps that were skipped: {self.ledger.skips}"
            )
        if not any(self.ledger.clean_before(last)):
            self._commit()  # the first checkpoint, still being written; before the skips change, which would undo it
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
        self._event(
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
        self._report(entry.folder, entry.step, self.last_loss)

    def _go_back(self, step: int, before: int, last: int, verdict: Verdict) -> tuple[Entry, str]:
        """Put everything back to the newest clean checkpoint that can be read: it, and where it was read from."""
        better = list(self.ledger.clean_before(before))
        for entry in [*better, *(e for e in self.ledger.clean_before(last) if e not in better)]:
            if self._restore(self.checkpoints.recall(entry.step)):
                return entry, "memory"
            if self._restore(self.checkpoints.load(entry.folder)):
                return entry, "storage"
            entry.status = "corrupt"
            self._event("corrupt_checkpoint", checkpoint_step=entry.step, folder=entry.folder)
        self._stop(f"step {step}: {verdict.reason}; no clean checkpoint is left to go back to")
        raise AssertionError  # _stop does not return

    def _worst(self, first: int, last: int) -> list[dict[str, Any]]:
        """The samples with the highest losses in the data steps from ``first`` to ``last``, and what stands in them."""
        mine = []
        for loss, data_steps, at in self.stepper.worst(first, last, _WORST_SAMPLES) if self.speaks else []:
            unit, row = divmod(at, self.share)
            place = self.data_rank * self.share + row
            if unit < len(data_steps) and place < self.config.global_batch:  # others only fill the batch up
                mine.append((loss, data_steps[unit], place))
        shares = [mine]
        if dist.is_initialized():
            shares = [None] * self.world
            dist.all_gather_object(shares, mine, group=self.checkpoints.read_group)
        if self.rank != 0 or self.documents is None:
            return []
        rows = sorted((row for share in shares for row in share), key=lambda row: -_finite(row[0]))[:_WORST_SAMPLES]
        try:
            found = self.documents([(data_step, place) for _, data_step, place in rows])
        except Exception as error:  # they are for people to look at, and no reason to stop
            log.warning("the documents of the spike could not be read: %s: %s", type(error).__name__, error)
            return []
        return [
            {"loss": _number(loss), "data_step": data_step, "sample": place, **document}
            for (loss, data_step, place), document in zip(rows, found, strict=True)
        ]

    def _undo_metrics(self) -> None:
        """Tell readers of the metrics that the rows so far count only up to the step the run has gone back to."""
        if self.metrics is not None:
            self.metrics.write({"step": self.state.step, "undone_after": self.state.step})

    def _stop(self, diagnosis: str) -> None:
        self._event("stop", diagnosis=diagnosis)
        self._tell_at_last()
        raise TrainingStoppedError(diagnosis)

    def _finish(self) -> dict[str, float]:
        saved = next((entry for entry in self.ledger.usable() if entry.step == self.state.step), None)
        self._validate()
        self._save()
        self._commit()
        if not self._saved():
            raise OSError(
                f"{self.run.uri('checkpoints')}: the last checkpoint, of step {self.state.step}, was not written"
            )
        if saved is not None:  # an attempt that was killed at the very end may not have come to that
            self._report(saved.folder, saved.step, self.last_loss)
        for entry in self.ledger.usable():
            entry.status = "clean"  # no step follows that could show otherwise
        self._write_ledger()
        if self.metrics is not None:
            self.metrics.flush()
        self._event("end", loss=self.last_loss, **self.validation_losses)
        self._tell_at_last()
        return {"step": self.state.step, "loss": self.last_loss, **self.validation_losses}

    # Events

    def _event(self, event: str, **facts: Any) -> None:
        if self.rank == 0:
            self.events.append(json.dumps({"time": time.time(), "event": event, "step": self.state.step, **facts}))
            self._tell()

    def _tell(self) -> None:
        """Write the events that are not on storage yet; where it fails they wait for the next time."""
        try:
            while self.events:
                self.run.append_line("events.jsonl", self.events[0])
                del self.events[0]
        except OSError as error:
            log.warning("%s: %s; %d events wait", self.run.uri("events.jsonl"), error, len(self.events))

    def _tell_at_last(self) -> None:
        """Wait for a storage that fails: after this nobody is left to tell the events.

        Raises:
            OSError: it failed to the end.
        """
        while self.events:
            line = self.events[0]
            persistently(lambda line=line: self.run.append_line("events.jsonl", line), self.run.uri("events.jsonl"))
            del self.events[0]


def _number(value: float) -> float | None:
    """JSON has no infinities."""
    return value if math.isfinite(value) else None


def _finite(value: float) -> float:
    """A number to sort by: what is not finite comes first."""
    return value if math.isfinite(value) else math.inf
