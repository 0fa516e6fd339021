"""Requests that begin alike as the branches of a tree, cut into batches for `models.scoring`.

A batch is a part of the forest of all requests, packed without padding: the tokens of a node, then those of the nodes
that continue it, depth first. Everything below a node is one run of tokens, and so is the node.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

Request = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of its continuation, at least one each."""

Segment = tuple[int, int]
"""First token and the one behind the last, in a batch."""

_SHORTEST_EDGE = 16
_LEAST_SAVING = 64
_DEEPEST = 4


@dataclass
class Batch:
    """A part of the forest.

    Attributes:
        tokens: ids, (N,), int64, nodes depth first.
        positions: of each in its sequence, (N,), int64.
        nodes: tokens of each node.
        levels: by depth, for each node that others continue, the tokens below it and its own.
        asked: tokens after which others are asked for, (P,), int64.
        after: index in `asked`, (M,), int64, in order, for each token asked for.
        targets: that token, (M,), int64.
        requests: which request it belongs to, (M,).
    """

    tokens: np.ndarray
    positions: np.ndarray
    nodes: list[Segment]
    levels: list[list[tuple[Segment, Segment]]]
    asked: np.ndarray
    after: np.ndarray
    targets: np.ndarray
    requests: np.ndarray


def batches(
    requests: Sequence[Request], tokens: int, *, max_seq_len: int, vocab_size: int, targets_below: int | None = None
) -> Iterator[Batch]:
    """Batches of all requests, neighbours in the order of their tokens together.

    Args:
        requests: contexts and continuations, at least one.
        tokens: in a batch at most; a longer sequence is one of its own.
        max_seq_len: tokens that a context and its continuation, less the last token, may have.
        vocab_size: ids are below this.
        targets_below: ids that are asked for are below this; None is vocab_size.

    Raises:
        ValueError: a request is empty, too long, or has ids outside the vocabulary.
    """
    sequences = _sequences(requests, max_seq_len, vocab_size, vocab_size if targets_below is None else targets_below)
    for part in _parts(_tree(sequences), tokens):
        yield _pack(part, sequences)


@dataclass
class _Sequence:
    """Tokens that the model reads, which requests have in common, (T,), and what is asked to follow their ends."""

    tokens: np.ndarray
    asked: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)


@dataclass(eq=False)
class _Node:
    """Tokens `start` to `stop` of a sequence; `parent` holds those before."""

    start: int
    stop: int
    sequence: int
    parent: "_Node | None"


def _sequences(requests: Sequence[Request], longest: int, size: int, targets_below: int) -> list[_Sequence]:
    """Distinct sequences, sorted by their tokens."""
    found: dict[bytes, _Sequence] = {}
    before, array = None, np.array([], ">i4")  # the last context
    read, sequence = None, None  # what the last request has the model read of its continuation, and of all
    known: set[tuple[int, ...]] = set()  # continuations with ids that may be asked for; most are alike
    for i, (context, continuation) in enumerate(requests):
        if not len(context) or not len(continuation):
            raise ValueError(f"request {i} has an empty {'continuation' if len(context) else 'context'}")
        asked = tuple(continuation)
        if asked not in known:
            if min(asked) < 0 or max(asked) >= targets_below:
                raise ValueError(f"request {i} asks for ids outside the vocabulary of {targets_below}")
            known.add(asked)
        if context is not before:  # choices have one context
            # big-endian, so that bytes sort as tokens do
            before, array, read = context, np.array(context, ">i4"), None
        if asked[:-1] != read:  # of choices of one token, the same
            read = asked[:-1]
            tokens = np.concatenate([array, np.array(read, ">i4")])
            if len(tokens) > longest:
                raise ValueError(f"request {i} has {len(tokens)} tokens, but model.max_seq_len is {longest}")
            if tokens.min() < 0 or tokens.max() >= size:
                raise ValueError(f"request {i} has ids outside the vocabulary of {size}")
            sequence = found.setdefault(tokens.tobytes(), _Sequence(tokens))
        sequence.asked.append((i, asked))
    return [found[key] for key in sorted(found)]


