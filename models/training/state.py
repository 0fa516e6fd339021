"""What a run must remember beside weights and optimizer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from models.loss import IGNORE


class TrainingStoppedError(RuntimeError):
    """The run went back too often; the message says what it saw."""


@dataclass
class TrainState:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        data_step: the next batch of the data order.
        tokens: tokens trained on.
        skips: half-open ranges of data steps that are never trained on again, sorted.
    """

    step: int = 0
    data_step: int = 0
    tokens: int = 0
    skips: list[list[int]] = field(default_factory=list)

    def next_data_step(self, data_step: int) -> int:
        """``data_step`` itself, or the first one after the skipped range that it lies in."""
        for start, end in self.skips:
            if start <= data_step < end:
                data_step = end
        return data_step

    def skip(self, start: int, end: int) -> None:
        """Never train on the data steps ``[start, end)`` again."""
        ranges = sorted([*self.skips, [start, end]])
        merged = [ranges[0]]
        for low, high in ranges[1:]:
            if low <= merged[-1][1]:
                merged[-1] = [merged[-1][0], max(merged[-1][1], high)]
            else:
                merged.append([low, high])
        self.skips = merged

    def state_dict(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> TrainState:
        """What ``state_dict`` gave."""
        return cls(**state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where ``state_dict`` was taken."""
        for name, value in state.items():
            setattr(self, name, value)


@dataclass
class Losses:
    """The newest losses of a run.

    Attributes:
        training: of the newest step that was applied, nats.
        validation: by their names in the metrics.
        validated_at: the step that they were measured at.
    """

    training: float | None = None
    validation: dict[str, float] = field(default_factory=dict)
    validated_at: int = -1

    def restore(self, training: float | None) -> None:
        """Forget what later steps came to."""
        self.training, self.validation, self.validated_at = training, {}, -1


def batch_hash(samples: Tensor) -> Tensor:
    """A number that tells which samples a batch holds: the sum, modulo 2^64, of a hash of each one's tokens.

    The sum over the workers' shares is that of the whole batch, in whatever way it was shared out, so the numbers that
    a run writes down prove which tokens its steps saw. Samples of nothing but padding count as nothing.

    Args:
        samples: (n, T + 1) int64 token ids, -100 for padding.

    Returns:
        int64 scalar, on the samples' device; nothing waits for it.
    """
    places = torch.arange(1, samples.shape[1] + 1, device=samples.device)
    rows = (samples * (_mixed(places) | 1)).sum(1)  # odd multipliers, so that no token is lost in the low bits
    return (_mixed(rows) * (samples != IGNORE).any(1)).sum()


def _mixed(x: Tensor) -> Tensor:
    """Finalizer of splitmix64 (Steele et al. 2014) on int64, whose products wrap and whose shifts are made logical."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & (2**33 - 1))
