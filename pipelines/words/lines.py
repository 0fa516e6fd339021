"""Lines and paragraphs of texts, and what can be counted on the way, in compiled code.

The published rules cut lines in two ways: at every newline (FineWeb; Gopher's repetition, which skips empty lines), and
as ``str.splitlines`` does (Gopher's quality, C4). Both are read here; the second is only counted.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pipelines.words import characters
from pipelines.words.codes import PRIME, SEED, decode, kernel, mix

BLANK = 1
"""Flag of a line that holds nothing but white space."""
TERMINATED = 2
"""Flag of a line whose last character is a closing mark."""

_SPACE, _TERMINAL = characters.SPACE, characters.TERMINAL


class Spans(NamedTuple):
    """Stretches of all documents, one after the other.

    Attributes:
        hashes: of the content, (spans,), uint64.
        starts: first byte within the document's UTF-8, (spans,), int32.
        ends: one past the last byte, (spans,), int32.
        lengths: characters, (spans,), int32.
        flags: BLANK and TERMINATED, (spans,), uint8.
        first: first span of each document, (documents,), int64.
        last: one past its last span, (documents,), int64.
    """

    hashes: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    lengths: np.ndarray
    flags: np.ndarray
    first: np.ndarray
    last: np.ndarray


class Counts(NamedTuple):
    """What is counted in each document; all (documents,), int64.

    Attributes:
        characters: code points.
        newlines: newline characters.
        hashes: hash signs.
        ellipses: three dots, or the one character.
        lines: lines as ``str.splitlines`` gives them.
        bullets: those that start, after white space, with a bullet or a hyphen.
        trailing_off: those that end, before white space, with an ellipsis.
        edges: 1 if the first character is a newline, and 1 more if the last is.
    """

    characters: np.ndarray
    newlines: np.ndarray
    hashes: np.ndarray
    ellipses: np.ndarray
    lines: np.ndarray
    bullets: np.ndarray
    trailing_off: np.ndarray
    edges: np.ndarray


def lines(data: np.ndarray, offsets: np.ndarray) -> tuple[Spans, Spans, Counts]:
    """Cut documents into lines and paragraphs.

    Args:
        data: UTF-8, uint8.
        offsets: where each document lies in it, (documents + 1,), int64.

    Returns:
        The lines that are not empty, cut at newlines; the paragraphs, which are the stripped text cut at every run of
        two or more newlines; and the counts.
    """
    found, paragraphs = _room(offsets), _room(offsets)
    counts = np.zeros((len(Counts._fields), len(offsets) - 1), np.int64)
    n, m = _run(data, offsets, characters.flags(), *found, *paragraphs, counts)
    for spans, size in ((found, n), (paragraphs, m)):
        for array in spans[:5]:
            array.resize(size, refcheck=False)
    return found, paragraphs, Counts(*counts)


def _room(offsets: np.ndarray) -> Spans:
    room = int(offsets[-1] - offsets[0]) // 2 + len(offsets)  # the most that there can be; untouched memory is free
    kinds = (np.uint64, np.int32, np.int32, np.int32, np.uint8)
    return Spans(*(np.empty(room, kind) for kind in kinds), *np.zeros((2, len(offsets) - 1), np.int64))


@kernel
def _run(  # noqa: C901 - one loop, for speed
    data,
    offsets,
    table,
    hashes,
    starts,
    ends,
    lengths,
    flags,
    first,
    last,
    par_hashes,
    par_starts,
    par_ends,
    par_lengths,
    par_flags,
    par_first,
    par_last,
    counts,
):
    n = np.int64(0)
    m = np.int64(0)
    for d in range(len(offsets) - 1):
        begin, end = offsets[d], offsets[d + 1]
        first[d], par_first[d] = n, m
        # where the stripped text starts and ends
        left = begin
        while left < end:
            code, size = decode(data, left, end)
            if table[code] & _SPACE == 0:
                break
            left += size
        right = end
        while right > left:
            p = right - 1
            while p > left and right - p < 4 and data[p] & 0xC0 == 0x80:
                p -= 1
            code, size = decode(data, p, right)
            if table[code] & _SPACE == 0:
                break
            right = p
        if end > begin:
            counts[7, d] = (1 if data[begin] == 10 else 0) + (1 if data[end - 1] == 10 else 0)
        chars = newlines = signs = ellipses = split = bullets = trailing = np.int64(0)
        # the line at newlines, the paragraph, and the line of str.splitlines that are being read
        line, line_chars, line_hash = begin, np.int64(0), SEED
        blank, terminal = True, False
        par, par_chars, par_hash, pending = np.int64(-1), np.int64(0), SEED, np.int64(0)
        open_line, bare, bullet, dots, off = False, True, False, np.int64(0), False
        run = np.int64(0)  # dots one after the other, for the count
        i = begin
        while i <= end:
            if i == end or data[i] == 10:
                if i > line:
                    hashes[n] = mix(line_hash)
                    starts[n], ends[n], lengths[n] = line - begin, i - begin, line_chars
                    flags[n] = (BLANK if blank else 0) | (TERMINATED if terminal else 0)
                    n += 1
                line, line_chars, line_hash = i + 1, np.int64(0), SEED
                blank, terminal = True, False
            if par >= 0 and (i == right or (pending == 1 and i < right and data[i] == 10)):
                par_hashes[m] = mix(par_hash)
                par_starts[m], par_lengths[m], par_flags[m] = par - begin, par_chars, 0
                par_ends[m] = i - begin - pending
                m += 1
                par = np.int64(-1)
            if i == end:
                break
            code, size = np.int64(data[i]), np.int64(1)
            if code >= 0x80:
                code, size = decode(data, i, end)
            kind = table[code]
            chars += 1
            if code != 10:
                line_chars += 1
                terminal = kind & _TERMINAL != 0
                h = np.uint64(code)
                line_hash = (line_hash ^ h) * PRIME
                if left <= i < right:
                    if par < 0:
                        par, par_chars, par_hash = i, np.int64(0), SEED
                    elif pending:
                        par_hash = (par_hash ^ np.uint64(10)) * PRIME
                        par_chars += 1
                    par_hash = (par_hash ^ h) * PRIME
                    par_chars += 1
                pending = np.int64(0)
            else:
                newlines += 1
                pending += 1
            if code == 0x2E:
                run += 1
                if run == 3:
                    ellipses += 1
                    run = np.int64(0)
            else:
                run = np.int64(0)
                if code == 0x23:
                    signs += 1
                elif code == 0x2026:
                    ellipses += 1
            if kind & _SPACE:
                separator = 10 <= code <= 13 or 0x1C <= code <= 0x1E or code == 0x85 or code == 0x2028 or code == 0x2029
                if separator:
                    if not (code == 10 and i > begin and data[i - 1] == 13):
                        split += 1
                        bullets += 1 if bullet else 0
                        trailing += 1 if off or dots >= 3 else 0
                    open_line, bare, bullet, off = False, True, False, False
                    dots = np.int64(0)
                else:
                    open_line = True
                    if dots < 3:
                        dots = np.int64(0)
                    elif dots >= 3:
                        off, dots = True, np.int64(0)
            else:
                open_line = True
                blank = False
                if bare:
                    bullet = code == 0x2D or code == 0x2022
                    bare = False
                dots = dots + 1 if code == 0x2E else np.int64(0)
                off = code == 0x2026
            i += size
        if open_line:
            split += 1
            bullets += 1 if bullet else 0
            trailing += 1 if off or dots >= 3 else 0
        counts[0, d], counts[1, d], counts[2, d], counts[3, d] = chars, newlines, signs, ellipses
        counts[4, d], counts[5, d], counts[6, d] = split, bullets, trailing
        last[d], par_last[d] = n, m
    return n, m
