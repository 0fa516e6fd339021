"""The order in which training sees tokens: exact, seekable, the same for any number of workers.

A split of ``n`` tokens holds ``(n - 1) // sequence_length`` samples of ``sequence_length + 1`` tokens, one overlapping
the next by the token that is the last target. An epoch goes through all of them once, in an order that a keyed
permutation gives; batch ``data_step`` takes the next ``global_batch`` samples. So a batch is a pure function of the
manifest, the seed, the global batch and the data step: nothing has to be remembered, nothing depends on the workers.

A split in which whole documents were packed consists of such samples already; they do not overlap.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from pipelines.shards import TokenShards

PADDING = -100  # stands in samples where documents were packed whole and left room; no target, and no input either
_ROUNDS = 6


def permuted(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Image of each index under a pseudo-random permutation of ``range(n)`` chosen by ``key``.

    A balanced Feistel network over the smallest even number of bits that holds ``n``, walked until the value falls
    below ``n`` again (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"): no table of ``n`` entries.

    Args:
        index: (k,) integers in ``[0, n)``.
        n: size of the domain, below 2^62.
        key: 64-bit key.

    Returns:
        (k,) int64.
    """
    half = max((int(n - 1).bit_length() + 1) // 2, 1)
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    keys = np.random.SeedSequence(key & (2**64 - 1)).generate_state(_ROUNDS, np.uint64)
    value = np.asarray(index, np.uint64).copy()
    todo = np.ones(value.shape, bool)
    while todo.any():
        left, right = value[todo] >> shift, value[todo] & mask
        for k in keys:
            left, right = right, left ^ (_mix(right ^ k) & mask)
        value[todo] = (left << shift) | right
        todo = value >= np.uint64(n)
    return value.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Finalizer of splitmix64 (Steele et al. 2014): spreads every input bit over the word."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Batches:
    """Batches of a split by their data step.

    Args:
        shards: the split.
        sequence_length: tokens that the model sees at once.
        global_batch: samples in a step, over all workers.
        seed: of the order.

    Raises:
        ValueError: the split is shorter than one sample, or was packed for another sequence length.
    """

    def __init__(self, shards: TokenShards, sequence_length: int, global_batch: int, seed: int) -> None:
        self.shards, self.sequence_length = shards, sequence_length
        self.global_batch, self.seed = global_batch, seed
        packed = shards.sequence_length
        if packed not in (None, sequence_length):
            raise ValueError(
                f"{shards.folder}: whole documents were packed into sequences of {packed} tokens, so no other length "
                f"can be read from it, and {sequence_length} was asked for; tokenize with that sequence_length, or "
                "with packing concatenate, which suits any"
            )
        self._width = sequence_length + 1
        self._stride = sequence_length if packed is None else self._width
        self.n_samples = max(shards.n_tokens - self._width + self._stride, 0) // self._stride
        if self.n_samples < 1:
            raise ValueError(
                f"{shards.folder}: holds {shards.n_tokens} tokens, fewer than one sequence of {sequence_length} "
                "and its last target; lower sequence_length or tokenize more documents"
            )

    def sample_indices(self, data_step: int) -> np.ndarray:
        """Which samples the batch holds, (global_batch,) int64."""
        return self._samples_at(np.array([data_step]))

    def _samples_at(self, data_steps: np.ndarray) -> np.ndarray:
        """The samples of the batches of data steps, (steps * global_batch,) int64."""
        places = (data_steps[:, None] * self.global_batch + np.arange(self.global_batch)).ravel()
        epochs, inside = np.divmod(places, self.n_samples)
        out = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            out[rows] = permuted(inside[rows], self.n_samples, (self.seed << 32) ^ int(epoch))
        return out

    def tokens_by_source(self, data_steps: np.ndarray) -> dict[str, int]:
        """How many targets of the batches of data steps belong to documents of each source; padding to none.

        Args:
            data_steps: (k,) int64, each counted as often as it is there.
        """
        told: dict[str, int] = {}
        # Some million samples at a time: a long run has more than fit into memory.
        for some in np.array_split(data_steps, -(-len(data_steps) * self.global_batch // 2**21) or 1):
            starts = self._samples_at(some) * self._stride + 1  # the first token of a sample is no target
            for source, count in self.shards.tokens_by_source(starts, self.sequence_length).items():
                told[source] = told.get(source, 0) + count
        return told

    def rank(self, data_step: int, rank: int, world_size: int) -> np.ndarray:
        """One worker's share of a batch, (ceil(global_batch / world_size), sequence_length + 1) int64.

        Worker ``r`` has the rows from ``r * ceil(global_batch / world_size)`` of the global batch on. All shares have
        the same number of rows, whether or not ``world_size`` divides the batch: the last ones are filled up with rows
        of nothing but ``PADDING``, which also stands for padding within a sample.
        """
        share = -(-self.global_batch // world_size)
        mine = self.sample_indices(data_step)[rank * share : (rank + 1) * share]
        out = np.full((share, self._width), PADDING, np.int64)
        for row, index in enumerate(mine):
            out[row] = self._sample(int(index))
        return out

    def documents(self, data_step: int, row: int) -> list[dict[str, Any]]:
        """The documents that a sample holds parts of, the one with the most tokens in it first.

        Args:
            data_step: of the batch.
            row: of the sample, within the global batch.

        Returns:
            id, source and url of each document, and ``tokens``: its part of the sample, int64.
        """
        start = int(self.sample_indices(data_step)[row]) * self._stride
        found = []
        for entry in self.shards.documents(start, self._width):
            first = max(entry["start"], start)
            last = min(entry["start"] + entry["length"], start + self._width)
            tokens = self.shards.read(first, last - first).astype(np.int64)
            found.append({**{name: entry[name] for name in ("id", "source", "url")}, "tokens": tokens})
        return sorted(found, key=lambda document: -len(document["tokens"]))

    def in_order(
        self, n_samples: int, rank: int, world_size: int, rows: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """``n_samples`` of the split's samples, evenly from its beginning to its end, shared out over the workers.

        Sources lie one after another in a split, so that its first samples would be of the first source alone.

        Every worker gets the same number of arrays of the same shape, since collectives need all of them to take part;
        what fills up the last ones weighs nothing.

        Yields:
            samples (rows, sequence_length + 1) int64, and their weights (rows,) float32, 1 or 0.
        """
        n = min(n_samples, self.n_samples)
        rounds = -(-n // (rows * world_size))
        for index in np.arange(rounds * world_size * rows).reshape(rounds, world_size, rows)[:, rank]:
            samples = [self._sample(min(int(i), n - 1) * self.n_samples // n) for i in index]
            yield np.stack(samples), (index < n).astype(np.float32)

    def _sample(self, index: int) -> np.ndarray:
        sample = self.shards.read(index * self._stride, self._width).astype(np.int64)
        if self.shards.sequence_length is not None:
            sample[sample == self.shards.pad_id] = PADDING
        return sample


def prefetch(items: Iterable, depth: int = 4) -> Iterator:
    """``items``, made by a thread up to ``depth`` ahead; the thread ends when the iterator is closed."""
    ready: queue.Queue = queue.Queue(depth)
    stopped = threading.Event()
    end = object()

    def put(value: object) -> None:
        while not stopped.is_set():
            try:
                ready.put(value, timeout=0.1)
            except queue.Full:
                continue
            return

    def work() -> None:
        try:
            for item in items:
                put((item, None))
                if stopped.is_set():
                    return
            put((end, None))
        except BaseException as error:  # handed to the reader, who raises it
            put((None, error))

    threading.Thread(target=work, daemon=True, name="prefetch").start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stopped.set()
