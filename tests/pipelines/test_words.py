import itertools
import re
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.words import Texts, characters
from pipelines.words.english import UNITS, exceptions
from pipelines.words.lines import BLANK, TERMINATED
from pipelines.words.tokens import COUNTED, LETTERS, PUNCTUATION, SENTENCE, word_hash


def cut(texts, spans):
    """Each document's spans as strings."""
    found = []
    for d in range(texts.documents):
        data = texts.data[texts.begin[d] : texts.end[d]].tobytes()
        at = slice(spans.first[d], spans.last[d])
        found.append([data[a:b].decode() for a, b in zip(spans.starts[at], spans.ends[at], strict=True)])
    return found


def words_of(text):
    texts = Texts.of(pa.array([text]))
    return cut(texts, texts.words)[0]


def sentences_of(text):
    texts = Texts.of(pa.array([text], pa.string()))
    starts = texts.words.starts[(texts.words.flags & SENTENCE) != 0].tolist()
    data = text.encode()
    return [data[a:b].decode().strip() for a, b in zip(starts, [*starts[1:], len(data)], strict=bool(starts))]


# spacy.blank("en") of version 3.8 says the same of all but the line of Japanese, which it takes for one word.
HAND_WORKED = {
    "Hello, world!": "Hello | , | world | !",
    "He said: \u201cDon\u2019t!\u201d": "He | said | : | \u201c | Do | n\u2019t | ! | \u201d",
    "I can't, you'll've, it's": "I | ca | n't | , | you | 'll | 've | , | it | 's",
    "Mr. Smith lives in the U.S.A. now.": "Mr. | Smith | lives | in | the | U.S.A. | now | .",
    "end.Next and end.next": "end | . | Next | and | end.next",
    "a well-known state--of---the art": "a | well | - | known | state | -- | of | --- | the | art",
    "see https://example.com/a-b?c=d, or me@example.org.": (
        "see | https://example.com/a-b?c=d | , | or | me@example.org | ."
    ),
    "5km for $3.50 (10%) at 9am": "5 | km | for | $ | 3.50 | ( | 10 | % | ) | at | 9 | am",
    "3+4 and 1,000 and x=y and and/or": "3 | + | 4 | and | 1,000 | and | x | = | y | and | and/or",
    "wait... what\u2026 no..yes": "wait | ... | what | \u2026 | no | .. | yes",
    "nice:) f(x): (:-)": "nice | :) | f(x | ): | ( | :-)",
    "(e.g. this) etc.)": "( | e.g. | this | ) | etc | . | )",
    "C++ +1 1+ 20\u00b0C.": "C++ | +1 | 1 | + | 20 | \u00b0 | C | .",
    "\U0001f600\U0001f600ok": "\U0001f600 | \U0001f600 | ok",
    "\u65e5\u672c\u8a9e\u3001abc": "\u65e5 | \u672c | \u8a9e | \u3001 | abc",
    "[1] {a} <b> #tag @you _x_": "[ | 1 | ] | { | a | } | < | b | > | # | tag | @you | _ | x | _",
    "8.8.8.8/x and 10.0.0.1/x": "8.8.8.8/x | and | 10.0.0.1 | / | x",
}


@pytest.mark.parametrize("text", HAND_WORKED)
def test_words_worked_by_hand(text):
    assert words_of(text) == HAND_WORKED[text].split(" | ")


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ('He said "No." Then left.', ['He said "No."', "Then left."]),
        ("Mr. Smith is here. Really.", ["Mr. Smith is here.", "Really."]),
        ("Wait... what?!) Yes", ["Wait... what?!)", "Yes"]),
        ("No stop\nnext line", ["No stop\nnext line"]),
        ("End.\n... more", ["End.", "... more"]),  # a newline is no punctuation, a blank is no word
        ("End. ... more", ["End. ...", "more"]),
        ("", []),
    ],
)
def test_sentences_worked_by_hand(text, sentences):
    assert sentences_of(text) == sentences


# A plain reading of the rules, with regular expressions


