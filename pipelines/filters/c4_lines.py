"""C4's rules on lines in compiled code: which lines stay, what they become, and how many sentences they hold."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pipelines.words import Texts, characters
from pipelines.words.codes import decode, kernel
from pipelines.words.tokens import SENTENCE, tokens

OUTCOMES = (
    "line that stays",
    "line with too long a word",
    "line without terminal punctuation",
    "line of too few words",
    "lorem ipsum line",
    "javascript line",
    "curly bracket line",
    "policy line",
    "citation cut out",
)
"""What can become of a line; citations are counted beside it."""

_STAYS, _LONG, _OPEN, _SHORT, _LOREM, _JAVASCRIPT, _CURLY, _POLICY, _CITATION = range(len(OUTCOMES))
_SPACE = characters.SPACE
_EDIT = np.frombuffer(b"[edit]", np.uint8)
_NEEDED = np.frombuffer(b"[citation needed]", np.uint8)


class Edited(NamedTuple):
    """Documents without the lines that go.

    Attributes:
        data: UTF-8 of all documents, uint8.
        offsets: where each document lies in it, (documents + 1,), int64.
        sentences: of the lines that stay, (documents,), int64.
        lines: for each of OUTCOMES its lines in each document, (outcomes, documents), int64.
    """

    data: np.ndarray
    offsets: np.ndarray
    sentences: np.ndarray
    lines: np.ndarray


def edit(
    texts: Texts,
    *,
    policy_phrases: list[str],
    terminal_punctuation: bool,
    min_words: int,
    max_word_length: int,
    javascript: bool,
    lorem_ipsum: bool,
    curly_bracket: bool,
    citations: bool,
) -> Edited:
    """Remove lines; the settings are those of ``C4``."""
    phrases = [(phrase, _POLICY) for phrase in policy_phrases]
    phrases += [("javascript", _JAVASCRIPT)] * javascript + [("lorem ipsum", _LOREM)] * lorem_ipsum
    needles = [phrase.lower().encode() for phrase, _ in phrases]
    starts = np.zeros(256, np.bool_)
    starts[[needle[0] for needle in needles]] = True
    starts[65:91] |= starts[97:123]
    room = int((texts.end - texts.begin).sum())
    out, again = np.empty(room + 1, np.uint8), np.empty(room + 1, np.uint8)
    offsets = np.zeros(texts.documents + 1, np.int64)
    sentences = np.zeros(texts.documents, np.int64)
    lines = np.zeros((len(OUTCOMES), texts.documents), np.int64)
    changed = np.empty((room // 3 + 1, 2), np.int64)  # of lines with a citation: document, and end in ``again``
    words = texts.words
    n = _edit(
        texts.data,
        texts.begin,
        texts.end,
        characters.flags(),
        words.starts,
        words.flags,
        words.first,
        words.last,
        np.frombuffer(b"".join(needles), np.uint8),
        np.cumsum([0, *map(len, needles)]),
        np.array([kind for _, kind in phrases], np.int64),
        starts,
        terminal_punctuation,
        min_words,
        max_word_length or room,
        curly_bracket,
        citations,
        out,
        offsets,
        sentences,
        lines,
        again,
        changed,
    )
    if n:  # words change where a citation goes, so that these lines are cut anew
        ends = np.concatenate((np.zeros(1, np.int64), changed[:n, 1]))
        data = again[: ends[-1]]
        data.flags.writeable = ends.flags.writeable = False
        cut = tokens(data, ends)
        starts_before = np.concatenate((np.zeros(1, np.int64), np.cumsum((cut.flags & SENTENCE) != 0)))
        found = np.maximum(1, starts_before[cut.last] - starts_before[cut.first])
        np.add.at(sentences, changed[:n, 0], found)
    return Edited(out[: offsets[-1]], offsets, sentences, lines)


@kernel
def _citation(data, i, end):
    """Bytes of the citation that starts at byte i, 0 if there is none: [1], [], [edit], [citation needed]."""
    k = i + 1
    while k < end and 48 <= data[k] <= 57:
        k += 1
    if k < end and data[k] == 0x5D:
        return k + 1 - i
    if _is_at(data, i, end, _EDIT):
        return len(_EDIT)
    return len(_NEEDED) if _is_at(data, i, end, _NEEDED) else 0


@kernel
def _is_at(data, i, end, words):
    p = 0
    while p < len(words) and i + p < end and data[i + p] == words[p]:
        p += 1
    return p == len(words)


@kernel
def _ends_open(data, begin, end):
    """Does a line not end in terminal punctuation?"""
    if end == begin:
        return True
    last = data[end - 1]
    if last == 0x2E:
        return end - begin >= 3 and data[end - 2] == 0x2E and data[end - 3] == 0x2E
    return not (last == 0x3F or last == 0x21 or last == 0x22 or last == 0x27)


@kernel
def _search(data, begin, end, needles, needle_offsets, kinds, starts):
    """A bit for each kind of phrase that a line holds, and bit 0 for a curly bracket."""
    found = np.int64(0)
    for i in range(begin, end):
        b = data[i]
        if b == 0x7B:
            found |= 1
        if not starts[b]:
            continue
        for k in range(len(kinds)):
            first, size = needle_offsets[k], needle_offsets[k + 1] - needle_offsets[k]
            if i + size > end:
                continue
            same = True
            for p in range(size):
                c = data[i + p]
                if 65 <= c <= 90:
                    c |= 32
                if c != needles[first + p]:
                    same = False
                    break
            if same:
                found |= np.int64(1) << kinds[k]
    return found


@kernel
def _edit(  # noqa: C901 - one loop, for speed
    data,
    begins,
    ends,
    table,
    word_starts,
    word_flags,
    first_words,
    last_words,
    needles,
    needle_offsets,
    kinds,
    starts,
    terminal,
    min_words,
    max_length,
    curly,
    citations,
    out,
    offsets,
    sentences,
    lines,
    again,
    changed,
):
    o = np.int64(0)
    n_changed = np.int64(0)
    a = np.int64(0)
    for d in range(len(begins)):
        begin, end = begins[d], ends[d]
        document = o
        w, last_word = first_words[d], last_words[d]
        i = begin
        while i < end:
            # a line: where its stripped text lies, its words, the longest one, and whether it may hold citations
            left, right = np.int64(-1), np.int64(-1)
            words = longest = length = np.int64(0)
            bracket = False
            after = end
            while i < end:
                code, size = np.int64(data[i]), np.int64(1)
                if code >= 0x80:
                    code, size = decode(data, i, end)
                if table[code] & _SPACE:
                    length = np.int64(0)
                    if 10 <= code <= 13 or 0x1C <= code <= 0x1E or code == 0x85 or code == 0x2028 or code == 0x2029:
                        after = i + size
                        if code == 13 and after < end and data[after] == 10:
                            after += 1
                        break
                else:
                    if length == 0:
                        words += 1
                    length += 1
                    longest = max(longest, length)
                    bracket |= code == 0x5B
                    if left < 0:
                        left = i
                    right = i + size
                i += size
            i = after
            if left < 0:
                left = right = i
            if longest > max_length:
                lines[_LONG, d] += 1
                continue
            start = o
            if document < o:
                out[o] = 10
                start += 1
            cut = False
            if bracket and citations:
                e = start
                p = left
                while p < right:
                    size = _citation(data, p, right) if data[p] == 0x5B else 0
                    if size:
                        cut = True
                        lines[_CITATION, d] += 1
                        p += size
                    else:
                        out[e] = data[p]
                        e += 1
                        p += 1
            else:
                e = start + right - left
                for k in range(right - left):
                    out[start + k] = data[left + k]
            if terminal and _ends_open(out, start, e):
                lines[_OPEN, d] += 1
                continue
            if words < min_words:
                lines[_SHORT, d] += 1
                continue
            found = _search(out, start, e, needles, needle_offsets, kinds, starts)
            if found:
                if found & (1 << _LOREM):
                    lines[_LOREM, d] += 1
                    continue
                if found & (1 << _JAVASCRIPT):
                    lines[_JAVASCRIPT, d] += 1
                    continue
                if found & 1 and curly:
                    lines[_CURLY, d] += 1
                    continue
                if found & (1 << _POLICY):
                    lines[_POLICY, d] += 1
                    continue
            lines[_STAYS, d] += 1
            if cut:
                for k in range(start, e):
                    again[a] = out[k]
                    a += 1
                changed[n_changed, 0], changed[n_changed, 1] = d, a
                n_changed += 1
            else:
                sentences[d] += 1
                while w < last_word and word_starts[w] < left - begin:
                    w += 1
                w += 1 if words else 0  # the first word starts the first sentence
                while w < last_word and word_starts[w] < right - begin:
                    if word_flags[w] & SENTENCE:
                        sentences[d] += 1
                    w += 1
            o = e
        # strip the whole
        while o > document:
            p = o - 1
            while p > document and o - p < 4 and out[p] & 0xC0 == 0x80:
                p -= 1
            code, size = decode(out, p, o)
            if table[code] & _SPACE == 0:
                break
            o = p
        p = document
        while p < o:
            code, size = decode(out, p, o)
            if table[code] & _SPACE == 0:
                break
            p += size
        if p > document:
            for k in range(o - p):
                out[document + k] = out[p + k]
            o -= p - document
        offsets[d + 1] = o
    return n_changed
