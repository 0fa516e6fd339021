import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines import storage
from pipelines.dedup.exact import ExactDedup, find_duplicates
from pipelines.documents import to_table


def write_parts(folder, texts):
    """Parts with the given texts; ids are ``<part>-<row>``."""
    parts = []
    for p, rows in enumerate(texts):
        uri = storage.join(str(folder), f"part-{p:05d}.parquet")
        table = to_table({"id": f"{p}-{r}", "text": text} for r, text in enumerate(rows))
        folder.mkdir(exist_ok=True)
        pq.write_table(table, uri, row_group_size=7)
        parts.append(uri)
    return parts


def read_output(output):
    if not output.exists():
        return {}
    return {
        (file.name, row["row"]): (row["duplicate_of"], row["similarity"])
        for file in sorted(output.glob("*.parquet"))
        for row in pq.read_table(file).to_pylist()
    }


@pytest.mark.parametrize("partitions", [None, 1, 2, 5])
def test_every_repeat_is_listed_with_the_first_document_of_its_text(ray_session, tmp_path, partitions):
    rng = np.random.default_rng(3)
    texts = [[f"text {i}" for i in rng.integers(0, 60, 40)] for _ in range(3)]
    parts = write_parts(tmp_path / "in", [*texts, ["only here"]])
    expected, first = {}, {}
    for p, rows in enumerate(texts):
        for r, text in enumerate(rows):
            if text in first:
                expected[f"part-{p:05d}.parquet", r] = (first[text], 1.0)
            first.setdefault(text, f"{p}-{r}")
    dropped = find_duplicates(parts, str(tmp_path / "out"), ExactDedup(), partitions)
    assert read_output(tmp_path / "out") == expected
    assert dropped == len(expected)
    assert not (tmp_path / "out" / "part-00003.parquet").exists()


def test_case_and_space_count_unless_told_otherwise(ray_session, tmp_path):
    parts = write_parts(tmp_path / "in", [["One  two", "one two\n", "three"]])
    assert find_duplicates(parts, str(tmp_path / "a"), ExactDedup()) == 0
    assert find_duplicates(parts, str(tmp_path / "b"), ExactDedup(ignore_case_and_space=True)) == 1
    assert read_output(tmp_path / "b") == {("part-00000.parquet", 1): ("0-0", 1.0)}


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