def _class(flag, also=""):
    codes = np.flatnonzero(characters.flags() & flag)
    return "".join(re.escape(chr(c)) for c in codes if c < 0xD800 or c > 0xDFFF) + also


LOWER, UPPER, QUOTE = _class(characters.LOWER), _class(characters.UPPER), _class(characters.QUOTE)
ALPHA, LABEL = LOWER + UPPER, r"A-Za-z0-9\u00a1-\uffff"
PREFIX = re.compile(rf"[{_class(characters.PREFIX)}]|\+(?![0-9])|\.\.+|US\$|[CA]\$")
MONEY = _class(characters.CURRENCY)
SUFFIX = re.compile(
    rf"(?:\u2026\u2026|[{_class(characters.SUFFIX)}]|\.\.+|['\u2019][sS]|(?<=[0-9])\+|(?<=\u00b0[FfCcKk])\."
    rf"|(?<=[0-9])(?:US\$|[CA]\$|[{MONEY}]|{'|'.join(map(re.escape, UNITS))})"
    rf"|(?<=[{_class(characters.DOTTED)}])\.|(?<=[{UPPER}][{UPPER}])\.)\Z"
)
INFIX = re.compile(
    rf"\.\.+|\u2026|[{_class(characters.ICON)}]|(?<=[0-9])[+\-*^](?=[0-9-])|(?<=[{LOWER}{QUOTE}])\.(?=[{UPPER}{QUOTE}])"
    rf"|(?<=[{ALPHA}]),(?=[{ALPHA}])|(?<=[{ALPHA}0-9])(?:---|--|-|\u2014\u2014|\u2014|\u2013|~)(?=[{ALPHA}])"
    rf"|(?<=[{ALPHA}0-9])[:<>=/](?=[{ALPHA}])"
)
URL = re.compile(
    r"(?:[\w+\-.]{2,}://)?(?:\S+@)?(?:(?!(?:10|127)\.|169\.254\.|192\.168\.|172\.(?:1[6-9]|2\d|3[01])\.)"
    r"(?:[1-9]\d?|1\d\d|2[01]\d|22[0-3])(?:\.(?:1?\d{1,2}|2[0-4]\d|25[0-5])){2}\.(?:[1-9]\d?|1\d\d|2[0-4]\d|25[0-4])"
    rf"|(?:(?:[{LABEL}][{LABEL}_-]{{0,62}})?[{LABEL}]\.)+[{LOWER}]{{2,63}})(?::\d{{2,5}})?(?:[/?#]\S*)?\Z",
    re.ASCII,
)
SPECIAL = exceptions()


def plain_pieces(word, special):
    front, back = [], []
    while word and word not in special:
        before = word
        prefix = found.group() if (found := PREFIX.match(word)) else ""
        if prefix and word[len(prefix) :] in special:
            front.append(prefix)
            word = word[len(prefix) :]
            break
        # the prefix is no context for the suffix
        suffix = found.group() if (found := SUFFIX.search(word[len(prefix) :])) else ""
        if suffix and word[: -len(suffix)] in special:
            back.append(suffix)
            word = word[: -len(suffix)]
            break
        front += [prefix] * bool(prefix)
        back += [suffix] * bool(suffix)
        word = word[len(prefix) : len(word) - len(suffix)]
        if word == before:
            break
    if word in special:
        middle = [*special[word]]
    elif not word or URL.match(word):
        middle = [word] * bool(word)
    else:
        middle, at = [], 0
        for infix in INFIX.finditer(word):
            if infix.start():
                middle += [word[at : infix.start()]] * (infix.start() > at)
                middle.append(infix.group())
                at = infix.end()
        middle += [word[at:]] * (at < len(word))
    return front + middle + back[::-1]


JOINED = {word: len(parts) for word in SPECIAL if len(parts := plain_pieces(word, {})) > 1}


def plain_join(pieces):
    def longest(i):
        return max((k for k in range(2, 8) if JOINED.get("".join(pieces[i : i + k])) == k), default=1)

    out, i = [], 0
    while i < len(pieces):
        size = longest(i)
        if any(longest(j) > size for j in range(i + 1, i + size)):
            size = 1
        out += SPECIAL["".join(pieces[i : i + size])] if size > 1 else [pieces[i]]
        i += size
    return out


