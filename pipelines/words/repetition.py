"""What repeats within each document: equal spans, frequent and duplicated n-grams; and sums over words. Compiled code.

Hash tables with open addressing, one document at a time; 64-bit hashes stand for the content.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from pipelines.words.codes import kernel
from pipelines.words.lines import Spans
from pipelines.words.tokens import COUNTED, LETTERS, Tokens, word_hash

_STEP = np.uint64(0xD6E8FEB86659FD93)


def duplicates(spans: Spans, skip: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Spans that occurred before in the same document.

    Args:
        spans: of all documents.
        skip: spans with any of these flags are not looked at.

    Returns:
        How many there are, and their characters, (documents,), int64.
    """
    keys = np.zeros(1 << (2 * _most(spans) + 2).bit_length(), np.uint64)
    counts, characters = np.zeros((2, len(spans.first)), np.int64)
    _duplicates(spans.hashes, spans.lengths, spans.flags, spans.first, spans.last, skip, keys, counts, characters)
    return counts, characters


def within(spans: Spans, mask: np.ndarray) -> np.ndarray:
    """How many of each document's spans have ``mask`` (spans,), bool; (documents,), int64."""
    before = np.concatenate((np.zeros(1, np.int64), np.cumsum(mask)))
    return before[spans.last] - before[spans.first]


