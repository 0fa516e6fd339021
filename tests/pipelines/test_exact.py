import json

import numpy as np
import pytest
from duplicates import read_output, write_parts

from pipelines.dedup.exact import ExactDedup, find_duplicates


@pytest.mark.parametrize("partitions", [1, 2, 7])
def test_every_repeat_is_listed_with_the_first_document_of_its_text(ray_session, tmp_path, partitions):
    rng = np.random.default_rng(3)
    texts = [[f"text {i}" for i in rng.integers(0, 60, 40)] for _ in range(3)]
    parts = write_parts(tmp_path / "in", [*texts, ["only here"]])
    expected, first = {}, {}
    for p, rows in enumerate(texts):
        for r, text in enumerate(rows):
            if text in first:
                expected[p, r] = (first[text], 1.0)
            first.setdefault(text, f"{p}-{r}")
    dropped = find_duplicates(parts, str(tmp_path / "out"), ExactDedup(), partitions)
    assert read_output(tmp_path / "out") == expected
    assert dropped == len(expected)
    assert not (tmp_path / "out" / "part-00003.parquet").exists()


def test_case_and_space_count_unless_told_otherwise(ray_session, tmp_path):
    parts = write_parts(tmp_path / "in", [["One  two", "one two\n", "three"]])
    assert find_duplicates(parts, str(tmp_path / "a"), ExactDedup()) == 0
    assert find_duplicates(parts, str(tmp_path / "b"), ExactDedup(ignore_case_and_space=True)) == 1
    assert read_output(tmp_path / "b") == {(0, 1): ("0-0", 1.0)}


def test_an_earlier_result_does_not_mix_with_a_new_one(ray_session, tmp_path):
    find_duplicates(write_parts(tmp_path / "in", [["a"], ["a"]]), str(tmp_path / "out"), ExactDedup())
    assert read_output(tmp_path / "out")
    find_duplicates(write_parts(tmp_path / "in", [["a"], ["b"]]), str(tmp_path / "out"), ExactDedup())
    assert read_output(tmp_path / "out") == {}


def test_a_corpus_without_documents_has_no_duplicates(ray_session, tmp_path):
    parts = write_parts(tmp_path / "in", [[], []])
    assert find_duplicates(parts, str(tmp_path / "out"), ExactDedup()) == 0


def test_switched_off_it_lists_nothing(ray_session, tmp_path):
    parts = write_parts(tmp_path / "in", [["a", "a"]])
    assert find_duplicates(parts, str(tmp_path / "out"), ExactDedup(enabled=False)) == 0
    assert read_output(tmp_path / "out") == {}


def test_parts_of_the_same_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"two parts are called x\.parquet"):
        find_duplicates(["a/x.parquet", "b/x.parquet"], str(tmp_path), ExactDedup())


@pytest.mark.parametrize("partitions", [2])
def test_a_text_that_very_many_have_gives_the_same_result(ray_session, tmp_path, partitions):
    rng = np.random.default_rng(4)
    texts = [["everywhere" if i > 40 else f"text {i}" for i in rng.integers(0, 80, 80)] for _ in range(3)]
    parts = write_parts(tmp_path / "in", texts)
    find_duplicates(parts, str(tmp_path / "a"), ExactDedup(), partitions)
    find_duplicates(parts, str(tmp_path / "b"), ExactDedup(), partitions, limit=20)
    assert read_output(tmp_path / "a") == read_output(tmp_path / "b")
    assert len(read_output(tmp_path / "a")) > 100


@pytest.mark.parametrize("partitions", [1, 7])
def test_the_newest_or_best_of_equal_texts_stays(ray_session, tmp_path, partitions):
    texts = [["same", "same", "other"], ["same", "other"]]
    days = ["2024-05-01", "2024-05-03T10:00:00Z", "2020-01-01"], ["2024-05-02", None]
    metadata = [[json.dumps({"date": d, "points": i}) for i, d in enumerate(part)] for part in days]
    parts = write_parts(tmp_path / "in", texts, metadata)
    find_duplicates(parts, str(tmp_path / "newest"), ExactDedup(keep="newest"), partitions)
    assert {k: v[0] for k, v in read_output(tmp_path / "newest").items()} == {
        (0, 0): "0-1",
        (1, 0): "0-1",
        (1, 1): "0-2",
    }
    best = ExactDedup(keep="best_score", score_field="points")
    find_duplicates(parts, str(tmp_path / "best"), best, partitions)
    assert {k: v[0] for k, v in read_output(tmp_path / "best").items()} == {(0, 0): "0-1", (1, 0): "0-1", (1, 1): "0-2"}


def test_a_score_needs_a_field():
    with pytest.raises(ValueError, match="keep is best_score, which needs score_field"):
        ExactDedup(keep="best_score").validate()
    with pytest.raises(ValueError, match="keep is last, must be one of first"):
        ExactDedup(keep="last").validate()