def plain_words(text):
    flags = characters.flags()
    found = []
    for stretch in text.split():
        start = 0
        for i in range(1, len(stretch) + 1):
            mark = i < len(stretch) and flags[ord(stretch[i])] & characters.MARK
            single = flags[ord(stretch[start])] & characters.SINGLE
            if i == len(stretch) or (single and not mark) or flags[ord(stretch[i])] & characters.SINGLE:
                part = stretch[start:i]
                found += [part] if single else plain_join(plain_pieces(part, SPECIAL))
                start = i
    return found


FRAGMENTS = (
    "a b word Word WORD can't dont cannot Im gonna Mr. e.g. a.m. U.S. 9am 5km 5% 10US$ US$5 C$ $ . .. ... , : ; ! ? ' "
    "\" \u2019s 's n't \u2026 \u201c \u201d ( ) [ ] { } - -- --- \u2014 \u2013 ~ / = < > + * ^ # @ _ & | \\ :) :-) 8) "
    "): =( xD <3 \u00b0C. \u00e9 \u00e9. \u0301 \u65e5 \u3001 \u0e01\u0e48 \u0663 \u00b2 km\u00b2 www.x.com http:// "
    "a@b.co 1.2.3.4 :80 /p?q end.Next \U0001f600 \u20ac \u00ad"
)
PIECES = st.one_of(
    st.sampled_from([*FRAGMENTS.split(), " ", "\n", "\u2003", "\x1c"]), st.characters(exclude_categories=["Cs"])
)
TEXT = st.lists(PIECES, max_size=14).map("".join)


@settings(max_examples=250, deadline=None)
@given(st.lists(TEXT, max_size=4))
def test_words_are_those_of_a_plain_reading_of_the_rules(documents):
    texts = Texts.of(pa.array(documents, pa.large_string()))
    assert cut(texts, texts.words) == [plain_words(text) for text in documents]


@settings(max_examples=200, deadline=None)
@given(TEXT)
def test_what_is_told_of_each_word_is_true(text):
    texts = Texts.of(pa.array([text], pa.string()))
    words = cut(texts, texts.words)[0]
    flags = characters.flags()
    seen, end = True, 0
    for i, word in enumerate(words):
        flag = texts.words.flags[i]
        assert texts.words.hashes[i] == word_hash(word)
        assert texts.words.lengths[i] == len(word)
        assert bool(flag & LETTERS) == any(c.isalpha() for c in word)
        assert bool(flag & COUNTED) == any(flags[ord(c)] & characters.WORDY for c in word)
        punctuation = all(unicodedata.category(c)[0] == "P" for c in word)
        assert bool(flag & PUNCTUATION) == punctuation
        start = len(text.encode()[: texts.words.starts[i]].decode())
        starts = i == 0 or (seen and text[end:start] not in ("", " "))
        seen = seen and not starts
        stop = len(word) == 1 and bool(flags[ord(word)] & characters.STOP)
        if seen and not punctuation and not stop:
            starts, seen = True, False
        seen = seen or stop
        assert bool(flag & SENTENCE) == starts
        end = start + len(word)


# Lines and paragraphs

LINES = st.lists(
    st.sampled_from(
        [
            "a",
            "b c",
            " ",
            "\n",
            "\n",
            "\n\n",
            "\r",
            "\r\n",
            "...",
            "\u2026",
            ".",
            "-",
            "\u2022",
            "#",
            "\u3002",
            "\u00e9",
            "\u2028",
            "\x85",
        ]
    ),
    max_size=24,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(LINES, max_size=4))
