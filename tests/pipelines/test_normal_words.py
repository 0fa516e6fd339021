import re
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.words import characters
from pipelines.words.normal import ngram_hashes, normal_words, shingles

TEXTS = st.lists(
    st.one_of(
        st.none(),
        st.text(st.sampled_from("abAB é\u0301ÉßİΣς日本กำ\U0001f600\t\n .,'-_#19٣"), max_size=60),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    ),
    max_size=6,
)


def plain_words(text):
    """Runs of letters, marks and numbers; in scripts without spaces each character with its marks."""
    words, start, single = [], -1, False
    for i, c in enumerate(text + " "):
        solid, mark = unicodedata.category(c)[0] in "LMN", unicodedata.category(c)[0] == "M"
        alone = bool(characters.flags()[ord(c)] & characters.SINGLE)
        if start >= 0 and (not solid or (not mark and (single or alone))):
            words.append((start, i))
            start = -1
        if solid and start < 0:
            start, single = i, alone
    return words


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_words_lie_where_a_plain_reading_finds_them(texts):
    words = normal_words(pa.array(texts, pa.large_string()))
    assert len(words.offsets) == len(texts) + 1
    for d, text in enumerate(texts):
        data = (text or "").encode()
        at = slice(words.offsets[d], words.offsets[d + 1])
        found = [data[a:b].decode() for a, b in zip(words.starts[at], words.ends[at], strict=True)]
        assert found == [(text or "")[a:b] for a, b in plain_words(text or "")]


def test_words_are_compared_without_case_wherever_they_stand():
    words = normal_words(pa.array(["Straße, ÉTÉ one", "  straße «été»... ONE"]))
    assert words.hashes[:3].tolist() == words.hashes[3:].tolist()
    assert len(set(words.hashes.tolist())) == 3


def test_each_character_of_a_script_without_spaces_is_a_word_with_its_marks():
    text = "日本語 abc ภาษา ก\u0e33ก\u0e48"
    words = normal_words(pa.array([text]))
    data = text.encode()
    found = [data[a:b].decode() for a, b in zip(words.starts, words.ends, strict=True)]
    assert found == ["日", "本", "語", "abc", "ภ", "า", "ษ", "า", "ก", "\u0e33", "ก\u0e48"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["x", "y", "zz"]), max_size=12), max_size=5), st.integers(1, 5))
def test_ngrams_are_equal_exactly_where_their_words_are(documents, n):
    hashes, offsets = ngram_hashes(normal_words(pa.array([" ".join(d) for d in documents], pa.string())), n)
    seen = {}
    for d, document in enumerate(documents):
        grams = [tuple(document[i : i + n]) for i in range(len(document) - n + 1)] or [tuple(document)] * bool(document)
        found = hashes[offsets[d] : offsets[d + 1]].tolist()
        assert len(found) == len(grams)
        for gram, value in zip(grams, found, strict=True):
            assert seen.setdefault(gram, value) == value
    assert len(set(seen.values())) == len(seen)


def test_a_short_text_is_one_shingle_and_an_empty_one_none():
    hashes, offsets = shingles(pa.array(["one two three", "", "...", None, "one two three four five six"]), 5)
    assert hashes.dtype == np.uint32
    assert np.diff(offsets).tolist() == [1, 0, 0, 0, 2]


def test_slices_and_chunks_of_a_column_are_read_where_they_lie():
    column = pa.array(["skip this", "one two", None, "three"])
    whole = normal_words(column)
    chunked = normal_words(pa.chunked_array([column.slice(1, 2), column.slice(3, 1)]))
    assert chunked.hashes.tolist() == whole.hashes[2:].tolist()
    assert len(normal_words(pa.chunked_array([], pa.string())).offsets) == 1
    assert normal_words(column.slice(3)).hashes.tolist() == whole.hashes[4:].tolist()


def test_bytes_that_are_no_utf8_are_read_as_far_as_they_go():
    for data in (b"ab\xff\xfecd", b"ab\xe2\x82", b"\xf7\xbf\xbf\xbf x", b"\x80\x80"):
        column = pa.Array.from_buffers(
            pa.large_string(), 1, [None, pa.py_buffer(np.array([0, len(data)], np.int64)), pa.py_buffer(data)]
        )
        words = normal_words(column)
        found = [data[a:b] for a, b in zip(words.starts, words.ends, strict=True)]
        assert found == re.findall(rb"[a-z]+", data)


def test_no_ngram_is_empty():
    with pytest.raises(ValueError, match="n is 0"):
        shingles(pa.array(["x"]), 0)
