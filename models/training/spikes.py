"""Spike detection by robust statistics over the recent losses.

A loss is an outlier when it lies more than ``threshold`` scaled median absolute deviations above the median of the
last few accepted ones (Leys et al. 2013, "Detecting outliers"). The deviations are those of past losses from the same
kind of short median, so that a loss that still falls does not look like noise; outliers stay out of both, so that a
spike that lasts does not become the new normal. All ranks feed the same all-reduced numbers: all come to one verdict.

The device is given limits and judges each step by them, so that no update has to wait for the host. The host reads
the numbers a step later and makes the limits of a later step of them: always ``LAG + 1`` steps on, whether or not it
happened to wait in between, so that a resumed run judges as the one before it.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

_NORMAL = 1.4826  # MAD times this estimates the standard deviation of a normal distribution

LAG = 1
"""Steps that the device may be ahead of what the host has read."""


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
    grad_factor: float = 10.0
    """A gradient norm this many times the median of the recent ones is an outlier too; 0 switches that off. More of
    them in a row than `patience` are taken for a new level, unless the loss rises."""
    patience: int = 3
    """Losses in a row that are outliers make a spike; a non-finite loss or gradient norm is one at once."""
    lead_in: int = 2
    """Steps before the first outlier whose data is skipped too."""
    skip_after: int = 8
    """Steps after the detection whose data is skipped too: bad documents tend to lie together."""
    max_rollbacks: int = 5
    """Rollbacks allowed within `rollback_window` steps; one more stops the run with a diagnosis."""
    rollback_window: int = 2000
    """Steps over which rollbacks are counted."""
    ease: float = 1.0
    """Factor of the learning rate right after a rollback, from which it rises back over `ease_steps`; 1 is off."""
    ease_steps: int = 100
    """Steps over which the learning rate rises back after a rollback."""
    enabled: bool = True
    """Whether anything but non-finite values is looked for."""

    def validate(self) -> None:
        """Raise ValueError for what cannot work."""
        if not 0 < self.ease <= 1:
            raise ValueError(f"spikes.ease is {self.ease}; it has to be above 0 and at most 1")
        for name in ("window", "recent", "min_history", "patience", "max_rollbacks", "rollback_window", "ease_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"spikes.{name} is {getattr(self, name)}; it has to be at least 1")
        if self.min_history > self.window:
            raise ValueError(
                f"spikes.min_history is {self.min_history}; it has to be at most spikes.window, {self.window}"
            )
        for name in ("threshold", "min_increase", "grad_factor", "lead_in", "skip_after"):
            if getattr(self, name) < 0:
                raise ValueError(f"spikes.{name} is {getattr(self, name)}; it must not be negative")


class Limits(NamedTuple):
    """What a step may show at most to be applied, infinite while too little is known.

    Exact in fp32, as the device's comparison is.
    """

    loss: float = math.inf
    grad_norm: float = math.inf


class Verdict(NamedTuple):
    """What a step's loss and gradient norm say.

    Attributes:
        outlier: the step's update was not applied.
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
        self.norms: deque[float] = deque(maxlen=config.recent)
        self.first_outlier: int | None = None  # data step
        self.in_a_row = 0  # losses
        self.high_norms = 0  # in a row
        self.limits: deque[Limits] = deque([Limits()] * (LAG + 1))

    def next_limits(self) -> Limits:
        """The limits of the next step to be taken; asked for once a step, at most ``LAG + 1`` ahead of `observe`."""
        return self.limits.popleft()

    def observe(self, data_step: int, loss: float, grad_norm: float, limits: Limits) -> Verdict:
        """Judge one step by its all-reduced loss (nats) and gradient norm, and the limits it was given."""
        verdict = self._judge(data_step, loss, grad_norm, limits)
        self.limits.append(self._limits())
        return verdict

    def _judge(self, data_step: int, loss: float, grad_norm: float, limits: Limits) -> Verdict:
        median = self._median()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._outlier(data_step)
            what = "loss" if not math.isfinite(loss) else "gradient norm"
            return Verdict(True, True, f"{what} is not finite", median)
        if loss > limits.loss:
            self._outlier(data_step)
            reason = f"loss {loss:.4f} above {limits.loss:.4f} for {self.in_a_row} steps"
            return Verdict(True, self.in_a_row >= self.config.patience, reason, median)
        self.first_outlier, self.in_a_row = None, 0
        if grad_norm > limits.grad_norm:
            self.high_norms += 1
            return Verdict(True, False, f"gradient norm {grad_norm:.3g} above {limits.grad_norm:.3g}", median)
        usual = self._norm_limit()
        self.high_norms = self.high_norms + 1 if grad_norm > usual else 0
        if not math.isnan(median):
            self.deviations.append(loss - median)
        self.losses.append(loss)
        self.norms.append(grad_norm)
        return Verdict(False, False, "", median)

    def _limits(self) -> Limits:
        config = self.config
        if not config.enabled or len(self.deviations) < config.min_history:
            return Limits()
        center = statistics.median(self.deviations)
        spread = _NORMAL * statistics.median(abs(d - center) for d in self.deviations)
        median = self._median()
        loss = median + max(center + config.threshold * spread, config.min_increase * abs(median))
        # after `patience` of them a high norm is accepted, so that the median can follow
        norm = math.inf if self.high_norms >= config.patience else self._norm_limit()
        return Limits(float(np.float32(loss)), float(np.float32(norm)))

    def _norm_limit(self) -> float:
        if self.config.grad_factor == 0 or len(self.norms) < self.config.recent:
            return math.inf
        return self.config.grad_factor * statistics.median(self.norms)

    def _median(self) -> float:
        return statistics.median(self.losses) if len(self.losses) == self.config.recent else math.nan

    def _outlier(self, data_step: int) -> None:
        self.in_a_row += 1
        if self.first_outlier is None:
            self.first_outlier = data_step

    def state_dict(self) -> dict[str, Any]:
        """Everything it remembers, as JSON."""
        return {
            "losses": list(self.losses),
            "deviations": list(self.deviations),
            "norms": list(self.norms),
            "first_outlier": self.first_outlier,
            "in_a_row": self.in_a_row,
            "high_norms": self.high_norms,
            "limits": [[value if math.isfinite(value) else None for value in limits] for limits in self.limits],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember what ``state_dict`` gave."""
        self.losses = deque(state["losses"], maxlen=self.config.recent)
        self.deviations = deque(state["deviations"], maxlen=self.config.window)
        self.norms = deque(state["norms"], maxlen=self.config.recent)
        self.first_outlier, self.in_a_row = state["first_outlier"], state["in_a_row"]
        self.high_norms = state["high_norms"]
        self.limits = deque(
            Limits(*(math.inf if value is None else value for value in limits)) for limits in state["limits"]
        )
