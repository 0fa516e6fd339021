import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.packing import pack


def sequences_by_hand(lengths, width):
    """Best fit as the paper words it, by looking at all sequences for each piece."""
    pieces = [min(width, length - start) for length in lengths for start in range(0, length, width)]
    rooms: list[int] = []
    for piece in sorted(pieces, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= piece]
        best = min(fitting, key=lambda i: rooms[i], default=None)
        if best is None:
            rooms.append(width)
            best = len(rooms) - 1
        rooms[best] -= piece
    return sorted(rooms)


@settings(deadline=None)
@given(st.lists(st.integers(1, 70), max_size=60), st.integers(1, 30))
def test_packing_is_best_fit_and_cuts_only_what_is_longer(lengths, width):
    pieces = pack(np.array(lengths, np.int64), width)
    ends = np.cumsum(pieces.length + pieces.padding)
    starts = ends - pieces.length - pieces.padding
    n = int(ends[-1]) // width if lengths else 0
    assert n * width == (ends[-1] if lengths else 0)
    # no piece lies in two sequences, and padding only at their ends
    assert (starts // width == (starts + pieces.length - 1) // width).all()
    assert (ends[pieces.padding > 0] % width == 0).all()
    rooms = np.bincount(starts // width, pieces.padding, n).astype(int) if lengths else []
    assert sorted(rooms) == sequences_by_hand(lengths, width)
    # every token of every document once, and only long documents in pieces
    for document, length in enumerate(lengths):
        mine = pieces.document == document
        assert mine.sum() == -(-length // width)
        spans = sorted(zip(pieces.start[mine], pieces.length[mine], strict=True))
        assert [start for start, _ in spans] == np.cumsum([0, *(size for _, size in spans)])[:-1].tolist()
        assert sum(size for _, size in spans) == length
    # within a sequence the documents keep their order
    same = np.diff(starts // width) == 0
    assert (np.diff(pieces.document)[same] >= 0).all()


def test_a_hand_worked_example():
    # Width 10: 10 fills one, 7 and 3 another, 6 and 4 a third; 12 is cut into 10 and 2, which finds no room.
    pieces = pack(np.array([6, 12, 3, 7, 10, 4]), 10)
    assert pieces.document.tolist() == [0, 5, 1, 1, 2, 3, 4]
    assert pieces.start.tolist() == [0, 0, 0, 10, 0, 0, 0]
    assert pieces.length.tolist() == [6, 4, 10, 2, 3, 7, 10]
    assert pieces.padding.tolist() == [0, 0, 0, 8, 0, 0, 0]
