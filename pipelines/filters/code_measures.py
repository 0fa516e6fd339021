"""What the code rules measure, in one pass over the bytes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.words import characters
from pipelines.words.codes import kernel
from pipelines.words.columns import buffers

_LETTER = characters.LETTER
_SOLID = characters.SOLID
_MARK = characters.MARK

_BASE64 = 1
_HEX = 2
_WORD = 4
_BLANK = 8

_BASE64_LEAST = 64  # characters
_GROUPS_LEAST = 8


class Measures(NamedTuple):
    r"""Of every document, (documents,), int64; lengths are in code points.

    Attributes:
        characters: of the whole text.
        lines: as many as there are newlines, and one more when text follows the last.
        newlines: how many there are.
        longest: characters of the longest line, without its newline.
        letters: characters that ``str.isalpha`` accepts.
        numbers: characters of Unicode's category N.
        encoded: characters in base64, hexadecimal and ``\u`` runs, as the patterns of StarCoder2 match them.
        longest_encoded: characters of the longest such run.
        visible: characters outside of tags, comments, scripts and styles; a run of white space counts as one.
        nuls: NUL characters.
    """

    characters: np.ndarray
    lines: np.ndarray
    newlines: np.ndarray
    longest: np.ndarray
    letters: np.ndarray
    numbers: np.ndarray
    encoded: np.ndarray
    longest_encoded: np.ndarray
    visible: np.ndarray
    nuls: np.ndarray


def measure(column: pa.Array | pa.ChunkedArray, html: np.ndarray) -> Measures:
    """Measure the documents of a column.

    Args:
        column: their text.
        html: which of them are HTML, (documents,), bool; ``visible`` is 0 for the others.
    """
    data, offsets = buffers(column)
    out = np.zeros((len(Measures._fields), len(offsets) - 1), np.int64)
    _measure(data, offsets, characters.flags(), _classes(), html, out)
    return Measures(*out)


def _classes() -> np.ndarray:
    """What the encoded runs can be made of, by byte, (256,), uint8; what is not ASCII counts as part of a word."""
    table = np.zeros(256, np.uint8)
    for byte in range(128):
        c = chr(byte)
        if c.isalnum() or c in "+/=\n":
            table[byte] |= _BASE64
        if c in "0123456789abcdefABCDEF":
            table[byte] |= _HEX
        if c.isalnum() or c == "_":
            table[byte] |= _WORD
        if c in " \t\n\r\f\v":
            table[byte] |= _BLANK
    table[128:] = _WORD
    return table


@kernel
def _measure(data, offsets, flags, classes, html, out):
    for d in range(len(offsets) - 1):
        begin, end = offsets[d], offsets[d + 1]
        count = letters = numbers = newlines = longest = line = nuls = 0
        encoded = longest_encoded = run = 0
        free = begin  # first byte that is in no hexadecimal or \u run yet
        i = begin
        while i < end:
            byte = data[i]
            if byte & 0xC0 == 0x80:  # within a character
                i += 1
                continue
            flag = flags[byte if byte < 0x80 else _code(data, i, end)]
            if flag & _LETTER:
                letters += 1
            elif flag & _SOLID and not flag & _MARK:
                numbers += 1
            count += 1
            line += 1
            kind = classes[byte]
            if kind & _BASE64:
                run += 1
            else:
                if run >= _BASE64_LEAST:
                    encoded += run
                    longest_encoded = max(longest_encoded, run)
                run = 0
            if byte == 10:
                longest = max(longest, line - 1)
                line = 0
                newlines += 1
            elif byte == 0:
                nuls += 1
            if i >= free and (byte == 92 or kind & _HEX):
                free = max(_escapes(data, i, end, classes), _hexadecimal(data, i, begin, end, classes))
                encoded += free - i
                longest_encoded = max(longest_encoded, free - i)
            i += 1
        if run >= _BASE64_LEAST:
            encoded += run
            longest_encoded = max(longest_encoded, run)
        out[0, d] = count
        out[1, d] = newlines + (line > 0)
        out[2, d] = newlines
        out[3, d] = max(longest, line)
        out[4, d] = letters
        out[5, d] = numbers
        out[6, d] = encoded
        out[7, d] = longest_encoded
        out[8, d] = _visible(data, begin, end, classes) if html[d] else 0
        out[9, d] = nuls


@kernel
def _code(data, i, end):
    """The code point of several bytes at i; U+FFFD when the text ends within it."""
    byte = np.int64(data[i])
    size = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
    if i + size > end:
        return 0xFFFD
    code = byte & (0xFF >> (size + 1))
    for k in range(1, size):
        code = (code << 6) | (np.int64(data[i + k]) & 0x3F)
    return code if code < 0x110000 else 0xFFFD


@kernel
def _escapes(data, i, end, classes):
    r"""End of a match of ``(?:\\u[0-9a-fA-F]{4}){8,}`` at i, or i."""
    at, groups = i, 0
    while at + 6 <= end and data[at] == 92 and data[at + 1] == 117:
        if not classes[data[at + 2]] & classes[data[at + 3]] & classes[data[at + 4]] & classes[data[at + 5]] & _HEX:
            break
        at += 6
        groups += 1
    return at if groups >= _GROUPS_LEAST else i


@kernel
def _hexadecimal(data, i, begin, end, classes):
    r"""End of a match of ``(?:\b(?:0x|\\x)?[0-9a-fA-F]{2}(?:,|\b\s*)){8,}`` at i, or i."""
    at, groups = i, 0
    while at < end:
        before = at > begin and classes[data[at - 1]] & _WORD != 0
        if before == (classes[data[at]] & _WORD != 0):
            break
        digits = at
        if at + 1 < end and data[at + 1] == 120 and (data[at] == 48 or data[at] == 92):
            digits += 2
        if digits + 2 > end or not classes[data[digits]] & classes[data[digits + 1]] & _HEX:
            break
        after = digits + 2
        if after < end and data[after] == 44:
            after += 1
        elif after < end and classes[data[after]] & _WORD:
            break
        else:
            while after < end and classes[data[after]] & _BLANK:
                after += 1
        at = after
        groups += 1
    return at if groups >= _GROUPS_LEAST else i


@kernel
def _visible(data, begin, end, classes):
    """Characters of HTML that a reader sees, roughly: entities count as they are written."""
    count = 0
    blank = True
    i = begin
    while i < end:
        byte = data[i]
        if byte == 60 and i + 1 < end and _is_markup(data[i + 1]):
            i = _tag_end(data, i, end)
            continue
        if byte & 0xC0 != 0x80:
            if classes[byte] & _BLANK:
                count += not blank
                blank = True
            else:
                count += 1
                blank = False
        i += 1
    return count


@kernel
def _is_markup(byte):
    return 97 <= (byte | 32) <= 122 or byte == 47 or byte == 33 or byte == 63


@kernel
def _tag_end(data, i, end):
    """One past the tag or comment at i; of a script or a style, one past its closing tag."""
    if i + 3 < end and data[i + 1] == 33 and data[i + 2] == 45 and data[i + 3] == 45:
        for at in range(i + 4, end - 2):
            if data[at] == 45 and data[at + 1] == 45 and data[at + 2] == 62:
                return at + 3
        return end
    element = _element(data, i + 1, end)
    at = i + 1
    while at < end and data[at] != 62:
        at += 1
    at += 1
    if element == 0:
        return min(at, end)
    while at + 1 < end:
        if data[at] == 60 and data[at + 1] == 47 and _element(data, at + 2, end) == element:
            while at < end and data[at] != 62:
                at += 1
            return min(at + 1, end)
        at += 1
    return end


@kernel
def _element(data, i, end):
    """1 for the name script at i, 2 for style, 0 for any other."""
    for number, name in ((1, b"script"), (2, b"style")):
        if i + len(name) < end:
            same = True
            for k in range(len(name)):
                same &= (data[i + k] | 32) == name[k]
            if same and not 97 <= (data[i + len(name)] | 32) <= 122:
                return number
    return 0
