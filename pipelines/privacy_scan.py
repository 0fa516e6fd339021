"""Where personal data may stand in a text: one pass over the bytes, whose finds ``privacy`` looks at more closely."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pipelines.words.codes import kernel
from pipelines.words.columns import buffers

EMAIL = 0
IPV4 = 1
IPV6 = 2
INTERNATIONAL = 3
NORTH_AMERICAN = 4

_LOCAL = 1  # may stand before the @ of an address
_DOMAIN = 2  # may stand behind it
_DIGIT = 4
_ALNUM = 8  # letters, digits, the underscore, and all that is not ASCII
_ADDRESS = 16  # hexadecimal digits and colons
_TRIGGER = 32
_GAP = 64  # between the groups of a telephone number

_LONGEST_LOCAL = 64  # RFC 5321
_LONGEST_DOMAIN = 253
_MOST_DIGITS = 15  # E.164


def candidates(column: pa.Array | pa.ChunkedArray, kinds: tuple[int, ...]) -> np.ndarray:
    """What looks like personal data of some kinds.

    Returns:
        Kind, document, first byte and one past the last of each within the column's bytes, (found, 4), int64, in no
        order; they may overlap.
    """
    data, offsets = buffers(column)
    wanted = np.zeros(5, np.bool_)
    wanted[list(kinds)] = True
    found = np.empty((len(offsets) + 1024, 4), np.int64)
    while (count := _scan(data, offsets, _classes(), wanted, found)) > len(found):
        found = np.empty((count, 4), np.int64)
    return found[:count]


def _classes() -> np.ndarray:
    table = np.zeros(256, np.uint8)
    for byte in range(128):
        c = chr(byte)
        if c.isalnum() or c in "._%+'&-":
            table[byte] |= _LOCAL
        if c.isalnum() or c in ".-":
            table[byte] |= _DOMAIN
        if c.isdigit():
            table[byte] |= _DIGIT
        if c.isalnum() or c == "_":
            table[byte] |= _ALNUM
        if c in "0123456789abcdefABCDEF:":
            table[byte] |= _ADDRESS
        if c.isdigit() or c in "@+(:":
            table[byte] |= _TRIGGER
        if c in " -./()":
            table[byte] |= _GAP
    table[128:] = _ALNUM
    return table


@kernel
def _scan(data, offsets, classes, wanted, found):
    """Write candidates into ``found`` as far as it has room; returns how many there are."""
    count = 0
    for d in range(len(offsets) - 1):
        begin, end = offsets[d], offsets[d + 1]
        past = begin  # one past the last run of hexadecimal digits and colons
        for i in range(begin, end):
            kind = classes[data[i]]
            if not kind & _TRIGGER:
                continue
            byte = data[i]
            start, what, stop = i, -1, np.int64(-1)
            if byte == 64:  # @
                what = EMAIL
                start, stop = _email(data, i, begin, end, classes)
            elif byte == 58:  # :
                if i >= past:
                    what = IPV6
                    start, past, stop = _ipv6(data, i, begin, end, classes)
            elif i > begin and classes[data[i - 1]] & _ALNUM:
                continue
            elif byte == 43:  # +
                what = INTERNATIONAL
                stop = _international(data, i, end, classes)
            else:
                what = IPV4
                stop = _ipv4(data, i, end, classes)
                if stop < 0 or not wanted[IPV4]:
                    what = NORTH_AMERICAN
                    stop = _north_american(data, i, end, classes)
            if stop > start and wanted[what]:
                if count < len(found):
                    found[count, 0], found[count, 1], found[count, 2], found[count, 3] = what, d, start, stop
                count += 1
    return count


@kernel
def _email(data, i, begin, end, classes):
    start = i
    while start > begin and classes[data[start - 1]] & _LOCAL:
        start -= 1
        if i - start > _LONGEST_LOCAL:
            return i, np.int64(-1)
    stop = i + 1
    while stop < end and classes[data[stop]] & _DOMAIN and stop - i <= _LONGEST_DOMAIN:
        stop += 1
    return (start, stop) if start < i and stop > i + 3 else (i, np.int64(-1))


@kernel
def _ipv6(data, i, begin, end, classes):
    """Start of the run of digits and colons around i, its end, and its end again if it can be an address."""
    start, stop, colons, pairs = i, i, 0, 0
    while start > begin and classes[data[start - 1]] & _ADDRESS:
        start -= 1
    while stop < end and classes[data[stop]] & _ADDRESS:
        if data[stop] == 58:
            colons += 1
            pairs += stop > start and data[stop - 1] == 58
        stop += 1
    past = stop
    if data[stop - 1] == 58 and not (stop - 2 >= start and data[stop - 2] == 58):
        stop -= 1  # a colon behind an address is none of it
        colons -= 1
    around = (start > begin and classes[data[start - 1]] & _ALNUM) or (stop < end and classes[data[stop]] & _ALNUM)
    if around or not (colons == 7 or (pairs == 1 and 2 <= colons < 7)):
        return start, past, np.int64(-1)
    return start, past, stop


@kernel
def _ends(data, at, end, classes):
    """Whether a number can end here: no letter, no digit, and neither behind a dot or a hyphen."""
    if at >= end:
        return True
    if classes[data[at]] & _ALNUM:
        return False
    return not (data[at] in (45, 46) and at + 1 < end and classes[data[at + 1]] & _DIGIT)


@kernel
def _ipv4(data, i, end, classes):
    at = i
    for octet in range(4):
        value, first = 0, at
        while at < end and classes[data[at]] & _DIGIT and at - first < 4:
            value = value * 10 + (data[at] - 48)
            at += 1
        if at == first or value > 255 or (at - first > 1 and data[first] == 48) or at - first > 3:
            return -1
        if octet < 3:
            if at >= end or data[at] != 46:
                return -1
            at += 1
    if at < end and data[at] == 45:  # a range of addresses
        return (
            at if not (at + 1 < end and classes[data[at + 1]] & _ALNUM and not classes[data[at + 1]] & _DIGIT) else -1
        )
    return at if _ends(data, at, end, classes) else -1


@kernel
def _digits(data, at, end, n, classes):
    """``at + n`` when n digits stand there, else -1."""
    if at < 0 or at + n > end:
        return -1
    for k in range(at, at + n):
        if not classes[data[k]] & _DIGIT:
            return -1
    return at + n


@kernel
def _north_american(data, i, end, classes):
    """End of (ddd) ddd-dddd, ddd-ddd-dddd or ddd.ddd.dddd, the latter two also behind a 1; or -1."""
    at = i
    if data[i] == 40:  # (
        at = _digits(data, i + 1, end, 3, classes)
        if at < 0 or at + 1 >= end or data[at] != 41:
            return -1
        at += 1
        if data[at] == 32 or data[at] == 45:
            at += 1
        at = _digits(data, at, end, 3, classes)
        if at < 0 or at >= end or data[at] not in (32, 45, 46):
            return -1
    else:
        separator = 0
        if data[i] == 49 and i + 1 < end and data[i + 1] in (45, 46):
            separator = data[i + 1]
            at += 2
        at = _digits(data, at, end, 3, classes)
        if at < 0 or at >= end or data[at] not in (45, 46) or (separator and data[at] != separator):
            return -1
        separator = data[at]
        at = _digits(data, at + 1, end, 3, classes)
        if at < 0 or at >= end or data[at] != separator:
            return -1
    at = _digits(data, at + 1, end, 4, classes)
    return at if at >= 0 and _ends(data, at, end, classes) else -1


@kernel
def _international(data, i, end, classes):
    """End of a plus sign and groups of digits with at most two signs between them, or -1.

    What has more digits than a number can have ends with the last group that fits.
    """
    most = 11 if i + 1 < end and data[i + 1] == 49 else _MOST_DIGITS
    digits, gap, whole, stop = 0, 0, 0, i
    at = i + 1
    while at < end and gap <= 2:
        if classes[data[at]] & _DIGIT:
            digits += 1
            gap = 0
            if digits > most:
                break
        elif classes[data[at]] & _GAP and digits:
            if gap == 0:
                whole, stop = digits, at
            gap += 1
        else:
            break
        at += 1
    if gap == 0 and digits <= most:
        whole, stop = digits, at
    if whole < 8:
        return -1
    return stop if stop >= end or not classes[data[stop]] & _ALNUM else -1
