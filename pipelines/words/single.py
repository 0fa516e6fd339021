"""The one fast pass over a text that filters and deduplication share: words, lines, paragraphs and their hashes.

Everything is numpy over code points, with no Python object per word. One prefix sum of ``code * BASE**position``
(mod 2**64) gives the polynomial hash of any stretch of the text by one subtraction, so that words, lines and
paragraphs are hashed by the same pass; multiplying with the inverse power of the start makes the hash independent of
where the stretch lies.
"""

from __future__ import annotations

import functools
import unicodedata
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

SPACE = 1
"""Flag of a character that ``str.isspace`` accepts."""
LETTER = 2
"""Flag of a character that ``str.isalpha`` accepts."""
SOLID = 4
"""Flag of a character that is neither space nor punctuation, symbol or control: letters, marks and digits."""

_BASE = 0x9E3779B97F4A7C15 | 1  # odd, so that it has an inverse modulo 2**64
_INVERSE = pow(_BASE, -1, 2**64)
_NGRAM = np.uint64(0xD6E8FEB86659FD93)
_CACHED = 1 << 20  # powers kept between calls: 2 * 8 MB a process; longer texts compute theirs anew


class Spans(NamedTuple):
    """Stretches of a text: first code point, one past the last (int64), and a hash of the content (uint64)."""

    starts: np.ndarray
    ends: np.ndarray
    hashes: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Code points of each stretch, int64."""
        return self.ends - self.starts


@dataclass(slots=True)
class Words:
    """A text cut into words.

    Attributes:
        text: the text.
        starts: code point at which each word starts, (words,), int64.
        ends: one past its last, (words,), int64.
        hashes: a hash of each word, (words,), uint64; equal words have equal hashes in every text and process.
        flags: which of LETTER and SOLID occur in each word, (words,), uint8.
        lines: the non-empty lines (cut at every newline).
        paragraphs: stretches of the stripped text between runs of two or more newlines.
    """

    text: str
    starts: np.ndarray
    ends: np.ndarray
    hashes: np.ndarray
    flags: np.ndarray
    lines: Spans
    paragraphs: Spans

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> np.ndarray:
        """Code points of each word, int64."""
        return self.ends - self.starts


class Texts(list):
    """The analysed texts of a batch."""

    @classmethod
    def of(cls, column: Any) -> Texts:
        """The texts of an Arrow column."""
        return cls(analyse(text or "") for text in column.to_pylist())

    def filter(self, mask: np.ndarray) -> Texts:
        """Those where ``mask`` is true."""
        return Texts(words for words, keep in zip(self, mask.tolist(), strict=True) if keep)


def analyse(text: str, *, letters: bool = False) -> Words:
    """Cut a text into words, lines and paragraphs and hash them.

    Args:
        text: any string, lone surrogates included.
        letters: cut words at everything that is not SOLID, so that punctuation neither joins nor changes words;
            by default words are what ``str.split`` gives.
    """
    if text.isascii():
        codes = np.frombuffer(text.encode(), np.uint8)
    else:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    n = len(codes)
    flags = _character_flags()[codes]
    inside = np.zeros(n + 2, np.int8)
    inside[1:-1] = (flags & SOLID) != 0 if letters else (flags & SPACE) == 0
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    starts, ends = edges[::2], edges[1::2]

    powers, inverses = _powers(n)
    prefix = np.zeros(n + 1, np.uint64)
    np.multiply(codes, powers, out=prefix[1:], dtype=np.uint64, casting="unsafe")
    np.cumsum(prefix[1:], out=prefix[1:])

    def spans(starts: np.ndarray, ends: np.ndarray) -> Spans:
        # The length is mixed in so that runs of code point 0 differ.
        hashes = (prefix[ends] - prefix[starts]) * inverses[starts] + (ends - starts).astype(np.uint64)
        return Spans(starts, ends, _mix(hashes))

    newlines = np.flatnonzero(codes == 10)
    line_starts, line_ends = np.concatenate(([0], newlines + 1)), np.concatenate((newlines, [n]))
    filled = line_ends > line_starts
    line_starts, line_ends = line_starts[filled], line_ends[filled]
    word_flags = np.bitwise_or.reduceat(flags, starts) & (LETTER | SOLID) if len(starts) else flags[:0]
    return Words(
        text,
        starts,
        ends,
        spans(starts, ends).hashes,
        word_flags,
        spans(line_starts, line_ends),
        spans(*_paragraphs(text, n, line_starts, line_ends)),
    )


def _paragraphs(text: str, n: int, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lines joined where a single newline lies between them, within the stripped text."""
    first, last = n - len(text.lstrip()), len(text.rstrip())
    keep = (ends > first) & (starts < last)
    starts, ends = np.maximum(starts[keep], first), np.minimum(ends[keep], last)
    if not len(starts):
        return starts, ends
    breaks = starts[1:] - ends[:-1] > 1
    return starts[np.concatenate(([True], breaks))], ends[np.concatenate((breaks, [True]))]


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """Hashes of the word n-grams, in order.

    Args:
        hashes: of the words, (words,), uint64.
        n: words of an n-gram, at least 1.

    Returns:
        (max(0, words - n + 1),), uint64.
    """
    count = max(0, len(hashes) - n + 1)
    grams = hashes[:count].copy()
    for i in range(1, n):
        grams *= _NGRAM
        grams += hashes[i : i + count]
    return grams


