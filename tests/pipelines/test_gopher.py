import dataclasses
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.filters.gopher import (
    GopherQuality,
    GopherRepetition,
    duplicate_ngram_characters,
    duplicates,
    repeated_ngrams,
    top_ngram_characters,
)
from pipelines.words import analyse

# 100 words, 500 characters of words, two stop words, no repetition
PROSE = ["the", "and", *[f"word{a}{b}" for a in "abcdefghij" for b in "abcdefghij"][:98]]


def quality(words, **changes):
    verdict = dataclasses.replace(GopherQuality(), **changes).judge(
        analyse(words if isinstance(words, str) else " ".join(words))
    )
    return verdict and verdict.reason.removeprefix("gopher quality: ")


def swapped(n, word):
    return PROSE[: len(PROSE) - n] + [word] * n


@pytest.mark.parametrize(
    ("good", "bad", "reason"),
    [
        (PROSE[:50], PROSE[:49], "too few words"),
        ([*PROSE[:50], "--"], [*PROSE[:49], "--"], "too few words"),  # a word without letter or digit does not count
        (["the", "and"] * 50, ["the", "and"] * 49 + ["at", "of"], "mean word length"),  # 300 and 298 characters
        (
            [*["the", "and"], *["a" * 10] * 97, "a" * 24],
            [*["the", "and"], *["a" * 10] * 97, "a" * 25],
            "mean word length",
        ),
        (swapped(10, "word#"), swapped(11, "word#"), "hash signs"),
        (swapped(10, "so...on"), swapped(11, "so...on"), "ellipses"),
        (swapped(10, "so…on"), swapped(11, "so…on"), "ellipses"),
        (swapped(20, "12345"), swapped(21, "12345"), "alphabetic words"),
        (PROSE, [w for w in PROSE if w != "and"], "stop words"),
        (PROSE, ["the", "the", *PROSE[2:]], "stop words"),  # different ones are counted
    ],
)
def test_word_rules_on_both_sides_of_their_threshold(good, bad, reason):
    assert quality(good) is None
    assert quality(bad) == reason


def test_too_many_words():
    assert quality(PROSE, max_words=100) is None
    assert quality([*PROSE, "more"], max_words=100) == "too many words"


@pytest.mark.parametrize("bullet", ["•", "  -"])
def test_bullet_lines_on_both_sides_of_nine_tenths(bullet):
    lines = [" ".join(PROSE[i : i + 10]) for i in range(0, 100, 10)]
    marked = [f"{bullet} {line}" for line in lines]
    assert quality("\n".join(marked[:9] + lines[9:])) is None
    assert quality("\n".join(marked)) == "bullet lines"


@pytest.mark.parametrize("dots", ["...", "… "])
def test_ellipsis_lines_on_both_sides_of_three_tenths(dots):
    lines = [" ".join(PROSE[i : i + 10]) for i in range(0, 100, 10)]
    marked = [line + dots for line in lines]
    assert quality("\n".join(marked[:3] + lines[3:])) is None
    assert quality("\n".join(marked[:4] + lines[4:])) == "ellipsis lines"


def test_the_verdict_carries_value_and_threshold():
    verdict = GopherQuality().judge(analyse(" ".join(PROSE[:49])))
    assert (verdict.value, verdict.threshold) == (49, 50)


def repetition(text, **changes):
    off = {"max_top_ngram": {}, "max_duplicate_ngram": {}}
    verdict = dataclasses.replace(GopherRepetition(), **(off | changes)).judge(analyse(text))
    return verdict and verdict.reason.removeprefix("gopher repetition: ")


LONG = [f"a long line number {i:03d} of text" for i in range(10)]


def test_duplicate_lines_on_both_sides_of_three_tenths():
    assert repetition("\n".join([*LONG[:7], "x", "x", "x"])) is None  # 2 of 10 occurred before
    assert repetition("\n".join([*LONG[:6], "x", "x", "x", "x"])) is None  # 3 of 10
    assert repetition("\n".join([*LONG[:5], "x", "x", "x", "x", "x"])) == "duplicate lines"  # 4 of 10


