import dataclasses
import math
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.documents import to_table
from pipelines.filters import Batch, judge
from pipelines.filters.gopher import GopherQuality, GopherRepetition


def batch(*texts):
    return Batch(to_table([{"id": str(i), "text": text} for i, text in enumerate(texts)]))


def reason(rules, text, **changes):
    """What of a rule set the text breaks, without the set's name, or None."""
    measures = dataclasses.replace(rules, **changes).apply(batch(text)).measures
    broken, _, _ = judge(measures, 1)
    return None if broken[0] < 0 else measures[broken[0]].reason.partition(": ")[2]


def values(rules, *texts):
    """The values of each rule, by its name."""
    return {m.reason.partition(": ")[2]: m.values.tolist() for m in rules.apply(batch(*texts)).measures}


# 100 words, 500 characters of words, two stop words, no repetition
PROSE = ["the", "and", *[f"word{a}{b}" for a in "abcdefghij" for b in "abcdefghij"][:98]]


def swapped(n, word):
    return PROSE[: len(PROSE) - n] + [word] * n


@pytest.mark.parametrize(
    ("good", "bad", "rule"),
    [
        (PROSE[:50], PROSE[:49], "too few words"),
        ([*PROSE[:50], "--"], [*PROSE[:49], "--"], "too few words"),  # a word that is all punctuation does not count
        ([*PROSE[:48], "can't"], [*PROSE[:47], "can't"], "too few words"),  # a contraction is two
        (["the", "and"] * 50, ["the", "and"] * 49 + ["at", "of"], "mean word length"),  # 300 and 298 characters
        (
            [*["the", "and"], *["a" * 10] * 97, "a" * 24],
            [*["the", "and"], *["a" * 10] * 97, "a" * 25],
            "mean word length",
        ),
        (swapped(11, "word#"), swapped(13, "word#"), "hash signs"),  # the sign is a word: 11 of 111, 13 of 113
        (swapped(12, "so...on"), swapped(13, "so...on"), "ellipses"),  # three words: 12 of 124, 13 of 126
        (swapped(12, "so\u2026on"), swapped(13, "so\u2026on"), "ellipses"),
        (swapped(20, "12345"), swapped(21, "12345"), "alphabetic words"),
        (PROSE, [w for w in PROSE if w != "and"], "stop words"),
        (PROSE, ["the", "the", *PROSE[2:]], "stop words"),  # different ones are counted
    ],
)
def test_word_rules_on_both_sides_of_their_threshold(good, bad, rule):
    assert reason(GopherQuality(), " ".join(good)) is None
    assert reason(GopherQuality(), " ".join(bad)) == rule


def test_too_many_words():
    assert reason(GopherQuality(), " ".join(PROSE), max_words=100) is None
    assert reason(GopherQuality(), " ".join([*PROSE, "more"]), max_words=100) == "too many words"


@pytest.mark.parametrize("bullet", ["\u2022", "  -"])
def test_bullet_lines_on_both_sides_of_nine_tenths(bullet):
    lines = [" ".join(PROSE[i : i + 10]) for i in range(0, 100, 10)]
    marked = [f"{bullet} {line}" for line in lines]
    assert reason(GopherQuality(), "\n".join(marked[:9] + lines[9:])) is None
    assert reason(GopherQuality(), "\n".join(marked)) == "bullet lines"


@pytest.mark.parametrize("dots", ["...", "\u2026 "])
def test_ellipsis_lines_on_both_sides_of_three_tenths(dots):
    lines = [" ".join(PROSE[i : i + 10]) for i in range(0, 100, 10)]
    marked = [line + dots for line in lines]
    assert reason(GopherQuality(), "\n".join(marked[:3] + lines[3:])) is None
    assert reason(GopherQuality(), "\n".join(marked[:4] + lines[4:])) == "ellipsis lines"


def test_every_document_of_a_batch_has_every_value():
    found = values(GopherQuality(), "The # end...", "", "- a\nto be. That")
    assert found["too few words"] == [2, 0, 4]
    assert found["mean word length"][0] == 3
    assert math.isnan(found["mean word length"][1])
    assert found["hash signs"][::2] == [1 / 4, 0]
    assert found["ellipses"][0] == 1 / 4
    assert found["ellipsis lines"][::2] == [1, 0]
    assert found["bullet lines"][::2] == [0, 1 / 2]
    assert found["alphabetic words"][::2] == [2 / 4, 4 / 6]
    assert found["stop words"] == [0, 0, 2]  # The and That are not the and that


def test_stop_words_are_a_setting():
    assert values(GopherQuality(stop_words=["der", "und", "der"]), "der Hund und der Igel")["stop words"] == [2]
    assert values(GopherQuality(stop_words=[], min_stop_words=0), "der Hund")["stop words"] == [0]


OFF = {"max_top_ngram": {}, "max_duplicate_ngram": {}}
LONG = [f"a long line number {i:03d} of text" for i in range(10)]


def test_duplicate_lines_on_both_sides_of_three_tenths():
    rules = GopherRepetition(**OFF)
    assert reason(rules, "\n".join([*LONG[:7], "x", "x", "x"])) is None  # 2 of 10 occurred before
    assert reason(rules, "\n".join([*LONG[:6], "x", "x", "x", "x"])) is None  # 3 of 10
    assert reason(rules, "\n".join([*LONG[:5], "x", "x", "x", "x", "x"])) == "duplicate lines"  # 4 of 10


