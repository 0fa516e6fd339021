"""Loss of a model from its parameters and tokens: L(N, D) = E + A / N^alpha + B / D^beta.

Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", approach 3: the law is fitted by minimizing the
Huber loss between logarithms of predicted and measured losses with L-BFGS from a grid of starts. Besiroglu et al. 2024,
"Chinchilla Scaling: A replication attempt", found that the published constants came from a minimization that had
stopped early; here the logarithms of N and D are centred and the objective is of the order of 1, so that it does not.

A ladder of few runs does not determine five constants: at a single ratio of tokens to parameters fewer are free
(``Form``), and the exponents are held near those that were published, by a prior that counts for little more than one
measurement: hundreds of runs override it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from enum import Enum

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize

DELTA = 1e-3  # Huber's, in log loss: Hoffmann et al.'s
NOISE = 0.003  # relative standard deviation of a final loss between runs that differ only in their seed
_NOISE_WEIGHT = 4  # measurements that NOISE counts as beside those there are
_EXPONENT = 0.35  # Hoffmann et al. and Besiroglu et al. have 0.28 to 0.37, approaches 1 and 2 near 0.5
_EXPONENT_SPREAD = 0.4  # of its logarithm: a factor of 1.5
_STARTS = 12  # of the grid's points, the best of which are minimized from
_EXPONENTS = (0.02, 2.0)
_SAME_RATIO = 1.15  # tokens a parameter that differ by less are one ratio


@dataclass(frozen=True)
class Law:
    """The five constants; losses in nats a token, N in parameters, D in tokens."""

    E: float
    """Loss that no size and no amount of data gets below."""
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: ArrayLike, tokens: ArrayLike) -> np.ndarray:
        """Predicted loss."""
        n, d = np.asarray(parameters, float), np.asarray(tokens, float)
        return self.E + self.A / n**self.alpha + self.B / d**self.beta

    def optimum(self, flops: ArrayLike, flops_per_weight: float = 6.0) -> tuple[np.ndarray, np.ndarray]:
        """The (parameters, tokens) of the lowest loss that a budget buys (their equation 4).

        Args:
            flops: floating-point operations of the training.
            flops_per_weight: of each parameter for each token.
        """
        budget = np.asarray(flops, float) / flops_per_weight
        both = self.alpha + self.beta
        scale = (self.alpha * self.A / (self.beta * self.B)) ** (1 / both)
        n = scale * budget ** (self.beta / both)
        return n, budget / n


class Form(Enum):
    """Which constants are free, by what the measurements can tell apart.

    FULL: all five. LINE: measurements at one ratio of tokens to parameters; alpha = beta, and that ratio is taken for
    the compute-optimal one, which decides how much of the loss is due to N and how much to D. Along the line of that
    ratio this assumption changes nothing.
    """

    FULL = "E, A, B, alpha, beta"
    LINE = "E, alpha = beta, A and B in the proportion for which the measured ratio is compute-optimal"

    @property
    def free(self) -> int:
        """Number of free constants."""
        return {Form.FULL: 5, Form.LINE: 3}[self]


def form_for(parameters: ArrayLike, tokens: ArrayLike) -> Form:
    """The form that so many measurements allow.

    Raises:
        ValueError: there are too few for any.
    """
    n, d = np.asarray(parameters, float), np.asarray(tokens, float)
    ratios, sizes = np.sort(d / n), len(np.unique(np.round(np.log(n), 2)))
    if sizes < 3 or len(n) < 4:
        raise ValueError(f"{len(n)} runs of {sizes} sizes; a scaling law wants at least 4, of 3 sizes")
    several = ratios[-1] / ratios[0] > _SAME_RATIO
    return Form.FULL if several and len(n) > Form.FULL.free else Form.LINE


def fit(parameters: ArrayLike, tokens: ArrayLike, losses: ArrayLike, form: Form | None = None) -> Law:
    """The law that the measurements follow most closely.

    Args:
        parameters: N of each run, (runs,).
        tokens: D of each, (runs,).
        losses: what each ended with, in nats a token, (runs,), above 0.
        form: which constants are free; None takes what the measurements allow.

    Raises:
        ValueError: there are too few measurements.
    """
    problem = _Problem(parameters, tokens, form)
    return problem.law(problem.solve(np.log(np.asarray(losses, float))))


@dataclass(frozen=True)
class Fitted:
    """A law with what is not known of it.

    Attributes:
        law: fitted to the measurements.
        form: which of its constants were free.
        draws: laws that the measurements could as well have come from.
        noise: relative standard deviation of one measured loss, one for each draw, (draws,).
        residuals: log of each measured loss over the law's, (runs,).
    """

    law: Law
    form: Form
    draws: list[Law]
    noise: np.ndarray
    residuals: np.ndarray

    def interval(self, what: Callable[[Law], float], confidence: float = 0.9) -> tuple[float, float]:
        """Where a quantity of the law lies, with this probability."""
        values = [float(what(law)) for law in self.draws]
        low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
        return float(low), float(high)

    def measured(self, parameters: float, tokens: float, confidence: float = 0.9) -> tuple[float, float]:
        """Where the loss of one more run will be measured: as ``interval``, with the noise of that run itself."""
        losses = np.array([float(law.loss(parameters, tokens)) for law in self.draws])
        scatter = np.random.default_rng(0).standard_normal((20, len(losses)))
        values = losses * np.exp(self.noise * scatter)
        low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
        return float(low), float(high)


def fit_with_uncertainty(
    parameters: ArrayLike,
    tokens: ArrayLike,
    losses: ArrayLike,
    form: Form | None = None,
    draws: int = 200,
    seed: int = 0,
) -> Fitted:
    """``fit``, and a parametric bootstrap: the law is fitted again to losses drawn around it.

    Drawing measurements with replacement, as usual with hundreds of runs, would leave a ladder of four with one size.
    How far losses scatter is not known well from few residuals either, and those of a fit with nearly as many constants
    are next to nothing; so ``NOISE`` counts as some measurements beside them (a scaled inverse chi-squared prior), and
    each draw has a noise of its own, which makes the intervals of few runs as wide as Student's t would.

    Args:
        parameters: N of each run, (runs,).
        tokens: D of each, (runs,).
        losses: what each ended with, (runs,).
        form: which constants are free; None takes what the measurements allow.
        draws: number of fits.
        seed: of the drawn losses.

    Raises:
        ValueError: there are too few measurements.
    """
    problem = _Problem(parameters, tokens, form)
    measured = np.log(np.asarray(losses, float))
    best = problem.solve(measured)
    predicted = problem.log_loss(best)
    residuals = measured - predicted
    freedom = max(len(measured) - problem.form.free, 0)
    weight = freedom + _NOISE_WEIGHT
    variance = (np.sum(residuals**2) + _NOISE_WEIGHT * NOISE**2) / weight
    random = np.random.default_rng(seed)
    noise = np.sqrt(weight * variance / random.chisquare(weight, draws))
    laws = []
    for spread in noise:
        drawn = predicted + spread * random.standard_normal(len(measured))
        prior = math.log(_EXPONENT) + _EXPONENT_SPREAD * random.standard_normal()  # as uncertain as the losses
        laws.append(problem.law(problem.solve(drawn, starts=[best], prior=prior)))
    return Fitted(problem.law(best), problem.form, laws, noise, residuals)


class _Problem:
    """The minimization, over (a, b, e, alpha, beta) with log N and log D centred: a = log(A / N0^alpha) and so on."""

    def __init__(self, parameters: ArrayLike, tokens: ArrayLike, form: Form | None) -> None:
        n, d = np.asarray(parameters, float), np.asarray(tokens, float)
        self.form = form or form_for(n, d)
        if len(n) < self.form.free:
            raise ValueError(f"{len(n)} runs do not determine {self.form.free} constants")
        self.n0, self.d0 = np.log(n).mean(), np.log(d).mean()
        self.x, self.y = np.log(n) - self.n0, np.log(d) - self.d0
        # The five are linear in those that are free. LINE, with a = b: at the optimum alpha·A/N^alpha = beta·B/D^beta.
        self.matrix = {
            Form.FULL: np.eye(5),
            Form.LINE: np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]], float),
        }[self.form]
        self.exponents = {Form.FULL: slice(3, 5), Form.LINE: slice(2, 3)}[self.form]  # among the free ones

    def terms(self, free: np.ndarray) -> np.ndarray:
        """Logarithms of the law's three terms at each measurement, (3, runs)."""
        a, b, e, alpha, beta = self.matrix @ free
        return np.stack([a - alpha * self.x, b - beta * self.y, np.full_like(self.x, e)])

    def log_loss(self, free: np.ndarray) -> np.ndarray:
        """Logarithm of the predicted losses, (runs,)."""
        return np.logaddexp.reduce(self.terms(free))

    def law(self, free: np.ndarray) -> Law:
        """The constants as the formula has them."""
        a, b, e, alpha, beta = self.matrix @ free
        scaled = (math.exp(e), math.exp(a + alpha * self.n0), math.exp(b + beta * self.d0), alpha, beta)
        return Law(*(float(constant) for constant in scaled))

    def solve(
        self, log_losses: np.ndarray, starts: list[np.ndarray] | None = None, prior: float = math.log(_EXPONENT)
    ) -> np.ndarray:
        """The free constants that fit best, from the best of a grid of starts or from those that are given.

        Args:
            log_losses: (runs,).
            starts: None takes the grid.
            prior: logarithm of what the exponents are held near.
        """
        if starts is None:
            grid = np.array(list(self._grid(float(np.exp(log_losses).min()))))
            values = [self._objective(start, log_losses, prior)[0] for start in grid]
            starts = list(grid[np.argsort(values)[:_STARTS]])
        bounds = [(-30.0, 10.0)] * self.form.free
        bounds[self.exponents] = [_EXPONENTS] * len(bounds[self.exponents])
        found = [
            minimize(
                self._objective,
                start,
                args=(log_losses, prior),
                jac=True,
                method="L-BFGS-B",
                bounds=bounds,
                options={"maxiter": 2000, "maxfun": 5000, "ftol": 1e-12, "gtol": 1e-6, "maxcor": 20},
            )
            for start in starts
        ]
        return min(found, key=lambda result: result.fun).x

    def _grid(self, lowest: float) -> itertools.product:
        """Starts: E as a share of the lowest loss, the rest of it in parts due to N and to D, and the exponents."""
        for share, part, alpha, beta in itertools.product(
            (0.1, 0.4, 0.7, 0.9), (0.2, 0.5, 0.8), (0.15, 0.35, 0.7, 1.2), (0.15, 0.35, 0.7, 1.2)
        ):
            if self.form is not Form.FULL and alpha != beta:
                continue
            if self.form is Form.LINE and part != 0.5:
                continue
            rest = lowest * (1 - share)
            five = [math.log(rest * part), math.log(rest * (1 - part)), math.log(lowest * share), alpha, beta]
            yield np.linalg.lstsq(self.matrix, np.array(five), rcond=None)[0]

    def _objective(self, free: np.ndarray, log_losses: np.ndarray, prior: float) -> tuple[float, np.ndarray]:
        """Sum of Huber losses over DELTA^2 with the prior's term, and its gradient."""
        terms = self.terms(free)
        predicted = np.logaddexp.reduce(terms)
        off = (predicted - log_losses) / DELTA
        value = np.where(np.abs(off) <= 1, 0.5 * off**2, np.abs(off) - 0.5).sum()
        slope = np.clip(off, -1, 1) / DELTA
        share = np.exp(terms - predicted) * slope  # of each term in the predicted loss, times the slope
        five = [share[0].sum(), share[1].sum(), share[2].sum(), -(share[0] @ self.x), -(share[1] @ self.y)]
        gradient = self.matrix.T @ np.array(five)
        exponents, weight = free[self.exponents], (NOISE / DELTA) ** 2
        away = (np.log(exponents) - prior) / _EXPONENT_SPREAD
        gradient[self.exponents] += weight * away / (_EXPONENT_SPREAD * exponents)
        return float(value + 0.5 * weight * np.sum(away**2)), gradient


def constants(law: Law) -> dict[str, float]:
    """The constants by name."""
    return dict(zip(("E", "A", "B", "alpha", "beta"), astuple(law), strict=True))
