"""Where a stretch of characters without white space is cut into words: the rules of ``tokens``, in compiled code.

A stretch is its code points and their flags (``characters``) from ``lo`` to ``hi``; exceptions lie in a hash table.
"""

from __future__ import annotations

import numpy as np

from pipelines.words import characters
from pipelines.words.codes import PRIME, SEED, hash_codes, kernel, mix

_PREFIX, _SUFFIX, _CURRENCY, _DIGIT = characters.PREFIX, characters.SUFFIX, characters.CURRENCY, characters.DIGIT
_LOWER, _UPPER, _ALPHA = characters.LOWER, characters.UPPER, characters.LOWER | characters.UPPER
_QUOTE, _DOTTED, _ICON, _HYPHEN = characters.QUOTE, characters.DOTTED, characters.ICON, characters.HYPHEN
_LABEL, _NAME, _COMPLEX = characters.LABEL, characters.NAME, characters.COMPLEX
SLOTS = 1 << 13
"""Slots of the table of exceptions."""
LONGEST = 16
"""Characters of the longest exception, at most."""
UNIT = np.uint64(0x5851F42D4C957F2D)
"""Sets the hash of a unit apart from that of an exception in the same table."""


@kernel
def slot_of(keys, h):
    """Where a hash lies in the table of exceptions, or -1."""
    slot = np.int64(h & np.uint64(SLOTS - 1))
    while keys[slot] != 0:
        if keys[slot] == h:
            return slot
        slot = (slot + 1) & (SLOTS - 1)
    return np.int64(-1)


@kernel
def _special(codes, lo, hi, keys, lengths):
    """The slot of the exception that stretches from lo to hi, or -1."""
    if hi - lo > LONGEST or (lengths[codes[lo] & 0xFF] >> np.uint32(hi - lo)) & 1 == 0:
        return np.int64(-1)
    return slot_of(keys, hash_codes(codes[lo:hi]))


@kernel
def _prefix(codes, kinds, lo, hi):
    """Characters that come off the front of a stretch, 0 if none."""
    c = codes[lo]
    if kinds[lo] & _PREFIX:
        return 1
    if c == 0x2E:  # two or more dots
        k = lo + 1
        while k < hi and codes[k] == 0x2E:
            k += 1
        return k - lo if k - lo > 1 else 0
    if c == 0x2B:  # a plus that is no sign
        return 0 if lo + 1 < hi and kinds[lo + 1] & _DIGIT else 1
    if hi - lo > 1 and codes[lo + 1] == 0x24:
        if c == 0x43 or c == 0x41:  # C$ A$
            return 2
    elif hi - lo > 2 and c == 0x55 and codes[lo + 1] == 0x53 and codes[lo + 2] == 0x24:  # US$
        return 3
    return 0


@kernel
def _suffix(codes, kinds, lo, hi, keys):  # noqa: C901 - a list of cases
    """Characters that come off the end of a stretch, 0 if none."""
    last, c = kinds[hi - 1], codes[hi - 1]
    before = kinds[hi - 2] if hi - 2 >= lo else np.uint32(0)
    found = 0
    if last & _SUFFIX:
        found = 2 if c == 0x2026 and hi - 2 >= lo and codes[hi - 2] == 0x2026 else 1
    elif c == 0x2E:
        k = hi - 1
        while k > lo and codes[k - 1] == 0x2E:
            k -= 1
        if hi - k > 1:
            found = hi - k
        elif before & _DOTTED:
            found = 1
        elif hi - 3 >= lo and before & _UPPER:
            fck = codes[hi - 2] == 0x46 or codes[hi - 2] == 0x43 or codes[hi - 2] == 0x4B
            found = 1 if kinds[hi - 3] & _UPPER or (fck and codes[hi - 3] == 0xB0) else 0
    elif c == 0x2B and before & _DIGIT:
        found = 1
    elif (c == 0x73 or c == 0x53) and hi - 2 >= lo and (codes[hi - 2] == 0x27 or codes[hi - 2] == 0x2019):
        found = 2
    if last & _CURRENCY:
        if before & _DIGIT:
            found = max(found, 1)
        if c == 0x24 and hi - 3 >= lo:
            dollar = codes[hi - 2]
            if (dollar == 0x43 or dollar == 0x41) and kinds[hi - 3] & _DIGIT:
                found = 2
            elif dollar == 0x53 and codes[hi - 3] == 0x55 and hi - 4 >= lo and kinds[hi - 4] & _DIGIT:
                found = 3
    k = hi - 1
    while k > lo and hi - k < 6 and kinds[k - 1] & _DIGIT == 0:
        k -= 1
    if k > lo and hi - k > found and kinds[k - 1] & _DIGIT and kinds[hi - 1] & _DIGIT == 0:
        h = hash_codes(codes[k:hi]) ^ UNIT
        if slot_of(keys, h) >= 0:
            found = hi - k
    return found


