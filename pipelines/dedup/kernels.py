"""Compiled loops of deduplication: signatures, similarity of sets, components of a graph, texts without some spans."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def minhash(shingles: np.ndarray, offsets: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Smallest value of every permutation over every document's shingles.

    A permutation is ``a * x + b`` modulo 2**32 over hash values finalized as MurmurHash3 does, which is the scheme
    affine32 of datasketch.

    Args:
        shingles: 32-bit hash values of all documents one after the other, uint32.
        offsets: where each document starts, and the end of the last, (documents + 1,), int64.
        a: odd factors, (permutations,), uint32.
        b: summands, (permutations,), uint32.

    Returns:
        (documents, permutations), uint32; all ones for a document without shingles.
    """
    count = len(offsets) - 1
    result = np.full((count, len(a)), 0xFFFFFFFF, np.uint32)
    for d in range(count):
        row = result[d]
        for i in range(offsets[d], offsets[d + 1]):
            x = shingles[i]
            x ^= x >> np.uint32(16)
            x = np.uint32(x * np.uint32(0x85EBCA6B))
            x ^= x >> np.uint32(13)
            x = np.uint32(x * np.uint32(0xC2B2AE35))
            x ^= x >> np.uint32(16)
            for k in range(len(a)):
                value = np.uint32(np.uint32(a[k] * x) + b[k])
                row[k] = min(row[k], value)
    return result


@njit(cache=True, nogil=True)
def jaccard(
    first: np.ndarray, first_offsets: np.ndarray, second: np.ndarray, second_offsets: np.ndarray, which: np.ndarray
) -> np.ndarray:
    """Jaccard similarity of pairs of sets.

    Args:
        first: one set of each pair, one after the other, each ascending and without repeats, uint32.
        first_offsets: (pairs + 1,), int64.
        second: sets that the pairs share, in the same form.
        second_offsets: (sets + 1,), int64.
        which: of them each pair compares with, (pairs,), int64.

    Returns:
        (pairs,), float64; 0 for two empty sets.
    """
    result = np.zeros(len(which))
    for p in range(len(which)):
        i, i_end = first_offsets[p], first_offsets[p + 1]
        j, j_end = second_offsets[which[p]], second_offsets[which[p] + 1]
        union = (i_end - i) + (j_end - j)
        common = 0
        while i < i_end and j < j_end:
            x, y = first[i], second[j]
            common += x == y
            i += x <= y
            j += y <= x
        if union:
            result[p] = common / (union - common)
    return result


@njit(cache=True, nogil=True)
def sort_sets(values: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each stretch of ``values`` ascending and without repeats, and the offsets of what is left."""
    out = np.empty_like(values)
    ends = np.zeros(len(offsets), np.int64)
    at = 0
    for d in range(len(offsets) - 1):
        stretch = np.sort(values[offsets[d] : offsets[d + 1]])
        for i in range(len(stretch)):
            if i == 0 or stretch[i] != stretch[i - 1]:
                out[at] = stretch[i]
                at += 1
        ends[d + 1] = at
    return out[:at], ends


@njit(cache=True, nogil=True)
def cut_out(
    data: np.ndarray,
    offsets: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    first: np.ndarray,
    last: np.ndarray,
    cut: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Texts without some of their spans, each cut with the newlines after it, up to the next span.

    Args:
        data: UTF-8 of all documents, uint8.
        offsets: where each document lies in it, (documents + 1,), int64.
        starts: first byte of each span within its document, (spans,).
        ends: one past its last, (spans,).
        first: first span of each document, (documents,), int64.
        last: one past its last span, (documents,), int64.
        cut: which spans go, (spans,), bool.

    Returns:
        UTF-8 and offsets of what is left; a document whose last span was cut ends without newlines.
    """
    out = np.empty(offsets[-1] - offsets[0], np.uint8)
    ranges = np.zeros(len(offsets), np.int64)
    n = np.int64(0)
    for d in range(len(offsets) - 1):
        begin, at = offsets[d], offsets[d]
        for s in range(first[d], last[d]):
            if cut[s]:
                stop = begin + starts[s]
                out[n : n + stop - at] = data[at:stop]
                n += stop - at
                at = begin + starts[s + 1] if s + 1 < last[d] else offsets[d + 1]
        if last[d] > first[d] and cut[last[d] - 1]:
            while n > ranges[d] and out[n - 1] == 10:
                n -= 1
        else:
            stop = offsets[d + 1]
            out[n : n + stop - at] = data[at:stop]
            n += stop - at
        ranges[d + 1] = n
    return out[:n].copy(), ranges


@njit(cache=True, nogil=True)
def _slot(table: np.ndarray, names: np.ndarray, name: int) -> int:
    """Where ``name`` is, or is to be put, in an open-addressing table of indices into ``names``."""
    mask = np.uint64(len(table) - 1)
    x = np.uint64(name) * np.uint64(0x9FB21C651E98DF25)  # not the hash that partitions are made by: its bits are fixed
    x ^= x >> np.uint64(35)
    x &= mask
    while table[x] >= 0 and names[table[x]] != name:
        x = (x + np.uint64(1)) & mask
    return x


@njit(cache=True, nogil=True)
def _grow(table: np.ndarray, names: np.ndarray, count: int) -> np.ndarray:
    grown = np.full(2 * len(table), -1, np.int32)
    for i in range(count):
        grown[_slot(grown, names, names[i])] = i
    return grown


@njit(cache=True, nogil=True)
def _top(parent: np.ndarray, i: int) -> int:
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@njit(cache=True, nogil=True)
def components(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Components of a graph in memory: a union-find over a hash table of its nodes.

    Args:
        a: one end of each edge, (edges,), int64.
        b: the other end, (edges,), int64.

    Returns:
        The nodes in the order in which they appear; the smallest node of each one's component; the smallest and the
        largest of the ``b`` that each has as an ``a``; and the smallest of the ``a`` that it has as a ``b`` (-1 for a
        node that is never that end).
    """
    names = np.empty(2 * len(a), np.int64)
    parent = np.empty(2 * len(a), np.int32)
    lowest = np.empty(2 * len(a), np.int64)
    highest = np.empty(2 * len(a), np.int64)
    seen = np.empty(2 * len(a), np.int64)
    table = np.full(1 << 10, -1, np.int32)
    count = 0
    for e in range(len(a)):
        if 2 * (count + 2) > len(table):
            table = _grow(table, names, count)
        for name in (a[e], b[e]):
            slot = _slot(table, names, name)
            if table[slot] < 0:
                table[slot] = count
                names[count] = name
                parent[count] = count
                lowest[count] = highest[count] = seen[count] = -1
                count += 1
            if name == a[e]:
                i = table[slot]
            j = table[slot]
        lowest[i] = b[e] if lowest[i] < 0 else min(lowest[i], b[e])
        highest[i] = max(highest[i], b[e])
        seen[j] = a[e] if seen[j] < 0 else min(seen[j], a[e])
        i, j = _top(parent, i), _top(parent, j)
        # The smaller name stays on top, so that the top is the smallest node of its component.
        if names[i] < names[j]:
            parent[j] = i
        elif i != j:
            parent[i] = j
    roots = np.empty(count, np.int64)
    for i in range(count):
        roots[i] = names[_top(parent, i)]
    return names[:count].copy(), roots, lowest[:count].copy(), highest[:count].copy(), seen[:count].copy()
