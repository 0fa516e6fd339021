"""Words and sentences as spaCy's blank English pipeline cuts them (tokenizer and sentencizer), in compiled code.

A text is cut at white space. Of each stretch the punctuation at both ends comes off piece by piece, unless the rest is
one of ``english.exceptions``; what remains is kept whole if it is a URL, a host name or an e-mail address, and else cut
at hyphens, dots, commas, slashes and symbols between letters. Exceptions whose parts then stand side by side are joined
again (``word:)`` ends in a smiley). A sentence starts at the first word that is no punctuation after a closing mark.

Differences from spaCy, all rare in English: letters are those of Unicode, where spaCy lists those of some forty
scripts; symbols are Unicode's newest; in scripts without spaces every character is a word with the marks on it; a
stretch of more than a million characters without white space is cut there.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from pipelines.words import characters
from pipelines.words.codes import PRIME, SEED, decode, hash_codes, kernel, mix
from pipelines.words.cutting import LONGEST, SLOTS, UNIT, cut_stretch, joined, slot_of
from pipelines.words.english import UNITS, exceptions

LETTERS = 1
"""Flag of a word that holds a letter."""
COUNTED = 2
"""Flag of a word that is not all punctuation, as Gopher's rules count words."""
PUNCTUATION = 4
"""Flag of a word that is all Unicode punctuation."""
SENTENCE = 8
"""Flag of a word that starts a sentence."""

_SPACE, _MARK, _SINGLE, _COMPLEX = characters.SPACE, characters.MARK, characters.SINGLE, characters.COMPLEX
_LETTER, _WORDY, _PUNCT, _STOP = characters.LETTER, characters.WORDY, characters.PUNCT, characters.STOP
_DIGIT = characters.DIGIT
_STRETCH = 1 << 20  # characters without white space that are looked at together


class Exceptions(NamedTuple):
    """The words that are cut otherwise, as a hash table for the kernel.

    Attributes:
        keys: hash of the word, or of a unit; 0 where the slot is free, (slots,), uint64.
        pieces: characters of up to four pieces, a byte each, (slots,), uint32.
        parts: into how many parts the rules would cut the word, if more than one, (slots,), int64.
        lengths: by the low byte of a word's first character, a bit for each length in characters, (256,), uint32.
        pairs: by the low bytes of the first characters of two neighbours: may they be parts of such a word, (256, 256).
    """

    keys: np.ndarray
    pieces: np.ndarray
    parts: np.ndarray
    lengths: np.ndarray
    pairs: np.ndarray


class Tokens(NamedTuple):
    """Words of all documents, one after the other.

    Attributes:
        hashes: of each word, (words,), uint64; the same in every text, process and version.
        starts: first byte of each word within its document's UTF-8, (words,), int32.
        ends: one past its last byte, (words,), int32.
        lengths: its characters, (words,), int32.
        flags: LETTERS, COUNTED, PUNCTUATION and SENTENCE, (words,), uint8.
        first: first word of each document, (documents,), int64.
        last: one past its last word, (documents,), int64.
    """

    hashes: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    lengths: np.ndarray
    flags: np.ndarray
    first: np.ndarray
    last: np.ndarray


def tokens(data: np.ndarray, offsets: np.ndarray) -> Tokens:
    """Cut documents into words.

    Args:
        data: UTF-8, uint8.
        offsets: where each document lies in it, (documents + 1,), int64.
    """
    return _tokens(data, offsets, english())


def word_hash(word: str) -> int:
    """The hash of a word, whatever the rules would cut it into."""
    return int(hash_codes(np.array([*map(ord, word)], np.uint32)))


@functools.lru_cache(maxsize=1)
def english() -> Exceptions:
    """The table of English exceptions."""
    words = exceptions()
    empty = Exceptions(
        np.zeros(SLOTS, np.uint64),
        np.zeros(SLOTS, np.uint32),
        np.zeros(SLOTS, np.int64),
        np.zeros(256, np.uint32),
        np.zeros((256, 256), np.bool_),
    )
    found = Exceptions(*(array.copy() for array in empty))
    for array in empty:
        _frozen(array)
    # The rules alone say which parts of an exception will stand side by side.
    texts = [word.encode() for word in words]
    offsets = np.cumsum([0, *map(len, texts)])
    cut = _tokens(np.frombuffer(b"".join(texts), np.uint8), _frozen(offsets), empty)
    counts = cut.last - cut.first
    for i, (word, pieces) in enumerate(words.items()):
        slot = _free(found.keys, word_hash(word))
        found.pieces[slot] = sum(len(piece) << 8 * k for k, piece in enumerate(pieces))
        found.lengths[ord(word[0]) & 0xFF] |= np.uint32(1 << len(word))
        if counts[i] > 1:
            found.parts[slot] = counts[i]
            second = texts[i][cut.starts[cut.first[i] + 1] :].decode()[0]
            found.pairs[ord(word[0]) & 0xFF, ord(second) & 0xFF] = True
    for unit in UNITS:
        _free(found.keys, word_hash(unit) ^ int(UNIT))
    for array in found:
        _frozen(array)
    return found


def _free(keys: np.ndarray, key: int) -> int:
    slot = key & (SLOTS - 1)
    while keys[slot]:
        slot = (slot + 1) & (SLOTS - 1)
    keys[slot] = key
    return slot


def _frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False  # one type for numba, which compiles anew for another
    return array