def _tree(sequences: list[_Sequence]) -> list[tuple[int, _Node]]:
    """Each sequence with the node that it ends in, depth first.

    What few sequences share, or for few tokens, is no node: computing it again costs less than another attention.
    """
    shared = np.zeros(len(sequences), np.int64)  # with the sequence before
    for i, (a, b) in enumerate(itertools.pairwise(s.tokens for s in sequences), 1):
        n = min(len(a), len(b))
        differ = a[:n] != b[:n]
        first = int(differ.argmax()) if n else 0
        shared[i] = first if n and differ[first] else n
    leaves: list[tuple[int, _Node]] = []
    stack: list[tuple[int, int, int, _Node | None, int]] = [(0, len(sequences), 0, None, 0)]
    while stack:
        low, high, start, parent, depth = stack.pop()
        if high - low == 1:
            length = len(sequences[low].tokens)
            leaves.append((low, _Node(start, length, low, parent) if parent is None or length > start else parent))
            continue
        inner = shared[low + 1 : high]
        stop = int(inner.min())
        cuts = [low, *(low + 1 + np.flatnonzero(inner == stop)).tolist(), high]
        edge = stop - start
        if depth < _DEEPEST and edge >= _SHORTEST_EDGE and edge * (len(cuts) - 2) >= _LEAST_SAVING:
            start, parent, depth = stop, _Node(start, stop, low, parent), depth + 1
        stack.extend((a, b, start, parent, depth) for a, b in reversed(list(itertools.pairwise(cuts))))
    return leaves


def _path(node: _Node | None) -> list[_Node]:
    path = []
    while node is not None:
        path.append(node)
        node = node.parent
    return path[::-1]


def _parts(leaves: list[tuple[int, _Node]], tokens: int) -> Iterator[list[tuple[int, list[_Node]]]]:
    """Cut the forest into batches of at most so many tokens; nodes above a cut are in both."""
    part: list[tuple[int, list[_Node]]] = []
    there: set[_Node] = set()
    size = 0
    for sequence, leaf in leaves:
        path = _path(leaf)
        new = sum(node.stop - node.start for node in path if node not in there)
        if part and size + new > tokens:
            yield part
            part, there, size = [], set(), 0
            new = leaf.stop
        part.append((sequence, path))
        there.update(path)
        size += new
    yield part


def _pack(part: list[tuple[int, list[_Node]]], sequences: list[_Sequence]) -> Batch:
    first: dict[_Node, int] = {}
    below: dict[_Node, int] = {}  # where the tokens of those that continue a node end
    size = 0
    asked: list[np.ndarray] = []
    after: list[int] = []
    targets: list[int] = []
    requests: list[int] = []
    n_asked = 0
    for index, path in part:
        sequence = sequences[index]
        for node in path:
            if node not in first:
                first[node] = size
                size += node.stop - node.start
        for node in path:
            below[node] = size
        length = len(sequence.tokens)
        most = max(len(continuation) for _, continuation in sequence.asked)
        places = np.concatenate([first[n] + np.arange(max(0, length - most - n.start), n.stop - n.start) for n in path])
        asked.append(places)
        for request, continuation in sequence.asked:
            after.extend(range(n_asked + most - len(continuation), n_asked + most))
            targets.extend(continuation)
            requests.extend([request] * len(continuation))
        n_asked += most
    order = np.argsort(after, kind="stable")
    levels: list[list[tuple[Segment, Segment]]] = [[] for _ in range(_DEEPEST)]
    for node, start in first.items():
        stop = start + node.stop - node.start
        if below[node] > stop:
            levels[len(_path(node)) - 1].append(((stop, below[node]), (start, stop)))
    return Batch(
        np.concatenate([sequences[n.sequence].tokens[n.start : n.stop] for n in first]).astype(np.int64),
        np.concatenate([np.arange(n.start, n.stop) for n in first]),
        [(start, start + n.stop - n.start) for n, start in first.items()],
        [level for level in levels if level],
        np.concatenate(asked),
        np.array(after, np.int64)[order],
        np.array(targets)[order],
        np.array(requests)[order],
    )
