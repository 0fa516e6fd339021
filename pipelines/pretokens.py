"""Pre-tokens: the pieces of a text, mostly words, within which byte-level BPE merges.

Two published splits, as compiled scanners over UTF-8 bytes that cut where their regular expressions do: GPT-2's
(Radford et al. 2019) and that of GPT-4's cl100k_base, which Llama 3 took over. Letters, numbers and white space are
what the regular expressions of the ``tokenizers`` package take for such, in whose format the tokenizer is saved.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numba import njit

Kind = Literal["gpt2", "gpt4"]

OTHER, LETTER, NUMBER, SPACE = 0, 1, 2, 3
LONGEST_COUNTED = 1 << 16  # bytes; longer pre-tokens are no words, and would fill the tables
_ENTRIES = 1 << 20
_ARENA = 1 << 25
_MIX = np.uint64(0x9E3779B97F4A7C15)


def gpt4_pattern(digits: int) -> str:
    """The regular expression of cl100k_base, with at most ``digits`` digits in a pre-token."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        + (f"{{1,{digits}}}" if digits > 1 else "")
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def pre_tokenizer(kind: Kind, digits: int) -> Any:
    """The same split as a pre-tokenizer of the ``tokenizers`` package."""
    from tokenizers import Regex, pre_tokenizers

    if kind == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Split(Regex(gpt4_pattern(digits)), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def scanner_digits(kind: Kind, digits: int) -> int:
    """What the compiled functions take for the kind: 0 is GPT-2's split, else GPT-4's with so many digits at most."""
    return 0 if kind == "gpt2" else digits


@functools.cache
def char_classes() -> np.ndarray:
    """Class of every code point, (0x110000,) uint8: OTHER, LETTER, NUMBER or SPACE."""
    classes = np.full(0x110000, OTHER, np.uint8)
    at = 0
    for run in _RUNS.split():
        gap, kind, length = re.fullmatch("([0-9a-f]+)([LNS])([0-9a-f]+)", run).groups()
        at += int(gap, 16)
        classes[at : at + int(length, 16)] = " LNS".index(kind)
        at += int(length, 16)
    return classes


@njit(cache=True, nogil=True)
def _char(data, i, end, classes):
    """Class of the character at ``i`` and the position after it; a byte that is no UTF-8 is OTHER by itself."""
    first = np.int64(data[i])
    if first < 0x80:
        return np.int64(classes[first]), i + 1
    if first < 0xC2 or first > 0xF4:
        return OTHER, i + 1
    size = 2 if first < 0xE0 else (3 if first < 0xF0 else 4)
    if i + size > end:
        return OTHER, i + 1
    point = first & (0x7F >> size)
    for k in range(1, size):
        byte = np.int64(data[i + k])
        if byte & 0xC0 != 0x80:
            return OTHER, i + 1
        point = point << 6 | (byte & 0x3F)
    if point > 0x10FFFF:
        return OTHER, i + 1
    return np.int64(classes[point]), i + size


@njit(cache=True, nogil=True)
def _run(data, i, end, classes, wanted):
    """The first position from ``i`` on whose character is not of the class ``wanted``."""
    while i < end:
        kind, after = _char(data, i, end, classes)
        if kind != wanted:
            break
        i = after
    return i


@njit(cache=True, nogil=True)
def _contraction(data, i, end, any_case):
    """The end of 's, 't, 're, 've, 'm, 'll or 'd at ``i``, which is an apostrophe; else ``i``."""
    if i + 1 >= end:
        return i
    a = data[i + 1]
    if any_case:
        if a == 0xC5 and i + 2 < end and data[i + 2] == 0xBF:  # the long s, which folds to s
            return i + 3
        a |= 0x20
    if a == 0x73 or a == 0x74 or a == 0x6D or a == 0x64:
        return i + 2
    if i + 2 < end:
        b = data[i + 2]
        if any_case:
            b |= 0x20
        if (a == 0x72 and b == 0x65) or (a == 0x76 and b == 0x65) or (a == 0x6C and b == 0x6C):
            return i + 3
    return i


@njit(cache=True, nogil=True)
def _white(data, i, end, classes, lines):
    r"""The end of white space at ``i``: with ``lines`` up to the last line end in it, else all but its last character.

    ``\s*[\r\n]+`` for ``lines``, then ``\s+(?!\S)|\s+``.
    """
    last, newline, j = i, i, i
    while j < end:
        kind, after = _char(data, j, end, classes)
        if kind != SPACE:
            break
        last = j
        if data[j] == 0x0A or data[j] == 0x0D:
            newline = after
        j = after
    if lines and newline > i:
        return newline
    return j if j == end or last == i else last


@njit(cache=True, nogil=True)
def _gpt2_end(data, i, end, classes):
    kind, after = _char(data, i, end, classes)
    if data[i] == 0x20 and after < end:
        next_kind, next_after = _char(data, after, end, classes)
        if next_kind != SPACE:
            return _run(data, next_after, end, classes, next_kind)
    if kind == SPACE:
        return _white(data, i, end, classes, False)
    return _run(data, after, end, classes, kind)


@njit(cache=True, nogil=True)
def _gpt4_end(data, i, end, classes, digits):
    first = data[i]
    kind, after = _char(data, i, end, classes)
    if kind == LETTER:
        return _run(data, after, end, classes, LETTER)
    if kind == NUMBER:
        for _ in range(1, digits):
            if after < end:
                kind, then = _char(data, after, end, classes)
                if kind == NUMBER:
                    after = then
        return after
    if after < end:
        next_kind, next_after = _char(data, after, end, classes)
        if next_kind == LETTER and first != 0x0A and first != 0x0D:
            return _run(data, next_after, end, classes, LETTER)
        if next_kind == OTHER and first == 0x20:
            kind = OTHER
    if kind == SPACE:
        return _white(data, i, end, classes, True)
    after = _run(data, after, end, classes, OTHER)
    while after < end and (data[after] == 0x0A or data[after] == 0x0D):
        after += 1
    return after


@njit(cache=True, nogil=True)
def pretoken_end(data, i, end, classes, digits):
    """Where the pre-token that begins at ``i`` ends, in a text that ends at ``end``; digits as of scanner_digits."""
    if data[i] == 0x27:
        after = _contraction(data, i, end, digits > 0)
        if after > i:
            return after
    return _gpt4_end(data, i, end, classes, digits) if digits else _gpt2_end(data, i, end, classes)


@njit(cache=True, nogil=True)
def _word_key(data, i, j):
    """A key of the bytes ``[i, j)``, uint64: up to 7 bytes as they are, under their number; of longer ones a hash."""
    size = j - i
    if size < 8:
        key = np.uint64(size) << np.uint64(56)
        for k in range(size):
            key |= np.uint64(data[i + k]) << np.uint64(8 * k)
        return key
    key = np.uint64(size) * _MIX
    k = i
    while k + 8 <= j:
        part = np.uint64(0)
        for m in range(8):
            part |= np.uint64(data[k + m]) << np.uint64(8 * m)
        key = (key ^ part) * _MIX
        key ^= key >> np.uint64(32)
        k += 8
    part = np.uint64(0)
    for m in range(j - k):
        part |= np.uint64(data[k + m]) << np.uint64(8 * m)
    key = (key ^ part) * _MIX
    key ^= key >> np.uint64(29)
    return key | np.uint64(0xFF) << np.uint64(56)


@njit(cache=True, nogil=True)
def _slot_of(key, mask):
    """First place to look for ``key`` in an open table of ``mask + 1`` places."""
    mixed = key * _MIX
    mixed ^= mixed >> np.uint64(32)
    return np.int64(mixed * _MIX >> np.uint64(20)) & mask


@njit(cache=True, nogil=True)
def _same(data, i, other, j, size):
    """Whether the ``size`` bytes from ``i`` on are those from ``j`` on in ``other``."""
    k = 0
    while k < size and data[i + k] == other[j + k]:
        k += 1
    return k == size


@njit(cache=True, nogil=True)
def _count(data, offsets, place, classes, digits, keys, counts, starts, sizes, arena, used):
    """Count pre-tokens from ``place`` (text, position) on until all texts are done or the tables are full.

    ``used`` holds the entries and the arena's bytes in use. Returns the place to go on from.
    """
    mask = len(keys) - 1
    text, i = place
    while text < len(offsets) - 1:
        end = offsets[text + 1]
        if i < offsets[text]:
            i = offsets[text]
        while i < end:
            j = pretoken_end(data, i, end, classes, digits)
            size = j - i
            if size <= LONGEST_COUNTED:
                key = _word_key(data, i, j)
                slot = _slot_of(key, mask)
                while counts[slot]:
                    same = keys[slot] == key and sizes[slot] == size
                    if same and (size < 8 or _same(data, i, arena, starts[slot], size)):
                        break
                    slot = (slot + 1) & mask
                if counts[slot] == 0:
                    if used[0] * 2 > mask or used[1] + size > len(arena):
                        return text, i
                    keys[slot], starts[slot], sizes[slot] = key, used[1], size
                    for k in range(size):
                        arena[used[1] + k] = data[i + k]
                    used[0] += 1
                    used[1] += size
                counts[slot] += 1
            i = j
        text += 1
    return text, i


@njit(cache=True, nogil=True)
def _buckets(data, offsets, n):
    out = np.empty(len(offsets) - 1, np.int64)
    for word in range(len(out)):
        out[word] = _slot_of(_word_key(data, offsets[word], offsets[word + 1]), (1 << 32) - 1) % n
    return out


def word_buckets(words: pa.Array | pa.ChunkedArray, n: int) -> np.ndarray:
    """A bucket below ``n`` for each word, by its bytes alone, (words,) int64."""
    return _buckets(*utf8(words), n)


def utf8(column: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of a text column and where its values begin, (bytes,) uint8 and (n + 1,) int64; a null is empty.

    A ``large_string`` or ``large_binary`` column in one piece is not copied.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if column.type not in (pa.large_string(), pa.large_binary()):
        column = column.cast(pa.large_binary())
    if column.null_count:
        column = column.cast(pa.large_binary()).fill_null(b"")
    _, offsets, data = column.buffers()
    if not len(column):
        return np.empty(0, np.uint8), np.zeros(1, np.int64)
    starts = np.frombuffer(offsets, np.int64, len(column) + 1, column.offset * 8)
    return (np.frombuffer(data, np.uint8) if data is not None and data.size else np.empty(0, np.uint8)), starts


def count(columns: Iterable[pa.Array | pa.ChunkedArray], kind: Kind, digits: int) -> Iterator[pa.Table]:
    """Pre-tokens of the texts with their counts, as tables ``(word: large_binary, count: int64)``.

    Memory is bounded: when the table in hand is full it is yielded and a new one begun, so a word can come again.
    """
    classes, scan = char_classes(), scanner_digits(kind, digits)

    def fresh() -> tuple[np.ndarray, ...]:
        sizes = (np.uint64, np.int64, np.int64, np.int32)
        return *(np.zeros(2 * _ENTRIES, dtype) for dtype in sizes), np.empty(_ARENA, np.uint8), np.zeros(2, np.int64)

    tables = fresh()
    for column in columns:
        data, offsets = utf8(column)
        place = (0, 0)
        while True:
            place = _count(data, offsets, place, classes, scan, *tables)
            if place[0] >= len(offsets) - 1:
                break
            yield _counted(*tables)
            tables = fresh()
    if tables[-1][0]:
        yield _counted(*tables)


def _counted(
    keys: np.ndarray, counts: np.ndarray, starts: np.ndarray, sizes: np.ndarray, arena: np.ndarray, used: np.ndarray
) -> pa.Table:
    filled = np.flatnonzero(counts)
    filled = filled[np.argsort(starts[filled])]  # as they were first met, which is how the arena holds them
    offsets = np.append(starts[filled], used[1])
    words = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(filled), [None, pa.py_buffer(offsets), pa.py_buffer(arena[: used[1]])]
    )
    return pa.table({"word": words, "count": counts[filled]})


# Letters (L), numbers (N) and white space (S) of Unicode 16, as the regular expressions of the tokenizers package know
# them; Python's own tables differ from release to release. Of each run, in hexadecimal: how many characters of no class
# stand before it, its class, how many characters it has.
_RUNS = """
9S5 12S1 fNa 7L1a 6L1a aS1 1aS1 9L1 7N2 1L1 3N1 0L1 1N3 1L17 1L1f 1L1ca 4Lc eL5 7L1 1L1 81L5 1L2 2L4 1L1 6L1 1L3 1L1
1L14 1L53 1L8b 8La6 1L26 2L1 6L29 47L1b 4L4 2dL2b 15Na 4L2 1L63 1L1 fL2 7L2 0Na 0L3 2L1 10L1 1L1e 1dL59 bL1 eNa 0L21
9L2 4L1 5L16 4L1 9L1 3L1 17L19 7Lb 5L18 1L6 11L2a 3aL36 3L1 12L1 7La 4Na 1L10 4L8 2L2 2L16 1L7 1L1 3L4 3L1 10L1 dL2
1L3 4Na 0L2 2N6 2L1 8L6 4L2 2L16 1L7 1L2 1L2 1L2 1fL4 1L1 7Na 2L3 10L9 1L3 1L16 1L7 1L2 1L5 3L1 12L1 fL2 4Na 9L1 bL8
2L2 2L16 1L7 1L2 1L5 3L1 1eL2 1L3 4Na 1L1 0N6 bL1 1L6 3L3 1L4 3L2 1L1 1L2 3L2 3L3 3Lc 16L1 15Nd 12L8 1L3 1L17 1L10 3L1
1aL3 2L1 2L2 4Na 8N7 1L1 4L8 1L3 1L17 1La 1L5 3L1 1fL2 1L2 4Na 1L2 11L9 1L3 1L29 2L1 10L1 5L3 1N7 0L3 4N13 1L6 5L12
3L18 1L9 1L1 2L7 1fNa 11L30 1L2 cL7 9Na 27L2 1L1 1L5 1L18 1L1 1La 1L2 9L1 2L5 1L1 9Na 2L4 20L1 1fN14 cL8 1L24 1bL5
73L2b 14L1 0Na 6L6 4L4 3L1 3L2 7L3 4Ld cL1 1Na 6L26 1L1 5L1 2L2b 1L14d 1L4 2L7 1L1 1L4 2L29 1L4 2L21 1L4 2L7 1L1 1L4
2Lf 1L39 1L4 2L43 eN14 3L10 10L56 2L6 3L26c 2L11 0S1 0L1a 5L4b 3N3 0L8 7L12 dL13 eL12 eLd 1L3 fL34 23L1 4L1 3Na 6Na
16Na 6L59 7L5 2L22 1L1 5L46 aL1f 27Na 0L1e 2L5 bL2c 4L1a 6Nb 25L17 9L35 2bNa 6Na dL1 5dL2f 11L8 3Na 29L1e dL2 0Na 0L2c
1aL24 1cNa 3L3 0Na 0L24 2Lb 5L2b 2L3 29L4 1L6 1L2 3L1 5Lc0 40L116 2L6 2L26 2L6 2L8 1L1 1L1 1L1 1L1f 2L35 1L7 1L1 3L3
1L7 3L4 2L6 4Ld 5L3 1L7 3Sb 1dS2 5S1 2fS1 10N1 0L1 2N6 5L1 0Na 6Ld 65L1 4L1 2La 1L1 3L5 6L1 1L1 1L1 1L4 1Lb 2L4 5L5
4L1 1N33 0L2 0N5 2d6N3c 4eN16 276N1e 46cLe5 6L4 3L2 9N1 2L26 1L1 5L1 2L38 7L1 10L17 9L7 1L7 1L7 1L7 1L7 1L7 1L7 1L7
50L1 1d0S1 4L2 0N1 19N9 7L5 2N3 0L2 4L56 6L3 1L5a 1L4 5L2b 1L5e 3N4 aL20 30L10 20Na 1eN8 1Nf 20Na 27Nf 140L19c0
40L568d 43L2e 2L10d 3L10 0Na 0L2 14L2f 10L1f 2L46 0Na 27L9 2L67 2L43 2L2 1L1 1L8 15L10 1L3 1L4 1L17 dN6 aL34 eL32 1cNa
18L6 3L1 1L2 1Na 0L1c aL17 19L1d 7L2f 1cL1 0Na 6L5 1La 0Na 0L5 1L29 17L3 1L8 4Na 6L17 3L1 3L32 1L1 3L2 2L5 2L1 1L1
18L3 2Lb 7L3 cL6 2L6 2L6 9L7 1L7 1L2b 1Le 6L73 dNa 6L2ba4 cL17 4L31 2104L16e 2L6a 26L7 cL5 5L1 1La 1Ld 1L5 1L1 1L2 1L2
1L6c 21L16b 12L40 2L36 28Lc 74L5 1L87 13Na 7L1a 6L1a bL59 3L6 2L6 2L6 2L3 23Lc 1L1a 1L13 1L2 1Lf 2Le 22L7b cN2d cN39
11N2 f4L1d 3L31 10N1b 4L20 0N4 9L14 0N1 0L8 0N1 5L26 aL1e 2L24 4L8 1N5 2aL9e 2Na 6L24 4L24 4L28 8L34 cLb 1Lf 1L7 1L2
1Lb 1Lf 1L7 1L2 3L34 cL137 9L16 aL8 18L6 1L2a 1L9 45L6 2L1 1L2c 1L2 3L1 2L17 2N8 0L17 2N7 0L1f 8N9 30L13 1L2 5N5 0L16
0N6 4L1a 46L38 4N2 0L2 0N10 2N2e 0L1 fL4 1L3 1L1d aN9 17L1d 0N2 1L1d 0N3 20L8 1L1c 6N5 10L36 aL16 2N8 0L13 5N8 0L12
17N7 50L49 37L33 dL33 7N6 0L24 cNa 6Na 0L1c 9L17 daN1f 1L2a 6L2 10L3 3bL1d 0Na 0L1 8L16 bN4 1bL12 2eL15 0N7 14L17 cL35
1aN1e 1L2 2L1 dL2d 20L19 7Na 9L24 fNa 4L1 2L1 8L23 3L1 cL30 eL4 bNa 0L1 1L1 4N14 bL12 1L19 13L2 3fL7 1L1 1L4 1Lf 1La
7L2f 11Na bL8 2L2 2L16 1L7 1L2 1L5 3L1 12L1 cL5 1eLa 1L1 2L1 1L26 1L1 19L1 1L1 2cL35 12L4 5Na 5L3 1eL30 14L2 1L1 8Na
a6L2f 29L4 24L30 14L1 bNa 26L2b dL1 7Na 6N14 1cL1b 15Nc 4L7 b9L2c 74L40 0N13 cL8 2L1 2L8 1L2 1L18 fL1 1L1 eNa 46L8
2L27 10L1 1L1 1cL1 aL28 7L1 15L1 bL2e 13L1 12L49 c7L21 fNa 6L9 1L25 11L1 fN1d 5L1e 70L7 1L2 1L26 15L1 9Na 6L6 1L2 1L20
eL1 7Na 136L13 fL1 1Ld 1L22 1cNa 56L1 fN15 2bL39a 66N6f 11Lc4 a4cL61 fL430 11L6 19Lf9b 5L247 1ab9L1e 12Na 6c6L239 7L1f
1Na 6L4f 1Na 6L1e 12L30 10L4 cNa 1N7 1L15 5L13 1b0L2d 3Na c6L40 0N17 69L4b 5L1 42Ld 40L2 1L1 1cL17f8 8L4d6 29La 22e7L4
1L7 1L2 1L123 fL1 1dL3 2L1 eL4 8L18c 904L6b 5Ld 3L9 7La 1056Na 5c6N14 cN14 6cN19 87L55 1L47 1L2 2L1 2L2 2L4 1Lc 1L1
1L7 1L41 1L4 2L8 1L7 1L1c 1L4 1L5 1L1 3L7 1L154 2L19 1L19 1L1f 1L19 1L1f 1L19 1L1f 1L19 1L1f 1L19 1L8 2N32 700L1f 6L6
105L3e 92L2d aL7 2Na 4L1 141L1e 12L2c 4Na 1d6L1c 4Na d6L1e 2L1 0Na 1e5L7 1L4 1L2 1Lf 1Lc5 2N9 30L44 7L1 4Na 317N3b 1N3
1N4 4cN2d 1Nf c2L4 1L1b 1L2 1L1 2L1 1La 1L4 1L1 1L1 6L1 4L1 1L1 1L1 1L3 1L2 1L1 2L1 1L1 1L1 1L1 1L1 1L2 1L1 2L4 1L7
1L4 1L4 1L1 1La 1L11 5L3 1L5 1L11 244Nd ae3Na 406La6e0 20L103a 6Lde 2L1682 eL1d31 fL26e 9a2L21e 5e2L134b 5L1060
"""