def ngram_characters(
    words: Tokens, top: Iterable[int], duplicated: Iterable[int]
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Characters in n-grams that repeat.

    Of the most frequent n-gram (the one that occurs first, if several are equally frequent): its words joined by
    single spaces, times its occurrences; 0 for a document of fewer than n words. Of duplicated n-grams: the document is
    walked from its start; an n-gram that was met before counts with the characters of its words and is skipped as a
    whole, any other is remembered and the walk moves on by one word.

    Args:
        words: of all documents.
        top: which n to take the most frequent n-gram of.
        duplicated: which n to take the duplicated n-grams of.

    Returns:
        The characters of each document by n, (documents,), int64: of the most frequent n-gram, of duplicated n-grams.
    """
    top, duplicated = [*top], [*duplicated]
    sizes = sorted({*top, *duplicated})
    wanted = np.zeros(sizes[-1] + 1 if sizes else 1, np.bool_)
    wanted[sizes] = True
    found = np.zeros((2, len(wanted), len(words.first)), np.int64)
    if sizes:
        longest = _most(words) + 1
        slots = 1 << (2 * longest).bit_length()
        keys, counts = np.zeros(slots, np.uint64), np.zeros(slots, np.int32)
        grams, sums = np.empty(longest, np.uint64), np.zeros(longest + 1, np.int64)
        places, slot = np.empty(longest, np.int32), np.empty(longest, np.int32)
        _ngrams(
            words.hashes, words.lengths, words.first, words.last, wanted, keys, counts, grams, sums, places, slot, found
        )
    return {n: found[0, n] for n in top}, {n: found[1, n] for n in duplicated}


def totals(words: Tokens, listed: Iterable[str]) -> np.ndarray:
    """Sums over the words of each document.

    Args:
        words: of all documents.
        listed: words to look for.

    Returns:
        (4, documents), int64: words that are not all punctuation, their characters, words that hold a letter, and how
        many different ones of the listed words occur.
    """
    found = np.zeros((4, len(words.first)), np.int64)
    hashes = np.array([word_hash(word) for word in dict.fromkeys(listed)], np.uint64)
    keys = np.zeros(max(256, 1 << (4 * len(hashes)).bit_length()), np.uint64)
    for h in hashes.tolist():
        slot = h & (len(keys) - 1)
        while keys[slot]:
            slot = (slot + 1) & (len(keys) - 1)
        keys[slot] = h
    _totals(
        words.hashes, words.lengths, words.flags, words.first, words.last, keys, np.zeros(len(keys), np.int64), found
    )
    return found


def _most(spans: Tokens | Spans) -> int:
    return int((spans.last - spans.first).max(initial=0))


@kernel
def _duplicates(hashes, lengths, flags, first, last, skip, keys, counts, characters):
    for d in range(len(first)):
        size = last[d] - first[d]
        if size < 2:
            continue
        slots = np.int64(4)
        while slots < 2 * size:
            slots *= 2
        keys[:slots] = 0
        mask = np.uint64(slots - 1)
        for i in range(first[d], last[d]):
            if flags[i] & skip:
                continue
            h = max(hashes[i], np.uint64(1))
            slot = np.int64(h & mask)
            while keys[slot] != 0 and keys[slot] != h:
                slot = np.int64(np.uint64(slot + 1) & mask)
            if keys[slot] == h:
                counts[d] += 1
                characters[d] += lengths[i]
            keys[slot] = h


@kernel
def _ngrams(hashes, lengths, first, last, wanted, keys, counts, grams, sums, places, slot_of, found):  # noqa: C901 - one loop
    start = np.int64(0)
    while not wanted[start]:
        start += 1
    for d in range(len(first)):
        begin, size = first[d], last[d] - first[d]
        for i in range(size):
            sums[i + 1] = sums[i] + lengths[begin + i]
        # places: where an n-gram may repeat, which is where the n-grams of n - 1 words do, here and one word on
        n_places = max(np.int64(0), size - start + 1)
        for i in range(n_places):
            gram = np.uint64(0)
            for k in range(start):
                gram = gram * _STEP + hashes[begin + i + k]
            grams[i], places[i] = gram, i
        for n in range(start, len(wanted)):
            if n > size:
                break
            if n > start:
                for k in range(n_places):
                    i = places[k]
                    grams[i] = grams[i] * _STEP + hashes[begin + i + n - 1]
            most = np.int32(1)
            if n_places > 1:
                slots = np.int64(4)
                while slots < 2 * n_places:
                    slots *= 2
                mask = np.uint64(slots - 1)
                keys[:slots] = 0
                for k in range(n_places):
                    gram = max(grams[places[k]], np.uint64(1))
                    slot = np.int64((gram ^ (gram >> np.uint64(32))) & mask)
                    while keys[slot] != 0 and keys[slot] != gram:
                        slot = np.int64(np.uint64(slot + 1) & mask)
                    if keys[slot] == 0:
                        keys[slot], counts[slot] = gram, 0
                    counts[slot] += 1
                    most = max(most, counts[slot])
                    slot_of[k] = slot
            if wanted[n]:
                top = np.int64(0)
                if most > 1:
                    k = np.int64(0)
                    while counts[slot_of[k]] != most:
                        k += 1
                    top = places[k]
                found[0, n, d] = most * (sums[top + n] - sums[top] + n - 1)
            if most > 1:
                # drop what does not repeat; a count of 0 marks an n-gram that was met in the walk
                kept = np.int64(0)
                for k in range(n_places):
                    if counts[slot_of[k]] > 1:
                        places[kept], slot_of[kept] = places[k], slot_of[k]
                        kept += 1
                if wanted[n]:
                    at = np.int64(0)
                    characters = np.int64(0)
                    for k in range(kept):
                        i = np.int64(places[k])
                        if i < at:
                            continue
                        if counts[slot_of[k]] == 0:
                            characters += sums[i + n] - sums[i]
                            at = i + n
                        else:
                            counts[slot_of[k]] = 0
                    found[1, n, d] = characters
                n_places = np.int64(0)
                for k in range(kept - 1):
                    if places[k + 1] == places[k] + 1:
                        places[n_places] = places[k]
                        n_places += 1
            else:
                n_places = np.int64(0)


@kernel
def _totals(hashes, lengths, flags, first, last, keys, met, found):
    mask = np.uint64(len(keys) - 1)
    for d in range(len(first)):
        counted = characters = letters = listed = np.int64(0)
        for i in range(first[d], last[d]):
            flag = flags[i]
            if flag & COUNTED:
                counted += 1
                characters += lengths[i]
            if flag & LETTERS:
                letters += 1
            slot = np.int64(hashes[i] & mask)
            while keys[slot] != 0:
                if keys[slot] == hashes[i]:
                    if met[slot] != d + 1:
                        met[slot] = d + 1
                        listed += 1
                    break
                slot = np.int64(np.uint64(slot + 1) & mask)
        found[0, d], found[1, d], found[2, d], found[3, d] = counted, characters, letters, listed