def test_lines_and_paragraphs_are_what_python_cuts(documents):
    texts = Texts.of(pa.array(documents, pa.large_string()))
    assert cut(texts, texts.lines) == [[line for line in text.split("\n") if line] for text in documents]
    assert cut(texts, texts.paragraphs) == [[p for p in re.split("\n{2,}", t.strip()) if p] for t in documents]
    lines = [line for text in documents for line in text.split("\n") if line]
    assert texts.lines.lengths.tolist() == [len(line) for line in lines]
    assert [bool(f & BLANK) for f in texts.lines.flags] == [not line.strip() for line in lines]
    closing = tuple(chr(c) for c in np.flatnonzero(characters.flags() & characters.TERMINAL))
    assert [bool(f & TERMINATED) for f in texts.lines.flags] == [line.endswith(closing) for line in lines]
    for spans in (texts.lines, texts.paragraphs):
        seen = {}
        for content, value in zip((s for document in cut(texts, spans) for s in document), spans.hashes, strict=True):
            assert seen.setdefault(content, value) == value
        assert len(set(seen.values())) == len(seen)
    assert [tuple(int(c[d]) for c in texts.counts) for d in range(len(documents))] == [
        (
            len(text),
            text.count("\n"),
            text.count("#"),
            text.count("...") + text.count("\u2026"),
            len(text.splitlines()),
            sum(line.lstrip().startswith(("\u2022", "-")) for line in text.splitlines()),
            sum(line.rstrip().endswith(("...", "\u2026")) for line in text.splitlines()),
            text.startswith("\n") + text.endswith("\n"),
        )
        for text in documents
    ]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TEXT, st.booleans(), TEXT), max_size=5))
def test_a_part_and_an_update_equal_a_fresh_analysis(rows):
    before = Texts.of(pa.array([row[0] for row in rows], pa.string()))
    changed = np.array([row[1] for row in rows], bool)
    after = before.updated(changed, pa.array([row[2] for row in rows if row[1]], pa.string()))
    fresh = Texts.of(pa.array([row[2] if row[1] else row[0] for row in rows], pa.string()))
    for some, mask in ((after, np.ones(len(rows), bool)), (after.filter(changed), changed)):
        other = fresh.filter(mask)
        assert cut(some, some.words) == cut(other, other.words)
        assert cut(some, some.lines) == cut(other, other.lines)
        assert cut(some, some.paragraphs) == cut(other, other.paragraphs)
        assert np.array(some.counts).tolist() == np.array(other.counts).tolist()


def test_nulls_slices_and_chunks_are_read_where_they_lie():
    column = pa.array(["skipped", "One two.", None, "", "three"])
    texts = Texts.of(pa.chunked_array([column.slice(1, 2), column.slice(3)]))
    assert cut(texts, texts.words) == [["One", "two", "."], [], [], ["three"]]
    assert Texts.of(pa.chunked_array([], pa.string())).documents == 0


def test_bytes_that_are_no_utf8_do_no_harm():
    for data in (b"ab\xff\xfecd. \xe2\x82", b"\xf7\xbf\xbf\xbf x", b"\x80\x80\n\xc3", b"(\xe2\x80"):
        column = pa.Array.from_buffers(
            pa.large_string(), 1, [None, pa.py_buffer(np.array([0, len(data)], np.int64)), pa.py_buffer(data)]
        )
        texts = Texts.of(column)
        assert (texts.words.ends <= len(data)).all()
        assert (texts.words.starts[1:] >= texts.words.ends[:-1]).all()


@pytest.mark.parametrize(
    "part", ["word ", "(", "):", "a.", "a@", "a-", "..", "x", "://a", "\u65e5", "1.", "\n\n", ". "]
)
def test_a_giant_document_of_one_line_takes_a_moment(part):
    text = part * (1_500_000 // len(part))
    texts = Texts.of(pa.array([text]))
    assert texts.counts.characters.tolist() == [len(text)]
    assert texts.words.lengths.sum() == len("".join(text.split()))


def test_no_two_of_two_hundred_thousand_words_share_a_hash():
    words = [f"{a}{b}{c}{d}" for a, b, c, d in itertools.product("ABCDEFGHIJKLMNOPQRSTUV", repeat=4)]
    texts = Texts.of(pa.array([" ".join(words)]))
    assert len(np.unique(texts.words.hashes)) == len(words) == 22**4
