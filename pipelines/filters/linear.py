"""Logistic regression over hashed word n-grams: the compiled loops and the training of ``quality``.

A document becomes a vector of ``2**bits`` numbers: each n-gram's hash picks the place, ``log(1 + count)`` is the value,
and the vector is scaled to length 1, so that long and short documents are alike. On real text these values told two
kinds of document apart better than plain counts, shares or presence.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numba import njit

from pipelines.words import normal_words

_STEP = np.uint64(0x9FB21C651E98DF25)
_SPREAD = np.uint64(0xC2B2AE3D27D4EB4F)


class Features(NamedTuple):
    """Sparse vectors of documents, one after the other.

    Attributes:
        places: indices of the values, (values,), int32.
        values: (values,), float32.
        offsets: document d has the values ``offsets[d]`` to ``offsets[d + 1]``, (documents + 1,), int64.
    """

    places: np.ndarray
    values: np.ndarray
    offsets: np.ndarray


def features(column: pa.Array | pa.ChunkedArray, ngrams: int, bits: int) -> Features:
    """The vectors of texts: n-grams of 1 to ``ngrams`` words, hashed to ``2**bits`` places."""
    words = normal_words(column)
    return Features(*_features(words.hashes, words.offsets, ngrams, bits))


def concatenate(parts: list[Features]) -> Features:
    """The documents of all parts as one."""
    starts = np.cumsum([0, *(part.offsets[-1] for part in parts)])
    offsets = [part.offsets[1:] + start for part, start in zip(parts, starts, strict=False)]
    return Features(
        np.concatenate([part.places for part in parts]),
        np.concatenate([part.values for part in parts]),
        np.concatenate([np.zeros(1, np.int64), *offsets]),
    )


def select(x: Features, mask: np.ndarray) -> Features:
    """The documents where ``mask``, (documents,) bool, is true."""
    lengths = np.diff(x.offsets)
    values = np.repeat(mask, lengths)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[mask])])
    return Features(x.places[values], x.values[values], offsets)


def logits(x: Features, weights: np.ndarray, intercept: float) -> np.ndarray:
    """Log-odds of each document, (documents,), float64; ``weights`` is (2**bits,) float32."""
    return _dot(x.places, x.values, x.offsets, weights) + intercept


def sigmoid(z: np.ndarray) -> np.ndarray:
    """Probabilities of log-odds, without overflow."""
    return np.where(z >= 0, 1, np.exp(-np.abs(z))) / (1 + np.exp(-np.abs(z)))


def loss_and_gradient(
    parameters: np.ndarray, x: Features, y: np.ndarray, regularization: float
) -> tuple[float, np.ndarray]:
    """Log loss in nats with both classes weighing the same, plus ``regularization / 2`` times the squared weights.

    Args:
        parameters: weights and, last, the intercept, (2**bits + 1,), float64.
        x: documents.
        y: whether each is of the first class, (documents,), bool.
        regularization: of the weights; the intercept is free.
    """
    weights, sign = parameters[:-1], np.where(y, 1.0, -1.0)
    share = np.where(y, 0.5 / max(y.sum(), 1), 0.5 / max((~y).sum(), 1))
    margin = sign * (_dot(x.places, x.values, x.offsets, weights) + parameters[-1])
    loss = float(share @ np.logaddexp(0, -margin)) + regularization / 2 * float(weights @ weights)
    residual = -sign * share * sigmoid(-margin)
    gradient = np.empty_like(parameters)
    gradient[:-1] = regularization * weights
    _add(x.places, x.values, x.offsets, residual, gradient)
    gradient[-1] = residual.sum()
    return loss, gradient


def fit(x: Features, y: np.ndarray, bits: int, regularization: float) -> tuple[np.ndarray, float]:
    """The weights, (2**bits,) float32, and the intercept with the smallest loss, by L-BFGS from zero.

    The loss has one minimum, and all sums run in one order, so the same documents give the same model.
    """
    from scipy.optimize import minimize

    found = minimize(
        loss_and_gradient,
        np.zeros(2**bits + 1),
        args=(x, y, regularization),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 500, "ftol": 1e-7, "gtol": 1e-6},
    )
    return found.x[:-1].astype(np.float32), float(found.x[-1])


def area_under_curve(scores: np.ndarray, y: np.ndarray) -> float:
    """Probability that a document of the first class scores above one of the other; ties count half."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = (ends - (counts - 1) / 2)[inverse]  # ties share the mean of their ranks
    n = int(y.sum())
    return float((ranks[y].sum() - n * (n + 1) / 2) / (n * (len(y) - n)))


@njit(cache=True, nogil=True)
def _features(hashes, offsets, ngrams, bits):
    n = len(offsets) - 1
    places = np.empty((offsets[-1] - offsets[0]) * ngrams, np.int32)
    values = np.empty(len(places), np.float32)
    ranges = np.zeros(n + 1, np.int64)
    counts = np.zeros(1 << bits, np.int32)
    shift = np.uint64(64 - bits)
    at = 0
    for d in range(n):
        first = at
        for i in range(offsets[d], offsets[d + 1]):
            gram = hashes[i]
            for k in range(min(ngrams, i - offsets[d] + 1)):
                if k > 0:
                    gram = gram * _STEP + hashes[i - k]
                    gram ^= gram >> np.uint64(32)
                place = np.int32((gram * _SPREAD) >> shift)
                if counts[place] == 0:
                    places[at] = place
                    at += 1
                counts[place] += 1
        squares = 0.0
        for j in range(first, at):
            value = np.log1p(np.float32(counts[places[j]]))
            counts[places[j]] = 0
            values[j] = value
            squares += value * value
        if squares > 0:
            scale = np.float32(1 / np.sqrt(squares))
            for j in range(first, at):
                values[j] *= scale
        ranges[d + 1] = at
    return places[:at].copy(), values[:at].copy(), ranges


@njit(cache=True, nogil=True)
def _dot(places, values, offsets, weights):
    out = np.empty(len(offsets) - 1)
    for d in range(len(out)):
        total = 0.0
        for j in range(offsets[d], offsets[d + 1]):
            total += values[j] * weights[places[j]]
        out[d] = total
    return out


@njit(cache=True, nogil=True)
def _add(places, values, offsets, residual, gradient):
    for d in range(len(residual)):
        for j in range(offsets[d], offsets[d + 1]):
            gradient[places[j]] += values[j] * residual[d]
