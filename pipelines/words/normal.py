"""Words without regard to case and punctuation, and their n-grams: what near-duplicates and overlaps are found by.

A word is a run of letters, marks and numbers in lower case; in scripts without spaces (see ``characters``) each
character, with the marks on it, is a word.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.words import characters
from pipelines.words.codes import PRIME, SEED, decode, kernel, mix
from pipelines.words.columns import buffers

_SOLID = characters.SOLID
_MARK = characters.MARK
_SINGLE = characters.SINGLE
_STEP = np.uint64(0xD6E8FEB86659FD93)


class NormalWords(NamedTuple):
    """The words of all documents of a column, one after the other.

    Attributes:
        hashes: of each word in lower case, (words,), uint64; the same in every text, process and version.
        starts: first byte of each word within its document's UTF-8, (words,), int64.
        ends: one past its last byte, (words,), int64.
        offsets: document d has the words ``offsets[d]`` to ``offsets[d + 1]``, (documents + 1,), int64.
    """

    hashes: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    offsets: np.ndarray


def normal_words(column: pa.Array | pa.ChunkedArray) -> NormalWords:
    """Cut the documents of a string column into words; null is an empty document."""
    data, offsets = buffers(column)
    room = int(offsets[-1] - offsets[0]) // 2 + len(offsets)  # the most that there can be; untouched memory is free
    words = NormalWords(
        np.empty(room, np.uint64), np.empty(room, np.int64), np.empty(room, np.int64), np.zeros(len(offsets), np.int64)
    )
    _cut(data, offsets, characters.flags(), characters.lower(), *words)
    for array in words[:3]:
        array.resize(words.offsets[-1], refcheck=False)
    return words


def ngram_hashes(words: NormalWords, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the word n-grams of each document.

    A document of fewer than n words has one n-gram, all its words; one without words has none. N-gram i of a document
    starts at its word i.

    Args:
        words: of the documents.
        n: words of an n-gram, at least 1.

    Returns:
        Hashes, (n-grams,), uint64, and the range of each document in them, (documents + 1,), int64.
    """
    if n < 1:
        raise ValueError(f"n is {n}; an n-gram has at least one word")
    counts = np.diff(words.offsets)
    grams = np.where(counts == 0, 0, np.maximum(1, counts - (n - 1)))
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(grams, out=offsets[1:])
    hashes = np.empty(offsets[-1], np.uint64)
    _ngrams(words.hashes, words.offsets, offsets, n, hashes)
    return hashes, offsets


def shingles(column: pa.Array | pa.ChunkedArray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """32-bit hashes of the word n-grams of each document, for MinHash.

    Returns:
        Hashes, (shingles,), uint32, and the range of each document in them, (documents + 1,), int64.
    """
    hashes, offsets = ngram_hashes(normal_words(column), n)
    return (hashes >> np.uint64(32)).astype(np.uint32), offsets


@kernel
def _cut(data, offsets, flags, lower, hashes, starts, ends, counts):
    n = 0
    for d in range(len(offsets) - 1):
        begin, end = offsets[d], offsets[d + 1]
        i = begin
        start = np.int64(-1)
        single = False
        h = SEED
        while True:
            code, size, flag = np.int64(0), 1, np.uint32(0)
            if i < end:
                code = np.int64(data[i])
                if code >= 0x80:
                    code, size = decode(data, i, end)
                flag = flags[code]
            solid = (flag & _SOLID) != 0
            if start >= 0 and (not solid or ((flag & _MARK) == 0 and (single or (flag & _SINGLE) != 0))):
                hashes[n], starts[n], ends[n] = mix(h), start - begin, i - begin
                n += 1
                start = -1
            if i >= end:
                break
            if solid:
                if start < 0:
                    start, h = i, SEED
                    single = (flag & _SINGLE) != 0
                h = (h ^ np.uint64(lower[code])) * PRIME
            i += size
        counts[d + 1] = n


@kernel
def _ngrams(hashes, offsets, out_offsets, n, out):
    top = np.uint64(1)
    for _ in range(n - 1):
        top *= _STEP
    for d in range(len(offsets) - 1):
        first, last, at = offsets[d], offsets[d + 1], out_offsets[d]
        if first == last:
            continue
        gram = np.uint64(0)
        for i in range(first, last):
            if i >= first + n:
                gram -= hashes[i - n] * top
            gram = gram * _STEP + hashes[i]
            if i >= first + n - 1:
                out[at] = mix(gram)
                at += 1
        if last - first < n:
            out[at] = mix(gram)
