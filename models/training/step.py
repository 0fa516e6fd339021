"""One optimizer step, issued to the device without waiting for it.

Loss, gradient norm and the verdict on them stay on the device: an update whose loss or gradient norm is beyond the
limits, or not finite, leaves weights and moments as they are. The numbers are copied to the host beside the work and
read when the next step has been issued.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from models.loss import IGNORE, inputs_and_targets
from models.optimizer import grad_norm
from models.parallel import set_gradient_sync
from models.training.spikes import Limits
from models.training.state import batch_hash


@dataclass
class Outcome:
    """What a step came to, read from the device.

    Attributes:
        loss: mean over all targets of the global batch, nats.
        grad_norm: of the whole gradient, before clipping.
        applied: whether the weights were changed.
        signals: how many ranks raised their hand when the step was issued.
        batch_hash: `models.training.state.batch_hash` of the global batch, modulo 2^64.
        seconds: from the end of the step before, or from `Stepper.start_clock`, to its own, on the device's clock.
    """

    loss: float
    grad_norm: float
    applied: bool
    signals: int
    batch_hash: int
    seconds: float


class Moment:
    """A point in the device's work; on the CPU, in time."""

    def __init__(self, device: torch.device) -> None:
        self.time, self.event = time.perf_counter(), None
        if device.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()

    def wait(self) -> None:
        """Until the device has come to it, without holding Python's lock."""
        if self.event is not None:
            self.event.synchronize()

    def since(self, earlier: Moment) -> float:
        """Seconds between two points that the device has come to."""
        return self.time - earlier.time if self.event is None else earlier.event.elapsed_time(self.event) / 1e3


class Issued:
    """A step under way: its numbers, on their way to the host."""

    def __init__(self, numbers: Tensor, facts: Tensor, before: Moment) -> None:
        self.numbers, self.facts, self.before = numbers, facts, before
        if numbers.is_cuda:
            self.numbers = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
            self.facts = torch.empty_like(facts, device="cpu", pin_memory=True).copy_(facts, non_blocking=True)
        self.end = Moment(numbers.device)

    def read(self) -> Outcome:
        """Wait for the step to end; its numbers."""
        self.end.wait()
        loss, grad_norm, applied, signals = self.numbers.tolist()
        seconds = max(self.end.since(self.before), 1e-9)
        return Outcome(loss, grad_norm, applied > 0, round(signals), self.facts[0].item() % 2**64, seconds)


