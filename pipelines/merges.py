"""Learning BPE merges from counted pre-tokens (Sennrich et al. 2016), with pair counts kept up to date step by step.

Each step merges the most frequent pair of neighbouring tokens; of several that one whose left token has the smallest
id, then the one whose right token has: the rule of the ``tokenizers`` package, so that its trainer learns the same from
the same text. Only places where the pair stands are visited. Memory is some 20 bytes for each byte of the distinct
pre-tokens, however often they occur.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

_BREAK = -(1 << 31)  # stands between two pre-tokens in the sequence of tokens
_INSIDE = -1  # a place inside a token


class Learned(NamedTuple):
    """What was learned.

    Attributes:
        merges: left id, right id, and the id of the token they make. It can be one that an earlier merge makes too.
        made: bytes of the new tokens in the order of their ids.
        tokens: in how many tokens the text is now.
    """

    merges: list[tuple[int, int, int]]
    made: list[bytes]
    tokens: int


def learn_merges(
    words: np.ndarray, offsets: np.ndarray, counts: np.ndarray, byte_ids: np.ndarray, tokens: int, min_frequency: int
) -> Learned:
    """Merges in the order in which they are learned.

    Args:
        words: bytes of the distinct pre-tokens, (bytes,) uint8.
        offsets: where each begins, and where the last one ends, (n + 1,) int64.
        counts: how often each occurs, (n,) int64.
        byte_ids: token id of each byte, (256,) int64; new tokens follow the highest.
        tokens: how many tokens to make at most.
        min_frequency: a pair seen less often is not merged.

    Raises:
        ValueError: the pre-tokens are too many for 32-bit places.
    """
    if len(words) + len(counts) >= (1 << 31) - 2:
        raise ValueError(
            f"tokenizer.sample_bytes: the distinct words of the sample have {len(words):,} bytes, more than the 2^31 "
            "that merges can be learned from; lower it"
        )
    first = int(byte_ids.max()) + 1
    state = _State(words, offsets, counts, byte_ids, first + tokens)
    texts = {int(i): bytes([b]) for b, i in enumerate(byte_ids)}
    ids = {text: i for i, text in texts.items()}
    merges: list[tuple[int, int, int]] = []
    made: list[bytes] = []
    while len(made) < tokens:
        pair = state.most_frequent(max(min_frequency, 1))
        if pair < 0:
            break
        left, right = pair >> 32, pair & 0xFFFFFFFF
        text = texts[left] + texts[right]
        if text not in ids:
            ids[text] = first + len(made)
            texts[ids[text]] = text
            made.append(text)
        merges.append((left, right, ids[text]))
        state.merge(pair, ids[text])
    return Learned(merges, made, state.n_tokens())


class _State:
    """The sequence of tokens, and of every pair its count and the places where it came to be.

    A token of length L at place p has its id at p and, when L > 1, -L at p + L - 1: so the next token, and the one
    before, are found without links. Places of a pair lie in segments, one for each step that made some; a place where
    the pair no longer stands is recognised when it is visited.
    """

    def __init__(
        self, words: np.ndarray, offsets: np.ndarray, counts: np.ndarray, byte_ids: np.ndarray, n_ids: int
    ) -> None:
        self.sequence, self.word_of = _lay_out(words, offsets, byte_ids)
        self.counts, self.n_ids = counts, n_ids
        self.lengths = np.ones(n_ids, np.int32)
        self.keys, self.table = np.full(1 << 17, -1, np.int64), np.zeros((1 << 17, 2), np.int64)  # count, last segment
        self.heap = np.zeros((1 << 17, 2), np.int64)  # count, pair
        self.segments = np.zeros((1 << 17, 3), np.int64)  # start and stop in places, the pair's segment before
        self.places = np.zeros(max(len(self.sequence), 1), np.int32)
        self.used = np.array([0, 0, 1, 0])  # pairs, heap, segments (0 is none), places
        self.scratch = np.zeros((2, n_ids), np.int64), np.zeros((2, n_ids), np.int64), np.zeros((2, n_ids), np.bool_)
        _first_pairs(
            self.sequence, self.word_of, counts, byte_ids, self.keys, self.table, self.heap, self.segments,
            self.places, self.used,
        )  # fmt: skip

    def most_frequent(self, least: int) -> int:
        """The pair to merge next, as left id * 2^32 + right id; -1 when none occurs ``least`` times."""
        return _most_frequent(self.heap, self.keys, self.table, self.used, least)

    def n_tokens(self) -> int:
        """Tokens of the text, each word as often as it occurs."""
        return int(self.counts[self.word_of[self.sequence >= 0]].sum())

    def merge(self, pair: int, made: int) -> None:
        """Put the token ``made`` wherever the pair stands."""
        places = _places(pair, self.keys, self.table, self.segments, self.places)
        most = 2 * min(len(places), self.n_ids) + 1  # pairs that can be new
        if 2 * (self.used[0] + most) > len(self.keys):
            self.keys, self.table = _rehash(self.keys, self.table, 4 * (self.used[0] + most))
        self.heap = _room(self.heap, self.used[1] + most)
        self.segments = _room(self.segments, self.used[2] + most)
        self.places = _room(self.places, self.used[3] + 2 * len(places))
        _merge(
            pair, made, places, self.sequence, self.lengths, self.word_of, self.counts, self.keys, self.table,
            self.heap, self.segments, self.places, self.used, *self.scratch,
        )  # fmt: skip


def _room(array: np.ndarray, size: int) -> np.ndarray:
    """The array, or a longer copy of it when it does not hold ``size`` rows."""
    if size <= len(array):
        return array
    longer = np.empty((size + size // 2, *array.shape[1:]), array.dtype)
    longer[: len(array)] = array
    return longer


@njit(cache=True, nogil=True)
def _lay_out(words, offsets, byte_ids):
    """Tokens of all pre-tokens with breaks around them, (bytes + n + 1,) int32, and the pre-token of each place."""
    n = len(offsets) - 1
    sequence = np.empty(offsets[n] - offsets[0] + n + 1, np.int32)
    word_of = np.empty(len(sequence), np.int32)
    sequence[0] = _BREAK
    at = 1
    for word in range(n):
        for i in range(offsets[word], offsets[word + 1]):
            sequence[at] = byte_ids[words[i]]
            word_of[at] = word
            at += 1
        sequence[at] = _BREAK
        at += 1
    return sequence, word_of


@njit(cache=True, nogil=True)
def _find(pair, keys):
    """The row of ``pair`` in the open table, or the free row where it belongs."""
    mask = len(keys) - 1
    mixed = np.uint64(pair) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(32)
    row = np.int64(mixed * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(20)) & mask
    while keys[row] != pair and keys[row] != -1:
        row = (row + 1) & mask
    return row


@njit(cache=True, nogil=True)
def _rehash(keys, table, size):
    capacity = len(keys)
    while capacity < size:
        capacity *= 2
    new_keys = np.full(capacity, -1, np.int64)
    new_table = np.zeros((capacity, 2), np.int64)
    for row in range(len(keys)):
        if keys[row] != -1:
            new = _find(keys[row], new_keys)
            new_keys[new] = keys[row]
            new_table[new] = table[row]
    return new_keys, new_table


@njit(cache=True, nogil=True)
def _before(count, pair, other_count, other_pair):
    return count > other_count or (count == other_count and pair < other_pair)


@njit(cache=True, nogil=True)
def _push(heap, used, count, pair):
    i = used[1]
    used[1] += 1
    while i > 0:
        parent = (i - 1) >> 1
        if not _before(count, pair, heap[parent, 0], heap[parent, 1]):
            break
        heap[i] = heap[parent]
        i = parent
    heap[i, 0], heap[i, 1] = count, pair


@njit(cache=True, nogil=True)
def _pop(heap, used):
    """Take the first entry off the heap."""
    used[1] -= 1
    size = used[1]
    count, pair = heap[size, 0], heap[size, 1]
    i = 0
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        if child + 1 < size and _before(heap[child + 1, 0], heap[child + 1, 1], heap[child, 0], heap[child, 1]):
            child += 1
        if not _before(heap[child, 0], heap[child, 1], count, pair):
            break
        heap[i] = heap[child]
        i = child
    heap[i, 0], heap[i, 1] = count, pair


@njit(cache=True, nogil=True)
def _most_frequent(heap, keys, table, used, least):
    while used[1]:
        count, pair = heap[0, 0], heap[0, 1]
        if count < least:
            return -1
        now = table[_find(pair, keys), 0]
        if now == count:
            return pair
        _pop(heap, used)  # counts only fall unnoticed: the entry goes back to where it belongs now
        if now > 0:
            _push(heap, used, now, pair)
    return -1


@njit(cache=True, nogil=True)
def _first_pairs(sequence, word_of, counts, byte_ids, keys, table, heap, segments, places, used):
    """Count the pairs of bytes and list their places."""
    n = byte_ids.max() + 1
    sums = np.zeros(n * n, np.int64)
    ends = np.zeros(n * n + 1, np.int64)
    for at in range(1, len(sequence) - 1):
        if sequence[at] >= 0 and sequence[at + 1] >= 0:
            pair = np.int64(sequence[at]) * n + sequence[at + 1]
            sums[pair] += counts[word_of[at]]
            ends[pair + 1] += 1
    for pair in range(n * n):
        ends[pair + 1] += ends[pair]
        if ends[pair + 1] > ends[pair]:
            key = pair // n << 32 | pair % n
            row = _find(key, keys)
            segment = used[2]
            segments[segment, 0], segments[segment, 1], segments[segment, 2] = ends[pair], ends[pair + 1], 0
            keys[row], table[row, 0], table[row, 1] = key, sums[pair], segment
            used[0] += 1
            used[2] += 1
            _push(heap, used, sums[pair], key)
    used[3] = ends[n * n]
    for at in range(1, len(sequence) - 1):
        if sequence[at] >= 0 and sequence[at + 1] >= 0:
            pair = np.int64(sequence[at]) * n + sequence[at + 1]
            places[ends[pair]] = at
            ends[pair] += 1


@njit(cache=True, nogil=True)
def _places(pair, keys, table, segments, places):
    """All places listed for a pair, in ascending order, since of overlapping pairs the leftmost is merged."""
    last = table[_find(pair, keys), 1]
    size, segment = 0, last
    while segment:
        size += segments[segment, 1] - segments[segment, 0]
        segment = segments[segment, 2]
    found = np.empty(size, np.int32)
    segment = last
    while segment:
        start, stop = segments[segment, 0], segments[segment, 1]
        found[size - stop + start : size] = places[start:stop]
        size -= stop - start
        segment = segments[segment, 2]
    if last and segments[last, 2]:
        found.sort()
    return found


@njit(cache=True, nogil=True)
def _note(side, other, weight, sums, marks, touched, n_touched):
    """Add a weight to one of the pairs of the step; returns how many pairs it touched so far."""
    sums[side, other] += weight
    if marks[side, other]:
        return n_touched
    marks[side, other] = True
    touched[n_touched, 0], touched[n_touched, 1] = side, other
    return n_touched + 1


@njit(cache=True, nogil=True)
def _merge(
    pair, made, mine, sequence, lengths, word_of, counts, keys, table, heap, segments, places, used, sums, ends, marks
):
    """Merge the pair at its places ``mine``; count, list and push the pairs that this makes.

    They have the token ``made`` on one side: ``sums[0, x]`` is the weight of (x, made), ``sums[1, x]`` of (made, x).
    """
    left, right = pair >> 32, pair & 0xFFFFFFFF
    long = lengths[left] + lengths[right]
    lengths[made] = long
    seen = np.empty((2 * len(mine), 3), np.int32)  # side, the other token, place of the pair
    touched = np.empty((2 * len(mine) + 1, 2), np.int32)
    n_seen = n_touched = 0
    for at in mine:
        middle = at + lengths[left]
        if sequence[at] != left or sequence[middle] != right:
            continue
        weight = counts[word_of[at]]
        if sequence[at - 1] != _BREAK:
            start = at - 1 if sequence[at - 1] >= 0 else at + sequence[at - 1]
            other = sequence[start]
            if other == made:  # merged a moment ago, when this was counted as (made, left)
                n_touched = _note(1, left, -weight, sums, marks, touched, n_touched)
            else:
                table[_find(np.int64(other) << 32 | left, keys), 0] -= weight
            n_touched = _note(0, other, weight, sums, marks, touched, n_touched)
            seen[n_seen, 0], seen[n_seen, 1], seen[n_seen, 2] = 0, other, start
            n_seen += 1
        after = middle + lengths[right]
        if sequence[after] != _BREAK:
            other = sequence[after]
            table[_find(np.int64(right) << 32 | other, keys), 0] -= weight
            n_touched = _note(1, other, weight, sums, marks, touched, n_touched)
            seen[n_seen, 0], seen[n_seen, 1], seen[n_seen, 2] = 1, other, at
            n_seen += 1
        sequence[middle] = _INSIDE
        sequence[at] = made
        sequence[after - 1] = -long
    row = _find(pair, keys)
    table[row, 0] = table[row, 1] = 0

    for k in range(n_seen):
        ends[seen[k, 0], seen[k, 1]] += 1
    for k in range(n_touched):
        side, other = touched[k, 0], np.int64(touched[k, 1])
        key = np.int64(made) << 32 | other if side else other << 32 | made
        row = _find(key, keys)
        if keys[row] == -1:
            keys[row] = key
            used[0] += 1
        table[row, 0] += sums[side, other]
        if ends[side, other]:
            segment = used[2]
            segments[segment, 0], segments[segment, 2] = used[3], table[row, 1]
            used[3] += ends[side, other]
            segments[segment, 1] = used[3]
            table[row, 1] = segment
            used[2] += 1
            ends[side, other] = segments[segment, 0]
        if table[row, 0] > 0:
            _push(heap, used, table[row, 0], key)
    for k in range(n_seen):
        places[ends[seen[k, 0], seen[k, 1]]] = seen[k, 2]
        ends[seen[k, 0], seen[k, 1]] += 1
    for k in range(n_touched):
        side, other = touched[k, 0], touched[k, 1]
        sums[side, other] = ends[side, other] = 0
        marks[side, other] = False
