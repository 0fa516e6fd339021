"""Which of many word n-grams occur in texts: one lookup a word in a table that fits a processor's cache."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.words import normal, normal_words
from pipelines.words.codes import kernel

_FILTER_BITS = 8  # a hash; of the table's size, so that most words are settled by one bit


class Table(NamedTuple):
    """Hashes of n-grams, open addressing with linear probing.

    Attributes:
        hashes: of the n-grams, (n-grams,), uint64.
        slots: number of the n-gram that lies there, or -1, (power of two,), int32.
        bits: bit ``hash % size`` is set for every hash, (power of two,), uint64.
        lengths: how many words n-grams have, ascending, each once.
    """

    hashes: np.ndarray
    slots: np.ndarray
    bits: np.ndarray
    lengths: list[int]

    @classmethod
    def of(cls, hashes: np.ndarray, lengths: list[int]) -> Table:
        """The table of some hashes, each once."""
        size = 1 << max(6, (2 * len(hashes)).bit_length())
        slots = np.full(size, -1, np.int32)
        bits = np.zeros(size * _FILTER_BITS // 64, np.uint64)
        hashes = np.ascontiguousarray(hashes, np.uint64)
        _insert(hashes, slots, bits)
        return cls(hashes, slots, bits, sorted(set(lengths)))


class Matches(NamedTuple):
    """Where n-grams were found, ordered by document within each length, (matches,), int64.

    Attributes:
        documents: which document.
        starts: first byte within its UTF-8.
        ends: one past the last.
        ngrams: number of the n-gram in the table.
    """

    documents: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    ngrams: np.ndarray


def matches(column: pa.Array | pa.ChunkedArray, table: Table) -> Matches:
    """All places in the texts of a column where an n-gram of the table stands."""
    words = normal_words(column)
    found = [_of_length(words, length, table) for length in table.lengths]
    return Matches(*(np.concatenate([part[i] for part in found] or [np.zeros(0, np.int64)]) for i in range(4)))


def _of_length(words: normal.NormalWords, length: int, table: Table) -> Matches:
    grams, offsets = normal.ngram_hashes(words, length)
    out = np.empty((1024, 3), np.int64)
    while (count := _look_up(grams, offsets, words.offsets, length, *table[:3], out)) > len(out):
        out = np.empty((count, 3), np.int64)
    documents, first, ngrams = out[:count].T
    return Matches(documents, words.starts[first], words.ends[first + length - 1], ngrams)


@kernel
def _insert(hashes, slots, bits):
    mask = np.uint64(len(slots) - 1)
    bit_mask = np.uint64(64 * len(bits) - 1)
    for number in range(len(hashes)):
        h = hashes[number]
        bits[(h & bit_mask) >> np.uint64(6)] |= np.uint64(1) << (h & np.uint64(63))
        at = (h >> np.uint64(20)) & mask
        while slots[at] >= 0:
            at = (at + np.uint64(1)) & mask
        slots[at] = number


@kernel
def _look_up(grams, offsets, word_offsets, length, hashes, slots, bits, out):
    """Write (document, its first word's number in the column, n-gram) as far as there is room; returns how many."""
    mask = np.uint64(len(slots) - 1)
    bit_mask = np.uint64(64 * len(bits) - 1)
    count = 0
    for d in range(len(offsets) - 1):
        if word_offsets[d + 1] - word_offsets[d] < length:
            continue  # its one n-gram is shorter
        for i in range(offsets[d], offsets[d + 1]):
            h = grams[i]
            if not (bits[(h & bit_mask) >> np.uint64(6)] >> (h & np.uint64(63))) & np.uint64(1):
                continue
            at = (h >> np.uint64(20)) & mask
            while slots[at] >= 0 and hashes[slots[at]] != h:
                at = (at + np.uint64(1)) & mask
            if slots[at] >= 0:
                if count < len(out):
                    out[count, 0] = d
                    out[count, 1] = word_offsets[d] + i - offsets[d]
                    out[count, 2] = slots[at]
                count += 1
    return count