@kernel
def _number(codes, kinds, at, hi):
    """A decimal number of at most three digits: its value and where it ends; -1 if there is none."""
    value, k = 0, at
    while k < hi and k - at < 3 and kinds[k] & _DIGIT:
        value = value * 10 + np.int64(codes[k]) - 48
        k += 1
    if k == at:
        return -1, k
    return value, k


@kernel
def _address(codes, kinds, lo, hi):
    """Where a public IP address that starts at lo ends, or -1."""
    a, k = _number(codes, kinds, lo, hi)
    if not 1 <= a <= 223 or codes[lo] == 48 or a == 10 or a == 127 or k >= hi or codes[k] != 0x2E:
        return -1
    b, k = _number(codes, kinds, k + 1, hi)
    if not 0 <= b <= 255 or k >= hi or codes[k] != 0x2E:
        return -1
    if (a == 169 and b == 254) or (a == 192 and b == 168) or (a == 172 and 16 <= b <= 31):
        return -1
    c, k = _number(codes, kinds, k + 1, hi)
    if not 0 <= c <= 255 or k >= hi or codes[k] != 0x2E:
        return -1
    first = k + 1
    d, k = _number(codes, kinds, first, hi)
    if not 1 <= d <= 254 or codes[first] == 48:
        return -1
    return k


@kernel
def _host(codes, kinds, lo, hi):
    """Is the stretch a host name or address, with or without port and path?"""
    p = _address(codes, kinds, lo, hi)
    if p < 0:
        p = label = lo
        labels = 0
        lower = 0
        while p < hi:
            c = codes[p]
            if c == 0x2E:
                inner = codes[label] != 0x5F and codes[label] != 0x2D
                inner = inner and codes[p - 1] != 0x5F and codes[p - 1] != 0x2D
                if p == label or p - label > 64 or not inner:
                    return False
                labels += 1
                label, lower = p + 1, 0
            elif kinds[p] & _LABEL or c == 0x5F or c == 0x2D:
                lower += 1 if kinds[p] & _LOWER else 0
            else:
                break
            p += 1
        if labels == 0 or lower != p - label or not 2 <= lower <= 63:
            return False
    if p < hi and codes[p] == 0x3A:
        k = p + 1
        while k < hi and kinds[k] & _DIGIT:
            k += 1
        if not 2 <= k - p - 1 <= 5:
            return False
        p = k
    return p == hi or codes[p] == 0x2F or codes[p] == 0x3F or codes[p] == 0x23


@kernel
def _url(codes, kinds, lo, hi):
    """Is the stretch a URL, a host name or an e-mail address?"""
    if _host(codes, kinds, lo, hi):
        return True
    p = lo
    while p < hi and kinds[p] & _NAME:
        p += 1
    if p - lo >= 2 and p + 3 < hi and codes[p] == 0x3A and codes[p + 1] == 0x2F and codes[p + 2] == 0x2F:
        return _host(codes, kinds, p + 3, hi) or _mail(codes, kinds, lo, hi)
    return _mail(codes, kinds, lo, hi)


@kernel
def _mail(codes, kinds, lo, hi):
    """Is the stretch a host name after something and an at sign?"""
    for p in range(lo + 1, hi - 1):  # noqa: SIM110 - a generator is slower here
        if codes[p] == 0x40 and _host(codes, kinds, p + 1, hi):
            return True
    return False


