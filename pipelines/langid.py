"""py3langid's classifier (Lui & Baldwin 2012) as one compiled pass over a whole column of text.

The model is the one in py3langid's wheel, and so are the answers: a byte automaton finds the n-grams that tell
languages apart, ``log1p`` of their counts weighs each language's log-likelihoods, and a softmax over scores divided by
the square root of the length makes probabilities. Only the loops are ours: they read Arrow's buffers, and add in a
fixed order, so that the same text has the same score on any machine.
"""

from __future__ import annotations

import functools
import unicodedata
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numba import njit

from pipelines.words.columns import buffers

_DOCUMENTS = 1024
"""Documents scored at one time: bounds the table of their scores."""

# what the compiled look at a start of a text finds
_LETTER = 1  # an ASCII letter
_LOWER = 2  # an ASCII lower-case letter
_ODD = 4  # a character that may not be in normal form C


class _Model(NamedTuple):
    labels: list[str]
    columns: np.ndarray  # class -> label, since a label may have two classes (two scripts)
    next_state: np.ndarray  # (rows * 256,) uint32
    row: np.ndarray  # (states,) uint32, offset of a state's row
    feature: np.ndarray  # (states,) int32, the n-gram that ends here, -1 if none
    table: np.ndarray  # (features, classes) float32
    prior: np.ndarray  # (classes,) float32


@functools.lru_cache(maxsize=1)
def model() -> _Model:
    """The model that ships with py3langid, unpacked once a process."""
    from py3langid.langid import MODEL_DIR, MODEL_FILE
    from py3langid.modelio import load_model

    table, prior, classes, next_state, row, feature = load_model(MODEL_DIR / MODEL_FILE)
    labels = list(dict.fromkeys(classes))
    return _Model(
        labels,
        np.array([labels.index(label) for label in classes]),
        np.array(next_state, np.uint32),
        np.array(row, np.uint32) << np.uint32(8),
        np.array(feature, np.int32),
        np.ascontiguousarray(table, np.float32),
        np.array(prior, np.float32),
    )


def classify(column: pa.Array | pa.ChunkedArray, characters: int) -> tuple[np.ndarray, np.ndarray]:
    """The most likely language of each text, from its first so many characters.

    Args:
        column: texts, large_string; null is a text without letters.
        characters: how much of each text is looked at.

    Returns:
        Indices into ``model().labels``, (documents,) int64, -1 for a text without letters; and probabilities,
        (documents,) float32, 0 for those.
    """
    data, offsets = buffers(column)
    labels, scores = np.full(len(column), -1), np.zeros(len(column), np.float32)
    for first in range(0, len(column), _DOCUMENTS):
        part = slice(first, first + _DOCUMENTS)
        labels[part], scores[part] = _classify(data, offsets[first : first + _DOCUMENTS + 1], characters)
    return labels, scores


def _classify(data: np.ndarray, offsets: np.ndarray, characters: int) -> tuple[np.ndarray, np.ndarray]:
    m = model()
    starts = offsets[:-1].copy()
    ends, found = _starts(data, offsets, characters)
    lettered = (found & _LETTER) != 0
    # What the kernel could not settle by looking at bytes, Python's own tables of Unicode settle.
    rewritten, at = [], len(data)
    for i in np.flatnonzero((found & (_LETTER | _LOWER | _ODD)) != (_LETTER | _LOWER)):
        text = data[starts[i] : ends[i]].tobytes().decode()
        lettered[i] = any(c.isalpha() for c in text)
        lowered = text.lower() if text.isupper() else text
        normal = unicodedata.normalize("NFC", lowered)
        if normal != text:
            new = normal.encode()
            rewritten.append(new)
            starts[i], ends[i] = at, at + len(new)
            at += len(new)
    extra = np.frombuffer(b"".join(rewritten), np.uint8)
    logs = np.log1p(np.arange((ends - starts).max(initial=0) + 1, dtype=np.float32))
    scores = _score(data, extra, starts, ends, logs, m.next_state, m.row, m.feature, m.table, m.prior)
    scores /= np.sqrt(np.maximum(ends - starts, 1)).astype(np.float32)[:, None]
    np.exp(scores - scores.max(axis=1, initial=-np.inf, keepdims=True), out=scores)
    scores /= scores.sum(axis=1, keepdims=True)
    by_label = np.zeros((len(scores), len(m.labels)), np.float32)
    for column, label in enumerate(m.columns):
        by_label[:, label] += scores[:, column]
    best = by_label.argmax(axis=1)
    probability = np.minimum(by_label[np.arange(len(best)), best], np.float32(1))
    return np.where(lettered, best, -1), np.where(lettered, probability, np.float32(0))


@njit(cache=True, nogil=True)
def _starts(data, offsets, characters):
    """Where the first so many characters of each text end, and which kinds of character are among them."""
    n = len(offsets) - 1
    ends = np.empty(n, np.int64)
    found = np.zeros(n, np.uint8)
    for i in range(n):
        at, end, left = offsets[i], offsets[i + 1], characters
        kinds = 0
        while at < end:
            byte = data[at]
            if byte & 0xC0 != 0x80:
                if left == 0:
                    break
                left -= 1
            if byte < 0x80:
                if 97 <= byte <= 122:
                    kinds |= 3
                elif 65 <= byte <= 90:
                    kinds |= 1
            elif byte >= 0xCC:  # below U+0300 all characters are in normal form C
                punctuation = byte == 0xE2 and data[at + 1] == 0x80 and data[at + 2] >= 0x82  # U+2002 to U+203F are
                ideograph = 0xE5 <= byte <= 0xE9  # U+5000 to U+9FFF are
                if not punctuation and not ideograph:
                    kinds |= 4
            at += 1
        ends[i] = at
        found[i] = kinds
    return ends, found


@njit(cache=True, nogil=True)
def _score(data, extra, starts, ends, logs, next_state, row, feature, table, prior):
    """Log-likelihood of every class for every text, (documents, classes); places behind ``data`` lie in ``extra``."""
    n, classes = len(starts), len(prior)
    scores = np.zeros((n, classes), np.float32)
    counts = np.zeros(len(table), np.int32)
    seen = np.empty(len(table) + 3, np.int32)
    for i in range(n):
        text, shift = data, 0
        if starts[i] >= len(data):
            text, shift = extra, len(data)
        state, distinct = np.uint32(0), 0
        for at in range(starts[i] - shift, ends[i] - shift):
            state = next_state[row[state] + text[at]]
            f = feature[state]
            if f >= 0:
                if counts[f] == 0:
                    seen[distinct] = f
                    distinct += 1
                counts[f] += 1
        if distinct == 0:
            continue
        # Four rows of the table at a time. The last rows are filled up with one whose count is 0 by then.
        for k in range(distinct, distinct + 3):
            seen[k] = seen[0]
        for k in range(0, distinct, 4):
            f0, f1, f2, f3 = seen[k], seen[k + 1], seen[k + 2], seen[k + 3]
            w0, counts[f0] = logs[counts[f0]], 0
            w1, counts[f1] = logs[counts[f1]], 0
            w2, counts[f2] = logs[counts[f2]], 0
            w3, counts[f3] = logs[counts[f3]], 0
            for c in range(classes):
                total = scores[i, c] + w0 * table[f0, c] + w1 * table[f1, c]
                scores[i, c] = total + w2 * table[f2, c] + w3 * table[f3, c]
        for c in range(classes):
            scores[i, c] += prior[c]
    return scores