def extend_ngrams(grams: np.ndarray, hashes: np.ndarray, n: int) -> np.ndarray:
    """From the hashes of all n-grams to those of all (n+1)-grams; the same values as ``ngram_hashes``."""
    return grams[:-1] * _NGRAM + hashes[n:]


class Repeats(NamedTuple):
    """The entries of an array that occur in it more than once, ordered by value and then by position.

    Attributes:
        positions: indices, int64.
        groups: number of the value each belongs to, from 0, int64.
        first: index into ``positions`` of each group's first entry, (groups,), int64.
        counts: entries of each group, (groups,), int64.
    """

    positions: np.ndarray
    groups: np.ndarray
    first: np.ndarray
    counts: np.ndarray


def repeats(hashes: np.ndarray) -> Repeats:
    """Which hashes of an array of well-mixed uint64 occur more than once.

    Sorts the values with their positions packed into the low bits, some ten times as fast as an argsort; of n values
    64 - log2(n) bits are compared.
    """
    n = len(hashes)
    bits = np.uint64(n.bit_length())
    packed = (hashes >> bits << bits) | np.arange(n, dtype=np.uint64)
    packed.sort()
    value = packed >> bits
    same = np.zeros(n + 1, bool)
    same[1:-1] = value[1:] == value[:-1]
    again = same[:-1]  # equal to the one before
    member = again | same[1:]
    positions = (packed[member] & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
    opens = ~again[member]
    first = np.flatnonzero(opens)
    counts = np.diff(np.concatenate((first, [len(positions)])))
    return Repeats(positions, np.cumsum(opens) - 1, first, counts)


def word_hash(word: str) -> int:
    """The hash that ``analyse`` gives to a word."""
    words = analyse(word)
    if len(words) != 1:
        raise ValueError(f"{word!r} is not one word")
    return int(words.hashes[0])


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele et al. 2014), in place: every input bit changes every output bit."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


@functools.lru_cache(maxsize=1)
def _character_flags() -> np.ndarray:
    """Flags of every code point, (0x110000,), uint8; some 0.3 s once a process."""
    flags = np.zeros(0x110000, np.uint8)
    for code in range(0x110000):
        c = chr(code)
        category = unicodedata.category(c)
        if c.isspace():
            flags[code] = SPACE
        elif category[0] in "LMN":
            flags[code] = SOLID | (LETTER if c.isalpha() else 0)
    return flags


@functools.lru_cache(maxsize=1)
def _cached_powers() -> tuple[np.ndarray, np.ndarray]:
    return _compute_powers(_CACHED)


def _powers(n: int) -> tuple[np.ndarray, np.ndarray]:
    """``BASE**i`` and ``BASE**-i`` modulo 2**64; (n,) and (n + 1,), uint64."""
    if n >= _CACHED:
        powers, inverses = _compute_powers(n + 1)
    else:
        powers, inverses = _cached_powers()
    return powers[:n], inverses[: n + 1]


def _compute_powers(n: int) -> tuple[np.ndarray, np.ndarray]:
    def power(base: int) -> np.ndarray:
        out = np.full(n, base, np.uint64)
        out[0] = 1
        return np.cumprod(out)

    return power(_BASE), power(_INVERSE)