@kernel
def _infix(codes, kinds, p, lo, hi):
    """Characters of the infix at p within the stretch from lo to hi, 0 if there is none."""
    c, kind = codes[p], kinds[p]
    if kind & _ICON or c == 0x2026:
        return 1
    before = kinds[p - 1] if p > lo else np.uint32(0)
    after = kinds[p + 1] if p + 1 < hi else np.uint32(0)
    if c == 0x2E:
        k = p + 1
        while k < hi and codes[k] == 0x2E:
            k += 1
        if k - p > 1:
            return k - p
        return 1 if before & (_LOWER | _QUOTE) and after & (_UPPER | _QUOTE) else 0
    sign = c == 0x2B or c == 0x2D or c == 0x2A or c == 0x5E  # + - * ^ between numbers
    if sign and before & _DIGIT and (after & _DIGIT or (p + 1 < hi and codes[p + 1] == 0x2D)):
        return 1
    if c == 0x2C:
        return 1 if before & _ALPHA and after & _ALPHA else 0
    if before & (_ALPHA | _DIGIT) == 0:
        return 0
    if kind & _HYPHEN:
        k = p + 1
        while k < hi and k - p < 3 and codes[k] == c:
            k += 1
        most = 3 if c == 0x2D else 2 if c == 0x2014 else 1  # ---, two em dashes
        return k - p if k - p <= most and k < hi and kinds[k] & _ALPHA else 0
    if c == 0x3A or c == 0x3C or c == 0x3E or c == 0x3D or c == 0x2F:  # : < > = /
        return 1 if after & _ALPHA else 0
    return 0


@kernel
def _mark(cuts, lo, pieces):
    """Cut after each of an exception's pieces."""
    while pieces:
        lo += pieces & np.uint32(0xFF)
        cuts[lo] = True
        pieces >>= np.uint32(8)


@kernel
def cut_stretch(codes, kinds, m, dots, cuts, keys, pieces, lengths):
    """Mark in ``cuts`` where a stretch of m characters without white space is cut."""
    lo, hi = np.int64(0), np.int64(m)
    slot = np.int64(-1)
    while lo < hi:
        slot = _special(codes, lo, hi, keys, lengths)
        if slot >= 0:
            break
        front = _prefix(codes, kinds, lo, hi)
        if front and lo + front < hi:
            slot = _special(codes, lo + front, hi, keys, lengths)
            if slot >= 0:
                lo += front
                cuts[lo] = True
                break
        back = _suffix(codes, kinds, lo + front, hi, keys) if lo + front < hi else 0
        if back and hi - back > lo:
            slot = _special(codes, lo, hi - back, keys, lengths)
            if slot >= 0:
                hi -= back
                cuts[hi] = True
                break
        if front == 0 and back == 0:
            break
        if front:
            lo += front
            cuts[lo] = True
        if back:
            hi -= back
            cuts[hi] = True
    if slot >= 0:
        _mark(cuts, lo, pieces[slot])
    elif lo < hi and not (dots and _url(codes, kinds, lo, hi)):
        p = lo
        while p < hi:
            size = _infix(codes, kinds, p, lo, hi) if kinds[p] & _COMPLEX else 0
            if size and p > lo:
                cuts[p] = cuts[p + size] = True
            p += max(size, 1)


@kernel
def joined(codes, bounds, t, k, keys, parts, pairs):
    """How many neighbours from part t on make up an exception, and its slot."""
    best, slot = np.int64(0), np.int64(-1)
    if t + 1 >= k or not pairs[codes[bounds[t]] & 0xFF, codes[bounds[t + 1]] & 0xFF]:
        return best, slot
    h = SEED
    p = np.int64(bounds[t])
    for u in range(t + 1, k + 1):
        if bounds[u] - bounds[t] > LONGEST:
            break
        while p < bounds[u]:
            h = (h ^ np.uint64(codes[p])) * PRIME
            p += 1
        if u > t + 1:
            found = slot_of(keys, mix(h))
            if found >= 0 and parts[found] == u - t:
                best, slot = np.int64(u - t), found
    return best, slot