def test_duplicate_paragraphs_on_both_sides_of_three_tenths():
    keep = {"max_duplicate_lines": 1.0}
    assert repetition("\n\n".join([*LONG[:6], "x", "x", "x", "x"]), **keep) is None
    assert repetition("\n\n".join([*LONG[:5], "x", "x", "x", "x", "x"]), **keep) == "duplicate paragraphs"


def test_duplicate_characters_on_both_sides_of_a_fifth():
    # 79 + 1 + 20 + 1 + 20 = 121 characters, 20 of which occurred before: 16 %; with lines of 30: 30 of 141, 21 %
    filler = "\n".join("abcdefgh"[i] * 19 for i in range(4))
    assert repetition(f"{filler}\n{'x' * 20}\n{'x' * 20}") is None
    assert repetition(f"{filler}\n{'x' * 30}\n{'x' * 30}") == "duplicate line characters"
    paragraphs = f"{'a' * 80}\n\n{'x' * 30}\n\n{'x' * 30}"
    lenient = {"max_duplicate_lines": 1.0, "max_duplicate_paragraphs": 1.0}
    assert repetition(paragraphs, **lenient) == "duplicate paragraph characters"


@pytest.mark.parametrize(("n", "limit"), [(2, 0.20), (3, 0.18), (4, 0.16)])
def test_top_ngram_on_both_sides_of_its_threshold(n, limit):
    gram = " ".join(["abcd"] * n)
    repeated = len(gram) * 3

    text = " ".join([gram, "one", gram, "two", gram, "three"])
    fill = int(repeated / limit) - len(text)
    settings = {"max_top_ngram": {n: limit}}
    # a single trailing word fills the text to the size at which the share is just below or just above the limit
    assert repetition(text + " " + "z" * (fill + 1), **settings) is None
    assert repetition(text + " " + "z" * (fill - 3), **settings) == f"top {n}-gram"


def test_defaults_are_those_of_the_paper():
    rules = GopherRepetition()
    assert rules.max_top_ngram == {2: 0.20, 3: 0.18, 4: 0.16}
    assert rules.max_duplicate_ngram == {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


def naive_top(words, n):
    (gram, count) = Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1)).most_common(1)[0]
    return len(gram) * count


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


WORDS = st.lists(st.sampled_from(["a", "bb", "ccc", "é"]), min_size=1, max_size=80)


@settings(max_examples=150)
@given(WORDS)
def test_ngram_measures_equal_a_plain_implementation(words):
    analysed = analyse(" ".join(words))
    for n, again in repeated_ngrams(analysed, list(range(2, 11))):
        assert top_ngram_characters(analysed, again, n) == naive_top(words, n)
        assert duplicate_ngram_characters(analysed, again, n) == naive_duplicate(words, n)


@settings(max_examples=100)
@given(st.lists(st.sampled_from(["a", "bb", "ccc ccc", "é"]), max_size=20))
def test_duplicate_lines_equal_a_plain_implementation(lines):
    seen, count, characters = set(), 0, 0
    for line in lines:
        if line in seen:
            count, characters = count + 1, characters + len(line)
        seen.add(line)
    assert duplicates(analyse("\n".join(lines)).lines) == (count, characters)


@settings(max_examples=150)
@given(WORDS, st.floats(0, 1))
def test_the_duplicate_ngram_rule_decides_as_the_exact_measure_does(words, limit):
    text = " ".join(words)
    verdict = repetition(text, max_duplicate_ngram={5: limit}, max_duplicate_lines=1)
    share = naive_duplicate(words, 5) / len(text)
    assert (verdict is not None) == (len(words) >= 5 and share > limit)


def test_a_switched_off_rule_set_keeps_everything():
    assert dataclasses.replace(GopherQuality(), enabled=False).judge(analyse("")) is None
    assert dataclasses.replace(GopherRepetition(), enabled=False).judge(analyse("x\nx\nx\nx")) is None


def test_impossible_settings_are_refused_by_name():
    with pytest.raises(ValueError, match="min_words"):
        GopherQuality(min_words=10, max_words=5).validate()
    with pytest.raises(ValueError, match="max_duplicate_lines"):
        GopherRepetition(max_duplicate_lines=1.5).validate()
    GopherQuality().validate()
    GopherRepetition().validate()
