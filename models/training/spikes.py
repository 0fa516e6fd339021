"""Spike detection by robust statistics over the recent losses.

A loss is an outlier when it lies more than ``threshold`` scaled median absolute deviations above the median of the
last few accepted ones (Leys et al. 2013, "Detecting outliers"). The deviations are those of past losses from the same
kind of short median, so that a loss that still falls does not look like noise; outliers stay out of both, so that a
spike that lasts does not become the new normal. All ranks feed the same all-reduced numbers: all come to one verdict.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

_NORMAL = 1.4826  # MAD times this estimates the standard deviation of a normal distribution


@dataclass
class SpikeConfig:
    """When the loss counts as spiking, and how often the run may go back."""

    window: int = 128
    """Accepted losses whose deviations are remembered."""
    recent: int = 16
    """Newest accepted losses, whose median is what a loss is compared with."""
    min_history: int = 20
    """Deviations that must be there before anything but a non-finite value is judged."""
    threshold: float = 8.0
    """Scaled median absolute deviations above the median that make an outlier."""
    min_increase: float = 0.03
    """An outlier also lies at least this share of the median above it, however quiet the losses were."""
    patience: int = 3
    """Outliers in a row that make a spike; a non-finite loss or gradient norm is one at once."""
    lead_in: int = 2
    """Steps before the first outlier whose data is skipped too."""
    skip_after: int = 8
    """Steps after the detection whose data is skipped too: bad documents tend to lie together."""
    max_rollbacks: int = 5
    """Rollbacks allowed within `rollback_window` steps; one more stops the run with a diagnosis."""
    rollback_window: int = 2000
    """Steps over which rollbacks are counted."""

    def validate(self) -> None:
        """Raise ValueError for what cannot work."""
        for name in ("window", "recent", "min_history", "patience", "max_rollbacks", "rollback_window"):
            if getattr(self, name) < 1:
                raise ValueError(f"spikes.{name} is {getattr(self, name)}; it has to be at least 1")
        if self.min_history > self.window:
            raise ValueError(
                f"spikes.min_history is {self.min_history}; it has to be at most spikes.window, {self.window}"
            )
        for name in ("threshold", "min_increase", "lead_in", "skip_after"):
            if getattr(self, name) < 0:
                raise ValueError(f"spikes.{name} is {getattr(self, name)}; it must not be negative")


class Verdict(NamedTuple):
    """What a step's loss and gradient norm say.

    Attributes:
        outlier: the step's update should not be applied.
        spike: the run should go back.
        reason: why, in words; empty when all is well.
        median: of the recent losses, nan while there are too few.
    """

    outlier: bool
    spike: bool
    reason: str
    median: float


class SpikeDetector:
    """Watches the losses of a run; its state is part of every checkpoint."""

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.recent)
        self.deviations: deque[float] = deque(maxlen=config.window)
        self.first_outlier: int | None = None  # data step
        self.in_a_row = 0

    def observe(self, data_step: int, loss: float, grad_norm: float) -> Verdict:
        """Judge one step by its all-reduced loss (nats) and gradient norm."""
        config = self.config
        median = statistics.median(self.losses) if len(self.losses) == config.recent else math.nan
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._outlier(data_step)
            what = "loss" if not math.isfinite(loss) else "gradient norm"
            return Verdict(True, True, f"{what} is not finite", median)
        if len(self.deviations) >= config.min_history:
            center = statistics.median(self.deviations)
            spread = _NORMAL * statistics.median(abs(d - center) for d in self.deviations)
            limit = median + max(center + config.threshold * spread, config.min_increase * abs(median))
            if loss > limit:
                self._outlier(data_step)
                reason = f"loss {loss:.4f} above {limit:.4f} for {self.in_a_row} steps"
                return Verdict(True, self.in_a_row >= config.patience, reason, median)
        if not math.isnan(median):
            self.deviations.append(loss - median)
        self.losses.append(loss)
        self.first_outlier, self.in_a_row = None, 0
        return Verdict(False, False, "", median)

    def _outlier(self, data_step: int) -> None:
        self.in_a_row += 1
        if self.first_outlier is None:
            self.first_outlier = data_step

    def state_dict(self) -> dict[str, Any]:
        """Everything it remembers, as JSON."""
        return {
            "losses": list(self.losses),
            "deviations": list(self.deviations),
            "first_outlier": self.first_outlier,
            "in_a_row": self.in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember what ``state_dict`` gave."""
        self.losses = deque(state["losses"], maxlen=self.config.recent)
        self.deviations = deque(state["deviations"], maxlen=self.config.window)
        self.first_outlier, self.in_a_row = state["first_outlier"], state["in_a_row"]