def test_duplicate_paragraphs_on_both_sides_of_three_tenths():
    rules = GopherRepetition(max_duplicate_lines=1.0, **OFF)
    assert reason(rules, "\n\n".join([*LONG[:6], "x", "x", "x", "x"])) is None
    assert reason(rules, "\n\n".join([*LONG[:5], "x", "x", "x", "x", "x"])) == "duplicate paragraphs"


def test_duplicate_characters_on_both_sides_of_a_fifth():
    # 79 + 1 + 20 + 1 + 20 = 121 characters, 20 of which occurred before: 16 %; with lines of 30: 30 of 141, 21 %
    rules = GopherRepetition(**OFF)
    filler = "\n".join("abcdefgh"[i] * 19 for i in range(4))
    assert reason(rules, f"{filler}\n{'x' * 20}\n{'x' * 20}") is None
    assert reason(rules, f"{filler}\n{'x' * 30}\n{'x' * 30}") == "duplicate line characters"
    paragraphs = f"{'a' * 80}\n\n{'x' * 30}\n\n{'x' * 30}"
    lenient = {"max_duplicate_lines": 1.0, "max_duplicate_paragraphs": 1.0}
    assert reason(rules, paragraphs, **lenient) == "duplicate paragraph characters"


@pytest.mark.parametrize(("n", "limit"), [(2, 0.20), (3, 0.18), (4, 0.16)])
def test_top_ngram_on_both_sides_of_its_threshold(n, limit):
    gram = " ".join(["abcd"] * n)
    repeated = len(gram) * 3
    text = " ".join([gram, "one", gram, "two", gram, "three"])
    fill = int(repeated / limit) - len(text)
    rules = GopherRepetition(max_top_ngram={n: limit}, max_duplicate_ngram={})
    # a single trailing word fills the text to the size at which the share is just below or just above the limit
    assert reason(rules, text + " " + "z" * (fill + 1)) is None
    assert reason(rules, text + " " + "z" * (fill - 3)) == f"top {n}-gram"


def test_defaults_are_those_of_the_paper():
    rules = GopherRepetition()
    assert rules.max_top_ngram == {2: 0.20, 3: 0.18, 4: 0.16}
    assert rules.max_duplicate_ngram == {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


def naive_top(words, n):
    grams = Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
    return len(grams.most_common(1)[0][0]) * grams.most_common(1)[0][1] if grams else 0


def naive_duplicate(words, n):
    seen, total, i = set(), 0, 0
    while i + n <= len(words):
        gram = tuple(words[i : i + n])
        if gram in seen:
            total += sum(map(len, gram))
            i += n
        else:
            seen.add(gram)
            i += 1
    return total


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["a", "bb", "ccc", "\u00e9"]), min_size=1, max_size=80), max_size=4))
def test_ngram_measures_equal_a_plain_implementation(documents):
    texts = [" ".join(words) for words in documents]
    rules = GopherRepetition(
        max_top_ngram=dict.fromkeys((1, 2, 3, 4, 7), 1.0), max_duplicate_ngram=dict.fromkeys((2, 5, 9), 1.0)
    )
    found = values(rules, *texts)
    for n in rules.max_top_ngram:
        assert found[f"top {n}-gram"] == [naive_top(w, n) / len(t) for w, t in zip(documents, texts, strict=True)]
    for n in rules.max_duplicate_ngram:
        expected = [naive_duplicate(w, n) / len(t) for w, t in zip(documents, texts, strict=True)]
        assert found[f"duplicate {n}-grams"] == expected


def naive_repeats(parts):
    seen, count, characters = set(), 0, 0
    for part in parts:
        if part in seen:
            count, characters = count + 1, characters + len(part)
        seen.add(part)
    return count / len(parts), characters


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "bb", " ", "c c", "\u00e9", "\n", "\n", "\n\n"]), min_size=1, max_size=25).map(
        "".join
    )
)
def test_line_and_paragraph_measures_equal_a_plain_implementation(text):
    found = values(GopherRepetition(), text)
    count, characters = naive_repeats(re.split("\n+", text))
    assert found["duplicate lines"] == [count]
    assert found["duplicate line characters"] == [characters / len(text)]
    count, characters = naive_repeats(re.split("\n{2,}", text.strip()))
    assert found["duplicate paragraphs"] == [count]
    assert found["duplicate paragraph characters"] == [characters / len(text)]


def test_impossible_settings_are_refused_by_name():
    with pytest.raises(ValueError, match="min_words"):
        GopherQuality(min_words=10, max_words=5).validate()
    with pytest.raises(ValueError, match="min_stop_words"):
        GopherQuality(min_stop_words=3, stop_words=["the", "the"]).validate()
    with pytest.raises(ValueError, match="max_duplicate_lines"):
        GopherRepetition(max_duplicate_lines=1.5).validate()
    with pytest.raises(ValueError, match="n is 0"):
        GopherRepetition(max_top_ngram={0: 0.5}).validate()
    GopherQuality().validate()
    GopherRepetition().validate()
