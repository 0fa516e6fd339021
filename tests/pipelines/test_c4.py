import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.documents import to_table
from pipelines.filters import Batch, judge
from pipelines.filters.c4 import C4, POLICY_PHRASES
from pipelines.words import Texts
from pipelines.words.tokens import SENTENCE


def apply(rules, *texts):
    """Edited texts, the reason of each document or None, and counts."""
    applied = rules.apply(Batch(to_table([{"id": str(i), "text": text} for i, text in enumerate(texts)])))
    broken, _, _ = judge(applied.measures, len(texts))
    reasons = [None if i < 0 else applied.measures[i].reason.removeprefix("c4: ") for i in broken.tolist()]
    return applied.text.to_pylist(), reasons, dict(applied.counts)


def edited(text, **changes):
    return apply(C4(min_sentences=0, **changes), text)[0][0]


@pytest.mark.parametrize(
    ("line", "stays"),
    [
        ("A line of words.", True),
        ("A line of words?", True),
        ("A line of words!", True),
        ('"A line of words"', True),
        ("A line of 'words'", True),
        ("  A line of words.\t", True),
        ("A line of words", False),
        ("A line of words...", False),
        ("A line of words\u2026", False),
        ("A line of words:", False),
        ("Two words.", False),
        ("Two words .", True),  # white space parts words here
        ("We use JavaScript here.", False),
        ("Read our Privacy Policy here.", False),
        ("This site uses cookies.", False),
        ("A word of " + "x" * 999 + ".", True),
        ("A word of " + "x" * 1000 + ".", False),  # 1,001 with the full stop
    ],
)
def test_lines_that_stay_and_lines_that_go(line, stays):
    assert edited(f"First line stays here.\n{line}\nLast line stays too.") == "\n".join(
        ["First line stays here.", *[line.strip()] * stays, "Last line stays too."]
    )


def test_each_line_rule_can_be_switched_off():
    assert edited("No punctuation at all", terminal_punctuation=False) == "No punctuation at all"
    assert edited("One.\n\nTwo.", min_words=0, terminal_punctuation=False) == "One.\n\nTwo."
    assert edited("We use JavaScript here.", javascript=False) == "We use JavaScript here."
    assert edited("This site uses cookies.", policy_phrases=[]) == "This site uses cookies."
    assert edited("Unsere AGB gelten hier.", policy_phrases=["agb gelten"]) == ""
    assert edited("A word " + "x" * 2000 + ".", max_word_length=0) == "A word " + "x" * 2000 + "."
    assert edited("A word, cited [1].", citations=False) == "A word, cited [1]."


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Cited[1] and so[23][] on.", "Cited and so on."),
        ("Cited[citation needed] and so on[edit].", "Cited and so on."),
        ("Not [a] nor [1 nor [edi].", "Not [a] nor [1 nor [edi]."),
        ("[1] At the start now.", "At the start now."),
        ("At the end here.[2]", "At the end here."),
        ("At the end here. [2]", ""),  # what is left ends in a blank, no terminal punctuation
    ],
)
def test_citations_are_cut_out(text, left):
    assert edited(text) == left


def test_documents_go_for_what_stands_in_a_line_that_would_stay():
    rules = C4(min_sentences=0)
    _, reasons, _ = apply(
        rules,
        "This says lorem Ipsum here.",
        "This says lorem Ipsum here",  # the line goes before
        "A curly { bracket here.",
        "A curly { bracket here",
        "Javascript with a { bracket.",
    )
    assert reasons == ["lorem ipsum", None, "curly bracket", None, None]
    _, reasons, _ = apply(C4(min_sentences=0, lorem_ipsum=False, curly_bracket=False), "A lorem ipsum { bracket.")
    assert reasons == [None]


def test_sentences_are_those_of_the_lines_that_stay():
    four = "One is here. Two is here.\nA line without an end\nThree is here. Four is here."
    _, reasons, _ = apply(C4(), four, four + "\nFive is here.", four + "\nFive is[1] here. Six.[2]", "")
    assert reasons == ["too few sentences", None, None, "too few sentences"]
    measures = C4().apply(Batch(to_table([{"text": four}, {"text": four + "\nFive is[1] here. Six.[2]"}]))).measures
    assert measures[-1].values.tolist() == [4, 6]


def test_what_became_of_the_lines_is_counted():
    text = "This line stays here.\nno end\nTwo words.\nWe say javascript here.\nSome cookie policy[1] text."
    assert apply(C4(), text)[2] == {
        "c4: line that stays": 1,
        "c4: line without terminal punctuation": 1,
        "c4: line of too few words": 1,
        "c4: javascript line": 1,
        "c4: policy line": 1,
        "c4: citation cut out": 1,
    }


def plain(text, terminal):
    """The rules as the paper and C4's published code have them, line by line."""
    kept, sentences, lorem, curly = [], 0, 0, 0
    for whole in text.splitlines():
        words = whole.split()
        if any(len(word) > 12 for word in words):
            continue
        line = re.sub(r"\[[0-9]*]|\[edit]|\[citation needed]", "", whole.strip())
        if terminal and (not line.endswith((".", "?", "!", '"', "'")) or line.endswith("...")):
            continue
        if len(words) < 3:
            continue
        lower = line.lower()
        if "lorem ipsum" in lower:
            lorem += 1
        elif "javascript" in lower:
            continue
        elif "{" in line:
            curly += 1
        elif not any(phrase in lower for phrase in POLICY_PHRASES):
            found = Texts.of(to_table([{"text": line}])["text"])
            sentences += max(1, int(np.count_nonzero(found.words.flags & SENTENCE)))
            kept.append(line)
    return "\n".join(kept).strip(), lorem, curly, sentences


LINES = st.lists(
    st.sampled_from(
        [
            *[
                "a ",
                "b c d ",
                "One. ",
                "Two",
                ". ",
                ".",
                "! ",
                "?",
                "\n",
                "\n",
                "\r\n",
                "\u2028",
                " ",
                "\u00e9. ",
                "\u65e5 ",
                "...",
            ],
            *[
                "[1]",
                "[",
                "]",
                "[edit]",
                "{ ",
                "lorem ipsum ",
                "JavaScript ",
                "privacy policy ",
                "'",
                "x" * 12,
                "[citation needed]",
            ],
        ]
    ),
    max_size=30,
).map("".join)


@settings(max_examples=250, deadline=None)
@given(st.lists(LINES, max_size=4), st.booleans())
def test_the_kernel_equals_a_plain_reading(texts, terminal):
    rules = C4(terminal_punctuation=terminal, max_word_length=12)
    applied = rules.apply(Batch(to_table([{"text": text} for text in texts])))
    values = np.array([measure.values for measure in applied.measures]).reshape(3, len(texts))
    for d, text in enumerate(texts):
        left, lorem, curly, sentences = plain(text, terminal)
        assert applied.text[d].as_py() == left
        assert values[:, d].tolist() == [lorem, curly, sentences]
    applied.text.validate(full=True)


def test_impossible_settings_are_refused_by_name():
    with pytest.raises(ValueError, match="min_sentences"):
        C4(min_sentences=-1).validate()
    with pytest.raises(ValueError, match="policy_phrases"):
        C4(policy_phrases=[""]).validate()
    C4().validate()
