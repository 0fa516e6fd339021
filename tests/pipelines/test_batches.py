import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.batches import Batches, permuted, prefetch


class Counting:
    """Stands for a split whose token at offset i is i."""

    folder = "tokens/train"
    sequence_length = None

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens

    def read(self, start: int, length: int) -> np.ndarray:
        return np.arange(start, start + length, dtype=np.uint32)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 5000), st.integers(0, 2**40))
def test_permuted_is_a_permutation(n, key):
    assert np.array_equal(np.sort(permuted(np.arange(n), n, key)), np.arange(n))


def test_an_epoch_holds_every_sample_once_and_the_next_in_another_order():
    batches = Batches(Counting(1 + 10 * 24), 10, 8, seed=3)
    epochs = [np.concatenate([batches.sample_indices(3 * e + i) for i in range(3)]) for e in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(24))
    assert not np.array_equal(*epochs)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batches_do_not_depend_on_the_number_of_workers(world):
    batches = Batches(Counting(10_000), 16, 8, seed=1)
    for step in (0, 7, 1000):
        whole = batches.rank(step, 0, 1)
        assert np.array_equal(np.concatenate([batches.rank(step, r, world) for r in range(world)]), whole)
        assert whole.shape == (8, 17)
        assert np.array_equal(whole - whole[:, :1], np.tile(np.arange(17), (8, 1)))  # each a run of consecutive tokens


@pytest.mark.parametrize("world", [3, 5, 11])
def test_shares_of_any_number_of_workers_hold_the_batch_once_and_rows_that_fill_up(world):
    batches = Batches(Counting(10_000), 16, 8, seed=1)
    shares = [batches.rank(7, rank, world) for rank in range(world)]
    assert {share.shape for share in shares} == {(-(-8 // world), 17)}
    rows = np.concatenate(shares)
    assert np.array_equal(rows[:8], batches.rank(7, 0, 1))
    assert (rows[8:] == -100).all()


def test_seeds_give_different_orders_and_the_same_seed_the_same():
    orders = [Batches(Counting(10_000), 16, 8, seed=s).sample_indices(5).tolist() for s in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_reads_samples_from_all_over_once_whatever_the_workers(world):
    batches = Batches(Counting(1000), 10, 1, seed=0)
    seen, shapes = [], []
    for rank in range(world):
        got = list(batches.in_order(7, rank, world, rows=2))
        shapes.append([tokens.shape for tokens, _ in got])
        seen += [int(row[0]) // 10 for tokens, weights in got for row, w in zip(tokens, weights, strict=True) if w]
    assert batches.n_samples == 99
    assert sorted(seen) == [0, 14, 28, 42, 56, 70, 84]
    assert all(shape == shapes[0] for shape in shapes)  # collectives need every worker the same number of times


def test_a_split_shorter_than_a_sequence_is_refused():
    with pytest.raises(ValueError, match="holds 10 tokens, fewer than one sequence of 16"):
        Batches(Counting(10), 16, 1, seed=0)


def test_prefetch_keeps_order_and_hands_errors_on():
    def numbers():
        yield from range(5)
        raise OSError("storage is away")

    got = []
    with pytest.raises(OSError, match="storage is away"):
        got.extend(prefetch(numbers(), depth=2))
    assert got == list(range(5))


def test_the_documents_of_a_sample_are_named_with_their_tokens_in_it():
    class Hundreds(Counting):
        """Documents of 100 tokens each."""

        def documents(self, start, length):
            return [
                {"id": str(d), "source": "web", "url": f"u{d}", "start": 100 * d, "length": 100}
                for d in range(start // 100, (start + length - 1) // 100 + 1)
            ]

    batches = Batches(Hundreds(2000), 40, 4, seed=0)
    for row in range(4):
        start = int(batches.sample_indices(3)[row]) * 40
        named = batches.documents(3, row)
        parts = {str(d): [t for t in range(start, start + 41) if t // 100 == d] for d in range(20)}
        assert {d["id"]: d["tokens"].tolist() for d in named} == {d: tokens for d, tokens in parts.items() if tokens}
        assert [d["url"] for d in named] == [f"u{d['id']}" for d in named]
        assert len(named[0]["tokens"]) == max(map(len, parts.values()))
