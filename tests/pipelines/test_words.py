import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.words import LETTER, SOLID, analyse, extend_ngrams, ngram_hashes, repeats, word_hash

TEXT = st.text(st.sampled_from("ab é日\U0001f600\t\r\n\u2028 \x00-.#1_"), max_size=80) | st.text(max_size=60)


def cut(text, spans):
    return [text[start:end] for start, end in zip(spans.starts, spans.ends, strict=True)]


@given(TEXT)
def test_words_are_what_str_split_gives(text):
    words = analyse(text)
    assert cut(text, words) == text.split()
    assert [bool(f & LETTER) for f in words.flags] == [any(c.isalpha() for c in w) for w in text.split()]


@given(TEXT)
def test_lines_and_paragraphs_are_what_the_rules_cut(text):
    words = analyse(text)
    assert cut(text, words.lines) == [line for line in re.split("\n+", text) if line]
    assert cut(text, words.paragraphs) == [p for p in re.split("\n{2,}", text.strip()) if p]


@given(st.text(st.sampled_from("ab,.'-\u0301 é日"), max_size=60))
def test_letter_words_ignore_punctuation(text):
    words = analyse(text, letters=True)
    assert cut(text, words) == re.findall("[abé日\u0301]+", text)
    assert all(f & SOLID for f in words.flags)


@settings(max_examples=50)
@given(st.lists(st.text("abé日", min_size=1, max_size=4), min_size=1, max_size=12), st.integers(0, 50))
def test_equal_words_have_equal_hashes_wherever_they_stand(words, shift):
    text = " " * shift + " ".join(words)
    hashes = analyse(text).hashes
    assert hashes.tolist() == [word_hash(w) for w in words]
    assert len(set(hashes.tolist())) == len(set(words))


def test_hashes_agree_between_ascii_and_other_texts_and_beyond_the_cached_powers():
    ascii_only = analyse("one two three").hashes
    assert (analyse("one two three é").hashes[:3] == ascii_only).all()
    assert (analyse(" " * (1 << 20) + "one two three").hashes == ascii_only).all()


def test_no_two_of_two_hundred_thousand_words_share_a_hash():
    words = [
        f"{a}{b}{c}{d}" for a in "abcdefghijklmnopqrst" for b in "0123456789" for c in "abcdefghij" for d in range(100)
    ]
    assert len(np.unique(analyse(" ".join(words)).hashes)) == len(words)


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_ngram_hashes_are_equal_exactly_where_the_words_are(n):
    rng = np.random.default_rng(0)
    words = rng.choice(["x", "y", "z"], 300).tolist()
    hashes = analyse(" ".join(words)).hashes
    grams = ngram_hashes(hashes, n)
    seen = {}
    assert len(grams) == 300 - n + 1
    for i, gram in enumerate(grams.tolist()):
        assert seen.setdefault(tuple(words[i : i + n]), gram) == gram
    assert len(set(seen.values())) == len(seen)
    assert (extend_ngrams(grams, hashes, n) == ngram_hashes(hashes, n + 1)).all()
    assert len(ngram_hashes(hashes[: n - 1], n)) == 0


@given(st.lists(st.integers(0, 6), max_size=40))
def test_repeats_lists_what_occurs_more_than_once(values):
    spread = np.array(values, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    found = repeats(spread)
    expected = {v: [i for i, w in enumerate(values) if w == v] for v in values if values.count(v) > 1}
    groups = [found.positions[found.groups == g].tolist() for g in range(len(found.first))]
    assert sorted(groups) == sorted(expected.values())
    assert found.counts.tolist() == [len(g) for g in groups]
    assert found.positions[found.first].tolist() == [g[0] for g in groups]


def test_empty_and_blank_texts_have_no_words():
    for text in ("", " \n\n ", "\n"):
        words = analyse(text)
        assert len(words) == 0
        assert len(words.paragraphs.starts) == 0
