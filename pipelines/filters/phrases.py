"""Many phrases looked for at once in one pass over the bytes (Aho and Corasick 1975)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.words.codes import kernel
from pipelines.words.columns import buffers


class Phrases(NamedTuple):
    """An automaton over bytes; one table of 256 entries for every byte of the phrases.

    Attributes:
        phrases: what is looked for, in order.
        moves: state after a byte, (states, 256), int32.
        ends: phrase that ends in a state or -1, (states,), int32.
        shorter: the next state with a phrase that ends there too, or 0, (states,), int32.
    """

    phrases: list[str]
    moves: np.ndarray
    ends: np.ndarray
    shorter: np.ndarray

    @classmethod
    def of(cls, phrases: Iterable[str]) -> Phrases:
        """The automaton for some phrases; empty ones and repetitions are left out."""
        wanted = [phrase for phrase in dict.fromkeys(phrases) if phrase]
        children: list[dict[int, int]] = [{}]
        ended: dict[int, int] = {}
        for number, phrase in enumerate(wanted):
            state = 0
            for byte in phrase.encode():
                if byte not in children[state]:
                    children[state][byte] = len(children)
                    children.append({})
                state = children[state][byte]
            ended[state] = number
        moves = np.zeros((len(children), 256), np.int32)
        ends = np.full(len(children), -1, np.int32)
        ends[list(ended)] = list(ended.values())
        shorter = np.zeros(len(children), np.int32)
        queue = deque([(0, 0)])  # states by depth, with the state of their longest proper suffix
        while queue:
            state, suffix = queue.popleft()
            shorter[state] = suffix if ends[suffix] >= 0 else shorter[suffix]
            if state:
                moves[state] = moves[suffix]
            for byte, child in children[state].items():
                queue.append((child, int(moves[suffix, byte]) if state else 0))
            for byte, child in children[state].items():
                moves[state, byte] = child
        return cls(wanted, moves, ends, shorter)

    def find(self, column: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
        """Which phrases occur in which texts.

        Returns:
            Text and phrase of each pair, each once, ordered by text and phrase, int64.
        """
        data, offsets = buffers(column)
        found = np.empty((len(offsets) + 1024, 2), np.int64)
        while (count := _find(data, offsets, self.moves, self.ends, self.shorter, found)) > len(found):
            found = np.empty((count, 2), np.int64)
        pairs = np.unique(found[:count], axis=0)
        return pairs[:, 0], pairs[:, 1]


@kernel
def _find(data, offsets, moves, ends, shorter, found):
    """Write (text, phrase) for each hit into ``found`` as far as it has room; returns how many there are."""
    count = 0
    for text in range(len(offsets) - 1):
        state = 0
        for i in range(offsets[text], offsets[text + 1]):
            state = moves[state, data[i]]
            at = state if ends[state] >= 0 else shorter[state]
            while at != 0:
                if count < len(found):
                    found[count, 0] = text
                    found[count, 1] = ends[at]
                count += 1
                at = shorter[at]
    return count