def _tokens(data: np.ndarray, offsets: np.ndarray, special: Exceptions) -> Tokens:
    room = int(offsets[-1] - offsets[0]) + 1  # the most words that there can be; memory that stays untouched is free
    found = Tokens(
        np.empty(room, np.uint64),
        np.empty(room, np.int32),
        np.empty(room, np.int32),
        np.empty(room, np.int32),
        np.empty(room, np.uint8),
        *np.zeros((2, len(offsets) - 1), np.int64),
    )
    longest = min(_STRETCH, int(np.diff(offsets).max(initial=0))) + 1
    codes, kinds, at, bounds = (np.empty(longest, t) for t in (np.uint32, np.uint32, np.int32, np.int32))
    cuts = np.zeros(longest, np.bool_)
    n = _run(data, offsets, characters.flags(), *special, *found, codes, kinds, at, bounds, cuts)
    for array in found[:5]:
        array.resize(n, refcheck=False)
    return found


@kernel
def _run(  # noqa: C901 - one loop, for speed
    data,
    offsets,
    table,
    keys,
    pieces,
    parts,
    lengths,
    pairs,
    hashes,
    starts,
    ends,
    sizes,
    flags,
    firsts,
    last,
    codes,
    kinds,
    at,
    bounds,
    cuts,
):
    n = np.int64(0)
    for d in range(len(offsets) - 1):
        begin, end = offsets[d], offsets[d + 1]
        firsts[d] = n
        seen = True  # a closing mark; the first word starts a sentence
        first = True
        i = begin
        while i < end:
            # white space; all but a single blank is a word of its own to the sentencizer
            gap = i
            blank = True
            while i < end:
                code, size = np.int64(data[i]), np.int64(1)
                if code >= 0x80:
                    code, size = decode(data, i, end)
                if table[code] & _SPACE == 0:
                    break
                blank = code == 0x20
                i += size
            if i >= end:
                break
            starts_sentence = first or (seen and i > gap and not (blank and i == gap + 1))
            if starts_sentence:
                seen = False
            first = False
            # a stretch without white space
            start = i
            m = np.int64(0)
            every, some = np.uint32(0xFFFFFFFF), np.uint32(0)
            h = SEED
            while i < end and m < _STRETCH:
                code, size = np.int64(data[i]), np.int64(1)
                if code >= 0x80:
                    code, size = decode(data, i, end)
                kind = table[code]
                if kind & (_SPACE | _SINGLE):
                    if kind & _SPACE or m > 0:
                        break
                    every &= kind
                    some |= kind
                    h = (h ^ np.uint64(code)) * PRIME
                    m = np.int64(1)
                    i += size
                    while i < end:  # marks on the character
                        code, size = decode(data, i, end)
                        if table[code] & _MARK == 0:
                            break
                        every &= table[code]
                        some |= table[code]
                        h = (h ^ np.uint64(code)) * PRIME
                        m += 1
                        i += size
                    break
                every &= kind
                some |= kind
                h = (h ^ np.uint64(code)) * PRIME
                m += 1
                i += size
            h = mix(h)
            plain = some & _COMPLEX == 0 and (some & _DIGIT == 0 or every & _DIGIT)
            if plain and m <= LONGEST and slot_of(keys, h) >= 0:
                plain = False
            if plain or m == 1:
                hashes[n] = h
                starts[n], ends[n] = start - begin, i - begin
                sizes[n] = m
                flag = (LETTERS if some & _LETTER else 0) | (COUNTED if some & _WORDY else 0)
                stop = m == 1 and every & _STOP
                if every & _PUNCT:
                    flag |= PUNCTUATION
                elif seen and not stop:
                    flag |= SENTENCE
                    seen = False
                if stop:
                    seen = True
                if starts_sentence:
                    flag |= SENTENCE
                flags[n] = flag
                n += 1
                continue
            # character by character
            p = start
            dots = False
            for k in range(m):
                code, size = decode(data, p, end)
                codes[k], kinds[k], at[k] = code, table[code], p - begin
                dots = dots or code == 0x2E
                p += size
            at[m] = i - begin
            cut_stretch(codes, kinds, m, dots, cuts, keys, pieces, lengths)
            cuts[m] = True
            bounds[0] = 0
            k = np.int64(0)
            for p in range(1, m + 1):
                if cuts[p]:
                    k += 1
                    bounds[k] = p
                    cuts[p] = False
            cuts[0] = False
            t = np.int64(0)
            while t < k:
                count, slot = joined(codes, bounds, t, k, keys, parts, pairs)
                for u in range(t + 1, t + count):
                    if joined(codes, bounds, u, k, keys, parts, pairs)[0] > count:
                        count = 0  # a longer one starts within this one
                        break
                if count == 0:
                    count, rest = np.int64(1), np.uint32(0)
                    hi = np.int64(bounds[t + 1])
                else:
                    rest = pieces[slot]
                    hi = np.int64(bounds[t]) + (rest & np.uint32(0xFF))
                    rest >>= np.uint32(8)
                lo = np.int64(bounds[t])
                while True:
                    every, some = np.uint32(0xFFFFFFFF), np.uint32(0)
                    h = SEED
                    for p in range(lo, hi):
                        h = (h ^ np.uint64(codes[p])) * PRIME
                        every &= kinds[p]
                        some |= kinds[p]
                    hashes[n] = mix(h)
                    starts[n], ends[n] = at[lo], at[hi]
                    sizes[n] = hi - lo
                    flag = (LETTERS if some & _LETTER else 0) | (COUNTED if some & _WORDY else 0)
                    stop = hi - lo == 1 and every & _STOP
                    if every & _PUNCT:
                        flag |= PUNCTUATION
                    elif seen and not stop:
                        flag |= SENTENCE
                        seen = False
                    if stop:
                        seen = True
                    if starts_sentence:
                        flag |= SENTENCE
                        starts_sentence = False
                    flags[n] = flag
                    n += 1
                    if rest == 0:
                        break
                    lo = hi
                    hi += np.int64(rest & np.uint32(0xFF))
                    rest >>= np.uint32(8)
                t += count
        last[d] = n
    return n
