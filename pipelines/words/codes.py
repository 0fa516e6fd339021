"""Code points and hashes for the kernels of this package.

Numba keeps compiled code by the file of the function that was called, so that after a change here the caches of the
modules that use it have to go (``__pycache__/*.nbi``).
"""

from __future__ import annotations

import functools

import numpy as np
from numba import njit

kernel = functools.partial(njit, cache=True, nogil=True, _nrt=False)
"""Compiles a function that allocates nothing. Without counting references to its arrays it is three times as fast."""
SEED = np.uint64(0xCBF29CE484222325)
"""Where the hash of a word starts; each code point is combined by exclusive or, then multiplied by PRIME."""
PRIME = np.uint64(0x9E3779B97F4A7C15)


@kernel
def mix(x):
    """The finalizer of splitmix64 (Steele et al. 2014): every input bit changes every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@kernel
def hash_codes(codes):
    """The hash of a word of these code points."""
    h = SEED
    for c in codes:
        h = (h ^ np.uint64(c)) * PRIME
    return mix(h)


@kernel
def decode(data, i, end):
    """The code point at byte i and its bytes; whatever is not UTF-8 is U+FFFD, a byte long."""
    first = np.int64(data[i])
    if first < 0x80:
        return first, 1
    if 0xC0 <= first < 0xE0 and i + 1 < end:
        return ((first & 0x1F) << 6) | (np.int64(data[i + 1]) & 0x3F), 2
    if 0xE0 <= first < 0xF0 and i + 2 < end:
        return ((first & 0x0F) << 12) | ((np.int64(data[i + 1]) & 0x3F) << 6) | (np.int64(data[i + 2]) & 0x3F), 3
    if 0xF0 <= first < 0xF8 and i + 3 < end:
        code = ((first & 0x07) << 18) | ((np.int64(data[i + 1]) & 0x3F) << 12)
        code |= ((np.int64(data[i + 2]) & 0x3F) << 6) | (np.int64(data[i + 3]) & 0x3F)
        if code < 0x110000:
            return code, 4
    return 0xFFFD, 1
