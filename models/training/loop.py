"""The training loop: one visible loop over steps, which skips outliers, and goes back when the loss spikes.

It knows neither Ray nor files: batches, validation, the run's folder and the way to report are handed in, so that it
runs in a unit test without a process group and in a thousand workers unchanged.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.config import OptimizerConfig, ScheduleConfig
from models.loss import IGNORE, inputs_and_targets
from models.optimizer import clip_grad_norm, learning_rate
from models.parallel import set_gradient_sync
from models.training import checkpoints
from models.training.checkpoints import Entry, Ledger
from models.training.metrics import MetricsWriter, peak_flops
from models.training.spikes import SpikeConfig, SpikeDetector, Verdict
from models.training.state import RunFolder, TrainingStoppedError, TrainState

log = logging.getLogger("ingot")


@dataclass
class LoopConfig:
    """What the loop does when; lengths in optimizer steps."""

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


class Training:
    """One run: the parts handed in, and the state that checkpoints carry.

    Args:
        model: built and sharded; ``model(tokens, targets)`` gives the mean loss in nats.
        optimizer: over its parameters.
        config: lengths and settings.
        batches: from a data step on, yields this rank's tokens, (global_batch / world, sequence_length + 1) int64, of
            the data steps that the second argument maps to (it skips ranges); -100 is padding at a sequence's end.
        validation: yields this rank's ``(tokens, weights)`` of the validation split; every rank the same number.
        byte_lengths: bytes each token stands for, (vocab_size,) int64.
        run: the run's folder.
        report: called by all ranks with metrics and a pointer (JSON) to each new checkpoint.
        device: where the model is.
        flops_per_token: of forward and backward pass, for the model FLOPs utilization.
        tensorboard: folder for TensorBoard's files, or None.
        before_step: called with the step about to be taken.
        documents: names the documents of data steps, for the events; called by rank 0 alone.
        resume_cause: what to call a resume in the events.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: LoopConfig,
        *,
        batches: Callable[[int, Callable[[int], int]], Iterator[Tensor]],
        validation: Callable[[], Iterable[tuple[Tensor, Tensor]]],
        byte_lengths: Tensor,
        run: RunFolder,
        report: Callable[[dict[str, Any], dict[str, Any] | None], None],
        device: torch.device,
        flops_per_token: float,
        tensorboard: str | None = None,
        before_step: Callable[[int], None] | None = None,
        documents: Callable[[range], list[dict[str, Any]]] | None = None,
        resume_cause: str = "driver_restart",
    ) -> None:
        self.model, self.optimizer, self.config = model, optimizer, config
        self.batches, self.validation, self.byte_lengths = batches, validation, byte_lengths.to(device)
        self.run, self.report, self.device = run, report, device
        self.before_step, self.resume_cause, self.documents = before_step, resume_cause, documents
        self.rank, self.world = checkpoints.rank_and_world()
        self.state, self.detector, self.ledger = TrainState(), SpikeDetector(config.spikes), Ledger()
        peak = peak_flops(device)
        self.peak_tokens_per_second = peak * self.world / flops_per_token if peak else None
        self.metrics = MetricsWriter(run, tensorboard) if self.rank == 0 else None
        self.last_loss: float | None = None
        self.validation_losses: dict[str, float] = {}

    def train(self) -> dict[str, float]:
        """Run from the newest usable checkpoint, or from the start, to ``config.steps``; returns the final losses.

        Raises:
            TrainingStoppedError: too many rollbacks.
        """
        config, state = self.config, self._start()
        stream = self.batches(state.data_step, state.next_data_step)
        began = time.perf_counter()
        while state.step < config.steps:
            if self.before_step is not None:
                self.before_step(state.step)
            data_step = state.next_data_step(state.data_step)
            loss, grad_norm = self._forward_backward(next(stream))
            verdict = self.detector.observe(data_step, loss, grad_norm)
            if verdict.spike:
                stream.close()
                self._roll_back(data_step, loss, verdict)
                state = self.state
                stream = self.batches(state.data_step, state.next_data_step)
                began = time.perf_counter()
                continue
            rate = learning_rate(state.step, config.steps, config.optimizer.lr, config.schedule)
            if verdict.outlier:
                self._event("outlier", loss=loss, median=_number(verdict.median), reason=verdict.reason)
            else:
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                self.optimizer.step()
                self.last_loss = loss
            self.optimizer.zero_grad(set_to_none=True)
            state.step += 1
            state.data_step = state.next_data_step(data_step + 1)
            state.tokens += config.global_batch * config.sequence_length
            now = time.perf_counter()
            self._record(data_step, loss, grad_norm, rate, now - began)
            if self._housekeeping():
                now = time.perf_counter()  # checkpoints and validation are not the step's own time
            began = now
        stream.close()
        return self._finish()

    # One step

    def _forward_backward(self, tokens: Tensor) -> tuple[float, float]:
        """Gradients of the mean loss over the global batch, clipped; returns that loss and the norm before clipping."""
        tokens = tokens.to(self.device, non_blocking=True)
        pieces = tokens.split(self.config.microbatch)
        total = torch.zeros((), device=self.device)
        for i, piece in enumerate(pieces):
            set_gradient_sync(self.model, i == len(pieces) - 1)
            loss = self.model(*inputs_and_targets(piece)) / len(pieces)
            loss.backward()
            total += loss.detach().float()
        norm = clip_grad_norm(self.model, self.config.optimizer.grad_clip)
        if self.world > 1:
            dist.all_reduce(total)
        # One transfer for both numbers; all ranks see the same ones, so all decide alike.
        loss, grad_norm = torch.stack([total / self.world, norm.float()]).tolist()
        return loss, grad_norm

    def _record(self, data_step: int, loss: float, grad_norm: float, rate: float, seconds: float) -> None:
        if self.metrics is None:
            return
        speed = self.config.global_batch * self.config.sequence_length / seconds
        self.metrics.write(
            {
                "step": self.state.step,
                "data_step": data_step,
                "loss": _number(loss),
                "lr": rate,
                "grad_norm": _number(grad_norm),
                "tokens": self.state.tokens,
                "tokens_per_second": speed,
                "mfu": speed / self.peak_tokens_per_second if self.peak_tokens_per_second else None,
                "seconds": seconds,
            }
        )

    def _housekeeping(self) -> bool:
        """Validate and save when it is time; True when something was done."""
        config, step = self.config, self.state.step
        if self.detector.in_a_row == 0 and self.ledger.mark_clean(step, config.clean_after):
            self._write_ledger()
        due = step % config.validate_every == 0 and step < config.steps
        if due:
            self._validate()
        if step % config.checkpoint_every == 0 and step < config.steps:
            # Not in the middle of outliers: such weights may be what is wrong, or about to be undone.
            if self.detector.in_a_row == 0:
                self._save()
            return True
        return due

    # Validation

    @torch.no_grad()
    def _validate(self) -> None:
        """Mean loss over the validation samples, in nats a token and in bits a byte of their text."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for batch in self.validation():
            tokens, weights = (part.to(self.device) for part in batch)
            inputs, targets = inputs_and_targets(tokens)
            losses = self.model(inputs, targets, reduction="none").view(targets.shape)
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
        if self.metrics is not None:
            self.metrics.write({"step": self.state.step, **self.validation_losses})

    # Checkpoints and recovery

    def _start(self) -> TrainState:
        """Resume from the newest usable checkpoint; a new run validates and saves its untrained weights first."""
        self.ledger = Ledger.from_dict(self._read_ledger())
        if self.rank == 0:
            for entry in self.ledger.entries:
                if entry.deleted:  # a kill between the ledger and the deletion may have left it
                    self.run.delete(entry.folder)
        for entry in list(self.ledger.usable()):
            if self._load(entry):
                self._event("resume", cause=self.resume_cause, from_step=entry.step, world_size=self.world)
                self._undo_metrics()
                return self.state
            entry.status = "corrupt"
            self._event("corrupt_checkpoint", checkpoint_step=entry.step, folder=entry.folder)
            self._write_ledger()
        self.state.skips = [list(r) for r in self.ledger.skips]  # bad data stays bad when every checkpoint is lost
        self._validate()
        self._save(status="clean")  # nothing that could be wrong has happened to these weights
        return self.state

    def _read_ledger(self) -> dict[str, Any] | None:
        content = [self.run.read_json(checkpoints.LEDGER) if self.rank == 0 else None]
        if dist.is_initialized():
            dist.broadcast_object_list(content, src=0)
        return content[0]

    def _write_ledger(self) -> None:
        if self.rank == 0:
            self.run.write_json(checkpoints.LEDGER, self.ledger.to_dict())

    def _save(self, status: checkpoints.Status = "pending") -> None:
        state = self.state
        folder = f"checkpoints/step-{state.step:08d}"
        if self.metrics is not None:
            self.metrics.flush()
        facts = {"state": state.state_dict(), "detector": self.detector.state_dict(), "loss": self.last_loss}
        checkpoints.save(self.run, folder, self.model, self.optimizer, facts)
        self.ledger.add(Entry(state.step, state.data_step, state.tokens, self.last_loss, folder, status))
        expired = self.ledger.expire(self.config.keep_checkpoints)
        self._write_ledger()
        if self.rank == 0:
            for entry in expired:
                self.run.delete(entry.folder)
        self._event("checkpoint", folder=folder)
        self._report(folder)

    def _report(self, folder: str) -> None:
        metrics = {"step": self.state.step, "loss": self.last_loss, **self.validation_losses}
        self.report(metrics, {"folder": folder, "skips": self.ledger.skips, **metrics})

    def _load(self, entry: Entry) -> bool:
        """Put model, optimizer, state and detector back to a checkpoint; the ledger's skips outlive it."""
        facts = checkpoints.load(self.run, entry.folder, self.model, self.optimizer)
        if facts is None:
            return False
        self.state = TrainState.from_dict(facts["state"])
        self.state.skips = [list(r) for r in self.ledger.skips]
        self.detector.load_state_dict(facts["detector"])
        self.last_loss = facts["loss"]
        self.optimizer.zero_grad(set_to_none=True)
        return True

    def _roll_back(self, data_step: int, loss: float, verdict: Verdict) -> None:
        """Go back to the newest clean checkpoint before the spike, for good skip the data that led into it.

        Raises:
            TrainingStoppedError: this would be one rollback too many, or no clean checkpoint can be read.
        """
        config, step = self.config.spikes, self.state.step
        first = self.detector.first_outlier if self.detector.first_outlier is not None else data_step
        self._event("spike", loss=_number(loss), median=_number(verdict.median), reason=verdict.reason, data_step=first)
        recent = [s for s in self.ledger.rollbacks if s > step - config.rollback_window]
        if len(recent) >= config.max_rollbacks:
            self._stop(
                f"step {step}: {verdict.reason}; the run has gone back {len(recent)} times within "
                f"{config.rollback_window} steps (at {', '.join(map(str, recent))}), which is all that "
                "spikes.max_rollbacks allows. Look at the learning rate, the gradient norms before the spikes, and the "
                f"data steps that were skipped: {self.ledger.skips}"
            )
        skip = [max(first - config.lead_in, 0), data_step + 1 + config.skip_after]
        state = TrainState(skips=self.ledger.skips)
        state.skip(*skip)
        self.ledger.skips = state.skips
        self.ledger.rollbacks.append(step)
        for entry in list(self.ledger.clean_before(skip[0])) or list(self.ledger.clean_before(data_step)):
            if self._load(entry):
                break
            entry.status = "corrupt"
            self._event("corrupt_checkpoint", checkpoint_step=entry.step, folder=entry.folder)
        else:
            self._stop(f"step {step}: {verdict.reason}; no clean checkpoint is left to go back to")
        self.ledger.poison_after(entry.step)
        self._write_ledger()  # before any step is taken: a crash from here on finds the skip and the poisoned ones
        self._event(
            "rollback",
            step=step,
            from_step=step,
            to_step=entry.step,
            checkpoint_status=entry.status,
            skipped=skip,
            reason=verdict.reason,
            documents=self._documents(range(first, data_step + 1)),
        )
        self._undo_metrics()
        log.warning("step %d: %s; back to step %d, data steps %s skipped", step, verdict.reason, entry.step, skip)
        self._report(entry.folder)

    def _documents(self, data_steps: range) -> list[dict[str, Any]]:
        """What the outliers were trained on, as far as it is known."""
        return self.documents(data_steps) if self.documents is not None and self.rank == 0 else []

    def _undo_metrics(self) -> None:
        """Tell readers of the metrics that the rows so far count only up to the step the run has gone back to."""
        if self.metrics is not None:
            self.metrics.write({"step": self.state.step, "undone_after": self.state.step})

    def _stop(self, diagnosis: str) -> None:
        self._event("stop", diagnosis=diagnosis)
        if self.metrics is not None:
            self.metrics.flush()
        raise TrainingStoppedError(diagnosis)

    def _finish(self) -> dict[str, float]:
        saved = next((entry for entry in self.ledger.usable() if entry.step == self.state.step), None)
        self._validate()
        if saved is None:
            self._save()
        else:  # an attempt that was killed at the very end may not have come to that
            self._report(saved.folder)
        for entry in self.ledger.usable():
            entry.status = "clean"  # no step follows that could show otherwise
        self._write_ledger()
        if self.metrics is not None:
            self.metrics.flush()
        self._event("end", loss=self.last_loss, **self.validation_losses)
        return {"step": self.state.step, "loss": self.last_loss, **self.validation_losses}

    def _event(self, event: str, **facts: Any) -> None:
        if self.rank == 0:
            line = {"time": time.time(), "event": event, "step": self.state.step, **facts}
            self.run.append_line("events.jsonl", json.dumps(line))


def _number(value: float) -> float | None:
    """JSON has no infinities."""
    return value if math.isfinite(value) else None
