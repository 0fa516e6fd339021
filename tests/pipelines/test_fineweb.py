import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.documents import to_table
from pipelines.filters import Batch, judge
from pipelines.filters.fineweb import FineWeb
from pipelines.words import Texts, characters

CLOSING = tuple(chr(c) for c in np.flatnonzero(characters.flags() & characters.TERMINAL))


def reason(text, **changes):
    measures = FineWeb(**changes).apply(Batch(to_table([{"text": text}]))).measures
    broken, _, _ = judge(measures, 1)
    return None if broken[0] < 0 else measures[broken[0]].reason.removeprefix("fineweb: ")


LONG = [f"This is the long line number {i} of them" for i in range(25)]  # 36 characters or more, 9 words


def test_lines_ending_in_punctuation_on_both_sides_of_twelve_hundredths():
    assert reason("\n".join([line + "." for line in LONG[:3]] + LONG[3:25])) is None  # 3 of 25
    assert reason("\n".join([line + "\u3002" for line in LONG[:3]] + LONG[3:25])) is None
    assert reason("\n".join([line + "." for line in LONG[:2]] + LONG[2:25])) == "lines ending in punctuation"
    assert reason("\n".join([line + ". " for line in LONG])) == "lines ending in punctuation"  # blanks are no marks


def test_short_lines_on_both_sides_of_two_thirds():
    many = {"max_newlines_per_word": 9, "max_short_lines": 0.6}
    short = [f"{i:029d}." for i in range(10)]  # 30 characters
    assert reason("\n".join(short[:6] + [f"{i:030d}." for i in range(4)]), **many) is None
    assert reason("\n".join(short[:7] + [f"{i:030d}." for i in range(3)]), **many) == "short lines"


def test_duplicate_characters_on_both_sides_of_a_hundredth():
    text = "\n\n \n".join([f"{'x' * 3960} words of a line.", *["This line is repeated, twice as it is."] * 2])
    size = len(text.replace("\n", ""))
    assert reason(text, max_short_lines=1, max_duplicate_line_characters=38 / size) is None
    assert reason(text, max_short_lines=1, max_duplicate_line_characters=37 / size) == "duplicate line characters"


def test_newlines_per_word_on_both_sides_of_three_tenths():
    rest = {"max_short_lines": 1, "max_duplicate_line_characters": 1}
    assert reason("aa bb.\n\n\ncc dd ee ff gg hh ii", **rest) is None  # 3 newlines, 9 words and a full stop
    assert reason("aa bb.\n\n\ncc dd ee ff gg hh", **rest) == "newlines per word"


def test_a_blank_document_breaks_no_rule_on_lines():
    measures = FineWeb().apply(Batch(to_table([{"text": ""}, {"text": " \n "}]))).measures
    assert np.isnan(measures[0].values).all()


TEXT = st.lists(
    st.sampled_from(
        ["a ", "Word. ", "end.", "\u3002", "\n", "\n", " ", "x" * 30, "\r", "\u00e9", "same line\nsame line\n"]
    ),
    max_size=25,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(TEXT)
def test_measures_equal_a_plain_reading(text):
    batch = Batch(to_table([{"text": text}]))
    found = [measure.values[0] for measure in FineWeb().apply(batch).measures]
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return
    repeated = sum(len(line) for i, line in enumerate(lines) if line in lines[:i])
    words = len(Texts.of(batch.table["text"]).words.hashes)
    assert found == [
        sum(line.endswith(CLOSING) for line in lines) / len(lines),
        sum(len(line) <= 30 for line in lines) / len(lines),
        repeated / len(text.replace("\n", "")),
        text.count("\n") / words,
    ]


def test_impossible_settings_are_refused_by_name():
    with pytest.raises(ValueError, match="max_short_lines"):
        FineWeb(max_short_lines=2).validate()
    with pytest.raises(ValueError, match="short_line"):
        FineWeb(short_line=-1).validate()
    FineWeb().validate()
