import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from pipelines import pretokens
from pipelines.pretokens import LETTER, NUMBER, SPACE, char_classes, count, pre_tokenizer, utf8, word_buckets
from pipelines.tokenizer import byte_chars
from pipelines.word_counts import add_up

BYTE_OF = {char: byte for byte, char in enumerate(byte_chars())}
PIECES = [
    "'s",
    "'S",
    "'\u017f",
    "'ll",
    "'LL",
    "'Re",
    "'",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\u3000",
    "\x85",
    "\xa0",
    "\u200b",
]
PIECES += [
    "1",
    "12",
    "1234",
    "٣",
    "Ⅷ",
    "½",
    "a",
    "Word",
    "é",
    "e\u0301",
    "漢字",
    "😀",
    "<|pad|>",
    "\x00",
    "\x1c",
    "\ufffd",
]
PIECES += ["\u1c89", "\U000323b0", "\ud7ff", "\ue000", "\U0010ffff", "...", "!?", "_x", "\u017f", "ǅ", "\u0300", "=="]


def counted(texts, kind, digits):
    table = add_up(count([pa.array(texts, pa.large_string())], kind, digits))
    return dict(zip(table["word"].to_pylist(), table["count"].to_pylist(), strict=True))


def by_the_library(texts, kind, digits):
    words: dict[bytes, int] = {}
    for text in texts:
        for word, _ in pre_tokenizer(kind, digits).pre_tokenize_str(text):
            spelled = bytes(BYTE_OF[char] for char in word)
            words[spelled] = words.get(spelled, 0) + 1
    return words


@pytest.mark.parametrize(("kind", "digits"), [("gpt2", 3), ("gpt4", 3), ("gpt4", 2), ("gpt4", 1)])
def test_words_are_those_of_the_regular_expression(kind, digits):
    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text(), max_size=3))
    @example(["a  b", " ", "\n\n x", "'s's 'sa", "a\r\n\r\n  b \n", "", "x" * 1000])
    def check(texts):
        assert counted(texts, kind, digits) == by_the_library(texts, kind, digits)

    check()


def test_character_classes_are_those_of_the_library():
    points = np.concatenate([np.arange(0xD800), np.arange(0xE000, 0x32400), np.arange(0xE0000, 0xE0200)])
    text = points.astype("<u4").tobytes().decode("utf-32-le")
    for name, value in (r"\p{L}", LETTER), (r"\p{N}", NUMBER), (r"\s", SPACE):
        runs = pre_tokenizers.Split(Regex(f"(?:{name})+"), "removed", invert=True).pre_tokenize_str(text)
        theirs = np.zeros(len(points), bool)
        for _, (start, stop) in runs:
            theirs[start:stop] = True
        np.testing.assert_array_equal(char_classes()[points] == value, theirs)


@given(st.lists(st.binary(max_size=40), max_size=5))
def test_bytes_that_are_no_utf8_are_words_too(data):
    table = add_up(count([pa.array(data, pa.large_binary())], "gpt4", 3))
    spelled = sum(len(w) * n for w, n in zip(table["word"].to_pylist(), table["count"].to_pylist(), strict=True))
    assert spelled == sum(map(len, data))


def test_full_tables_are_given_out_and_begun_again(monkeypatch):
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(0, 300, 200))) for _ in range(30)] + ["y" * 70_000]
    whole = counted(texts, "gpt2", 3)
    monkeypatch.setattr(pretokens, "_ENTRIES", 64)
    monkeypatch.setattr(pretokens, "_ARENA", 1 << 17)
    tables = list(count([pa.array(texts, pa.large_string())], "gpt2", 3))
    assert len(tables) > 5
    together = add_up(iter(tables))
    assert dict(zip(together["word"].to_pylist(), together["count"].to_pylist(), strict=True)) == whole
    assert b"y" * 70_000 not in whole  # longer than LONGEST_COUNTED


def test_slices_chunks_and_nulls_are_read_as_they_are():
    column = pa.chunked_array([pa.array(["drop", "a b"])[1:], pa.array(["c", None])])
    data, offsets = utf8(column)
    assert [bytes(data[a:b]) for a, b in itertools.pairwise(offsets)] == [b"a b", b"c", b""]


def test_a_word_has_its_bucket_wherever_it_lies():
    words = [b"ore", b"slag", b"a longer word than eight bytes", b"", b"x"] * 3
    buckets = word_buckets(pa.array(words, pa.large_binary()), 7)
    assert buckets.min() >= 0
    assert buckets.max() < 7
    assert len({(w, b) for w, b in zip(words, buckets.tolist(), strict=True)}) == 5