class Stepper:
    """Takes steps of a model.

    Args:
        model: ``model(tokens, targets, reduction="sum")`` gives the summed loss in nats; gradients come out averaged
            over the data-parallel ranks.
        optimizer: its ``step`` honours ``found_inf`` and ``grad_scale``.
        device: where the model is.
        microbatch: samples that are taken at a time.
        grad_clip: largest norm of the gradient; 0 is off.
        data_world: ranks among which a global batch is shared out.
        speaks: whether this rank's numbers count: of ranks that hold the same samples, one's do.
        remember: steps whose losses by sample are kept.
        before_update: called before weights change.
        document_index: which document each input token belongs to; None has attention cross documents.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        *,
        microbatch: int,
        grad_clip: float,
        data_world: int,
        speaks: bool = True,
        remember: int = 8,
        before_update: Callable[[], None] | None = None,
        document_index: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model, self.optimizer, self.device = model, optimizer, device
        self.microbatch, self.grad_clip = microbatch, grad_clip
        self.data_world, self.speaks, self.before_update = data_world, speaks, before_update
        self.document_index = document_index
        self.sample_losses: deque[tuple[list[int], Tensor]] = deque(maxlen=remember)
        self.under_way: deque[Moment] = deque()  # the end of the forward pass issued last
        self.last = Moment(device)

    def start_clock(self) -> None:
        """Time the next step from here on."""
        self.last = Moment(self.device)

    def backward(self, samples: Tensor, data_steps: list[int], signal: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the mean loss over the global batch.

        Args:
            samples: this rank's share, (n, T + 1) int64; samples of nothing but -100 only fill it up.
            data_steps: those that the samples are of; the losses by sample are kept under them.
            signal: whether this rank raises its hand.

        Returns:
            The mean loss, fp32; the number of ranks that raised their hand, fp32; and the batch's hash and number of
            targets, (2,) int64: on the device, the same on every rank.
        """
        samples = samples.to(self.device, non_blocking=True)
        size = -(-len(samples) // -(-len(samples) // self.microbatch))  # as even as can be
        short = -len(samples) % size
        samples = F.pad(samples, (0, 0, 0, short), value=IGNORE) if short else samples
        facts = torch.stack([batch_hash(samples), (samples[:, 1:] != IGNORE).sum()])
        self._sum(facts)
        count = facts[1].clamp(min=1).float()
        # a sum over the ranks, which average gradients: scaled so that their mean is the gradient of the global mean
        scale = self.data_world / count
        pieces = samples.split(size)
        total = torch.zeros((), device=self.device)
        losses = []
        for i, piece in enumerate(pieces):
            set_gradient_sync(self.model, i == len(pieces) - 1)
            inputs, targets = inputs_and_targets(piece)
            self._keep_pace()
            loss, by_token = self.model(inputs, targets, reduction="sum", token_losses=True, **self.mask(inputs))
            self.under_way.append(Moment(self.device))
            (loss * scale).backward()
            total += loss.detach().float()
            losses.append(by_token.sum(1) / (targets != IGNORE).sum(1).clamp(min=1))
        self.sample_losses.append((data_steps, torch.cat(losses)))
        numbers = torch.stack([total, torch.full_like(total, float(signal))])
        self._sum(numbers)
        loss, signals = numbers.unbind()
        return loss / count, signals, facts

    def step(self, samples: Tensor, data_steps: list[int], limits: Limits, signal: bool = False) -> Issued:
        """Issue one step; the learning rate is set already. Takes what `backward` does, and the limits to judge by."""
        loss, signals, facts = self.backward(samples, data_steps, signal)
        norm = grad_norm(self.model)
        applied = (
            torch.isfinite(loss) & torch.isfinite(norm) & (loss <= limits.loss) & (norm <= limits.grad_norm)
        ).float()
        optimizer = self.optimizer
        optimizer.found_inf = 1 - applied
        optimizer.grad_scale = (norm / self.grad_clip).clamp(min=1) if self.grad_clip > 0 else None
        if self.before_update is not None:
            self.before_update()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        issued = Issued(torch.stack([loss, norm, applied, signals]), facts, self.last)
        self.last = issued.end
        return issued

    def _keep_pace(self) -> None:
        """Before a forward pass is issued, let the device come to the end of the one before.

        It has a backward pass to do then, and its queue never fills up: issuing to a full one waits with Python's
        lock held, and the threads that read data and write checkpoints would starve.
        """
        while self.under_way:
            self.under_way.popleft().wait()

    def mask(self, inputs: Tensor) -> dict[str, Tensor]:
        """The model's argument that keeps attention within documents, if it is to."""
        return {} if self.document_index is None else {"documents": self.document_index(inputs)}

    def worst(self, first: int, last: int, most: int) -> list[tuple[float, list[int], int]]:
        """This rank's samples with the highest losses in the steps that began with data steps from first to last.

        Returns:
            For each its loss, the data steps of its step, and its place in this rank's share of them.
        """
        rows = [
            (loss, data_steps, place)
            for data_steps, losses in self.sample_losses
            if first <= data_steps[0] <= last
            for place, loss in enumerate(losses.tolist())
            if loss != 0  # samples of nothing but padding
        ]
        return sorted(rows, key=lambda row: -row[0] if row[0] == row[0] else float("-inf"))[:most]

    def _sum(self, numbers: Tensor) -> None:
        """Over the ranks, in place."""
        if not self.speaks:
            numbers.zero_()
        if dist.is_initialized():
            dist.all_reduce(numbers)
