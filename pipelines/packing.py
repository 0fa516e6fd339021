"""Whole documents into sequences of one length, by best fit (Ding et al. 2024, "Fewer Truncations Improve Language
Modeling").

The longest pieces come first, and each goes into the sequence with the least room that still holds it. Only a document
longer than a sequence is cut; its last piece is packed like any other. What room is left is padding.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit


class Pieces(NamedTuple):
    """Documents, or parts of long ones, in the order in which they fill the sequences.

    Attributes:
        document: which document each piece is of, (pieces,) int64.
        start: its first token in the document, (pieces,) int64.
        length: its tokens, (pieces,) int64.
        padding: tokens of padding behind it; only behind the last piece of a sequence, (pieces,) int64.
    """

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    padding: np.ndarray


def pack(lengths: np.ndarray, width: int) -> Pieces:
    """Pack documents into sequences of ``width`` tokens.

    Within a sequence, and by the first document of each sequence, they keep their order.

    Args:
        lengths: tokens of each document, (documents,), at least 1.
        width: tokens of a sequence.
    """
    n_pieces = -(-lengths // width)
    document = np.repeat(np.arange(len(lengths)), n_pieces)
    start = (np.arange(len(document)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)) * width
    length = np.minimum(lengths[document] - start, width)
    bins = _best_fit(length, np.argsort(-length, kind="stable"), width)
    filled = np.bincount(bins, length).astype(np.int64)
    first = np.full(len(filled), len(bins))
    np.minimum.at(first, bins, np.arange(len(bins)))
    order = np.lexsort((np.arange(len(bins)), first[bins]))
    last = np.append(np.diff(bins[order]) != 0, True)[: len(order)]
    padding = np.where(last, width - filled[bins[order]], 0)
    return Pieces(document[order], start[order], length[order], padding)


@njit(cache=True, nogil=True)
def _best_fit(lengths, order, width):
    """The sequence that each piece goes into, (pieces,) int64, when they come in ``order``.

    Sequences with the same room stand in a list; a binary tree over the amounts of room says which lists hold any.
    """
    leaves = 1
    while leaves <= width:
        leaves *= 2
    some = np.zeros(2 * leaves, np.bool_)
    head = np.full(width + 1, -1, np.int64)
    below = np.full(len(lengths), -1, np.int64)
    bins = np.empty(len(lengths), np.int64)
    n_bins = 0
    for piece in order:
        need = lengths[piece]
        node = leaves + need
        if not some[node]:
            # up to the first ancestor with something to the right, then down to its leftmost leaf
            while node > 1 and (node & 1 or not some[node + 1]):
                node >>= 1
            if node > 1:
                node += 1
                while node < leaves:
                    node *= 2
                    if not some[node]:
                        node += 1
        if node > 1:
            room = node - leaves
            mine = head[room]
            head[room] = below[mine]
            if head[room] < 0:
                while node >= 1:
                    some[node] = node < leaves and (some[2 * node] or some[2 * node + 1])
                    node >>= 1
        else:
            room, mine = width, n_bins
            n_bins += 1
        bins[piece] = mine
        room -= need
        below[mine] = head[room]
        head[room] = mine
        node = leaves + room
        while node >= 1 and not some[node]:
            some[node] = True
            node >>= 1
    return bins


@njit(cache=True, nogil=True)
def _copy(source, target):
    for i in range(len(source)):  # of slices, whose places from 0 on are copied many at a time
        target[i] = source[i]


@njit(cache=True, nogil=True)
def put_ends(ids, starts, end_id, out):
    """Copy texts' ids into ``out``, each followed by ``end_id``."""
    for text in range(len(starts) - 1):
        start, stop = starts[text], starts[text + 1]
        _copy(ids[start:stop], out[start + text : stop + text])
        out[stop + text] = end_id


@njit(cache=True, nogil=True)
def put_pieces(ids, starts, lengths, paddings, pad_id, out):
    """Copy pieces of ``ids`` into ``out``, each followed by its padding."""
    at = 0
    for piece in range(len(starts)):
        behind = at + lengths[piece]
        _copy(ids[starts[piece] : starts[piece] + lengths[piece]], out[at:behind])
        at = behind + paddings[piece]
        out[behind:at] = pad_id
