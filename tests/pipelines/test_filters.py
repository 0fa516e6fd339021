import numpy as np
import pyarrow as pa

from pipelines.documents import to_table
from pipelines.filters import Batch, Measure, judge


def test_the_first_broken_measure_is_the_verdict():
    measures = [
        Measure("length", np.array([1.0, 5.0, 9.0, np.nan, 5.0]), minimum=2, maximum=8),
        Measure("other", np.array([9.0, 9.0, 9.0, 9.0, 1.0]), maximum=3),
    ]
    broken, value, threshold = judge(measures, 5)
    assert broken.tolist() == [0, 1, 0, 1, -1]
    assert value[:4].tolist() == [1, 9, 9, 9]
    assert threshold[:4].tolist() == [2, 3, 8, 3]
    assert np.isnan(value[4])
    assert np.isnan(threshold[4])
    assert judge([], 2)[0].tolist() == [-1, -1]


def batch(*texts):
    return Batch(to_table([{"id": str(i), "text": text} for i, text in enumerate(texts)]))


def words(some):
    return (some.texts.words.last - some.texts.words.first).tolist()


def test_a_filtered_batch_keeps_its_analysis():
    whole = batch("one", "one two", None, "one two three four")
    assert words(whole) == [1, 2, 0, 4]
    rest = whole.filter(np.array([False, True, True, True]))
    assert rest.texts.data is whole.texts.data
    assert words(rest) == [2, 0, 4]
    assert rest.table["id"].to_pylist() == ["1", "2", "3"]


def test_other_text_is_analysed_where_it_changed():
    whole = batch("one", "one two", None, "one two three four")
    assert words(whole) == [1, 2, 0, 4]
    few = whole.with_text(pa.array(["one", "1 2 3", None, "one two three four"], pa.large_string()))
    assert words(few) == [1, 3, 0, 4]
    many = whole.with_text(pa.array(["a b", "1 2 3", "x", ""], pa.large_string()))
    assert words(many) == [2, 3, 1, 0]
    assert many.table.schema == whole.table.schema
    assert words(batch("x").with_text(pa.array(["y z"], pa.large_string()))) == [2]
