"""The training loop: one visible loop over steps, which skips outliers, and goes back when the loss spikes.

It knows neither Ray nor files: batches, validation, the run's folder and the way to report are handed in, so that it
runs in a unit test without a process group and in a thousand workers unchanged. Between checkpoints the host never
waits for the device: it issues a step, and reads what the one before came to. What makes it come back from anything is
in ``recovery``.
"""

from __future__ import annotations

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
from models.training.checkpoints import rank_and_world
from models.training.metrics import MetricsWriter, peak_flops
from models.training.profile import Profiler
from models.training.recovery import Recovery, Spike, number
from models.training.run_folder import RunFolder
from models.training.spikes import LAG, Limits, SpikeConfig
from models.training.step import Issued, Outcome, Stepper


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


class Training:
    """One run.

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
        first_weights: called by all ranks where there is no checkpoint to go on from, to give the model other weights
            than those it has.
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
        first_weights: Callable[[], None] | None = None,
    ) -> None:
        self.model, self.optimizer, self.config = model, optimizer, config
        self.batches, self.validation, self.byte_lengths = batches, validation, byte_lengths.to(device)
        self.device, self.metrics = device, metrics
        self.before_step, self.interrupt, self.first_weights = before_step, interrupt, first_weights
        self.rank, self.world = rank_and_world()
        self.data_rank, data_world = data_rank or (self.rank, self.world)
        # ranks that hold the same samples follow one another: the first of them speaks
        self.speaks = self.rank % (self.world // data_world) == 0
        self.share = -(-config.global_batch // data_world)
        self.recovery = Recovery(
            model,
            optimizer,
            config,
            run=run,
            report=report,
            device=device,
            metrics=metrics,
            worst=self._worst,
            documents=documents,
            resume_cause=resume_cause,
        )
        self.state, self.detector = self.recovery.state, self.recovery.detector
        self.losses, self.events = self.recovery.losses, self.recovery.events
        self.stepper = Stepper(
            model,
            optimizer,
            device,
            microbatch=config.microbatch,
            grad_clip=config.optimizer.grad_clip,
            data_world=data_world,
            speaks=self.speaks,
            remember=config.spikes.patience + 2 * LAG + 2,
            before_update=self.recovery.checkpoints.before_update,
            document_index=document_index,
        )
        self.profiler = Profiler(run, config.profile, self.rank)
        peak = peak_flops(device)
        self.peak_tokens_per_second = peak * self.world / flops_per_token if peak else None
        self.pending: deque[Pending] = deque()
        self.asked: str | None = None  # why to save at once, until that is done

    def train(self) -> dict[str, float]:
        """Run from the newest usable checkpoint, or from the start, to ``config.steps``; returns the final losses.

        Raises:
            TrainingStoppedError: too many rollbacks.
        """
        try:
            if not self.recovery.resume():
                if self.first_weights is not None:
                    self.first_weights()
                self._validate()
                self.recovery.save(status="clean")  # nothing that could be wrong has happened to these weights
            stream = self._stream()
            while True:
                ended = self.state.step == self.config.steps
                if not ended:
                    self._issue(stream)
                    self.asked = self._interrupted() or self.asked
                due = ended or self._due() or self.asked is not None
                spike = self._read(behind=0 if due else LAG)
                if spike is not None:
                    stream.close()
                    self.recovery.roll_back(spike)
                    stream = self._stream()
                elif ended:
                    break
                elif due:
                    self._housekeeping()
            stream.close()
            return self._finish()
        finally:
            self.profiler.stop()
            self.recovery.checkpoints.close()
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
        rate = learning_rate(
            state.step, config.schedule.over_steps or config.steps, config.optimizer.lr, config.schedule
        )
        rate *= easing(state.step, self.recovery.ledger.rolled_back_to, config.spikes.ease, config.spikes.ease_steps)
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
        issued = self.stepper.step(samples, data_steps, limits, signal=self.recovery.checkpoints.written)
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
                return Spike(pending.step, pending.data_steps, outcome.loss, verdict)
            if outcome.applied:
                self.losses.training = outcome.loss
            else:
                self.events.add(
                    "outlier",
                    step=pending.step,
                    data_step=pending.data_steps[0],
                    loss=number(outcome.loss),
                    grad_norm=number(outcome.grad_norm),
                    median=number(verdict.median),
                    reason=verdict.reason,
                )
            if self.metrics is not None:
                self._record(pending, outcome)
            if outcome.signals == self.stepper.data_world:
                self.recovery.commit()
        return None

    def _record(self, pending: Pending, outcome: Outcome) -> None:
        seconds = outcome.seconds
        speed = len(pending.data_steps) * self.config.global_batch * self.config.sequence_length / seconds
        row = {
            "step": pending.step,
            "data_step": pending.data_steps[0],
            "loss": number(outcome.loss),
            "lr": pending.rate,
            "grad_norm": number(outcome.grad_norm),
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

    def _worst(self, first: int, last: int, most: int) -> list[tuple[float, int, int]]:
        """This rank's samples with the highest losses in the data steps from ``first`` to ``last``.

        Returns:
            For each its loss, its data step, and its place in the global batch.
        """
        samples = []
        for loss, data_steps, at in self.stepper.worst(first, last, most) if self.speaks else []:
            unit, row = divmod(at, self.share)
            place = self.data_rank * self.share + row
            if unit < len(data_steps) and place < self.config.global_batch:  # others only fill the batch up
                samples.append((loss, data_steps[unit], place))
        return samples

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

    def _housekeeping(self) -> None:
        """Validate and save when it is time, and save at once when the run is about to be interrupted."""
        config, step = self.config, self.state.step
        self.profiler.after(step)
        # Not in the middle of outliers: such weights may be what is wrong, or about to be undone. There are few of them
        # in a row: losses come down, or the run goes back. What was asked for is done after the step that follows.
        sound = self.detector.in_a_row == 0
        if sound:
            self.recovery.mark_clean()
        if step < config.steps and step % config.validate_every == 0:
            self._validate()
        if step < config.steps and step % config.checkpoint_every == 0 and sound:
            self.recovery.save()
        if sound and self.asked is not None:
            began = time.perf_counter()
            self.recovery.save()
            self.recovery.commit()
            seconds = round(time.perf_counter() - began, 3)
            self.events.add("interrupt", reason=self.asked, saved=self.recovery.saved(), seconds=seconds)
            self.asked = None
        self.events.tell()
        self.stepper.start_clock()  # what is done here is not the steps' own time

    @torch.no_grad()
    def _validate(self) -> None:
        """Mean loss over the validation samples, in nats a token and in bits a byte of their text."""
        if self.validation is None or self.losses.validated_at == self.state.step:
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
        self.losses.validation = {
            "validation_loss": nats / tokens,
            "validation_bits_per_byte": nats / math.log(2) / size,
        }
        self.losses.validated_at = self.state.step
        if self.metrics is not None:
            self.metrics.write({"step": self.state.step, **self.losses.validation})

    def _finish(self) -> dict[str, float]:
        self._validate()
        self.recovery.finish()
        if self.metrics is not None:
            self.metrics.flush()
        self.events.add("end", loss=self.losses.training, **self.losses.validation)
        self.events.tell_at_last()
        return {"step": self.state.step, "loss": self.losses.training, **self.losses.validation}
