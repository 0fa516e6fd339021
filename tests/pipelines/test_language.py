import functools
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.documents import to_table
from pipelines.filters import Batch
from pipelines.language import CHARACTERS, LanguageFilter, identify_batch, known_languages

# the first article of the Universal Declaration of Human Rights
TEXTS = {
    "en": "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience "
    "and should act towards one another in a spirit of brotherhood.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt "
    "und sollen einander im Geist der Brüderlichkeit begegnen.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de "
    "conscience et doivent agir les uns envers les autres dans un esprit de fraternité.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью и "  # noqa: RUF001
    "должны поступать в отношении друг друга в духе братства.",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "vi": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi.",
}


@functools.cache
def reference():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def column(texts):
    return pa.array(texts, pa.large_string())


def assert_same_as_py3langid(texts, characters=CHARACTERS):
    codes, scores = identify_batch(column(texts), characters)
    for text, code, score in zip(texts, codes.to_pylist(), scores.to_pylist(), strict=True):
        start = text[:characters]
        if not any(c.isalpha() for c in start):
            assert (code, score) == ("und", 0.0)
            continue
        expected = dict(reference().rank(start))
        assert score == pytest.approx(max(expected.values()), abs=1e-3)
        # its sums are in another order, so that languages it holds for equally likely may change places
        assert expected[code] == pytest.approx(max(expected.values()), abs=1e-3)


def test_languages_are_told_apart_with_a_high_score():
    codes, scores = identify_batch(column(list(TEXTS.values())))
    assert codes.to_pylist() == list(TEXTS)
    assert all(0.9 < score <= 1.0 for score in scores.to_pylist())


def test_answers_are_those_of_py3langid():
    texts = list(TEXTS.values())
    texts += [text.upper() for text in texts]  # all in capitals is read as small letters
    texts += [unicodedata.normalize("NFD", text) for text in texts]  # decomposed is composed before it is read
    texts += [f"{a} {b}" for a in texts for b in texts[:3]]
    texts += ["a", "", "ß", "\u017f", "😀", "A\u0300", "\u2000a", "한\n\x00"]
    assert_same_as_py3langid(texts)
    assert_same_as_py3langid(texts, characters=7)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=5), st.integers(1, 30))
def test_answers_to_any_characters_are_those_of_py3langid(texts, characters):
    assert_same_as_py3langid(texts, characters)


def test_a_text_has_the_same_answer_alone_in_a_batch_and_in_a_slice():
    texts = [text * k for k in (1, 7, 40) for text in TEXTS.values()] * 60  # more than are scored at one time
    together = identify_batch(column(texts))
    for i in (0, 5, 23):
        alone = identify_batch(column([texts[i]]))
        assert [c[i].as_py() for c in together] == [c[0].as_py() for c in alone]
    assert [c.slice(11, 30).to_pylist() for c in together] == [
        c.to_pylist() for c in identify_batch(column(texts).slice(11, 30))
    ]
    assert [len(c) for c in identify_batch(pa.chunked_array([], pa.large_string()))] == [0, 0]


def test_only_the_start_of_a_document_counts():
    start = (TEXTS["en"] + " ") * (CHARACTERS // len(TEXTS["en"]) + 1)
    (a, b), (x, y) = (c.to_pylist() for c in identify_batch(column([start, start + TEXTS["ru"] * 50])))
    assert (a, x) == (b, y)


def test_the_filter_names_what_it_drops_and_fills_the_columns():
    texts = [TEXTS["en"], TEXTS["de"], TEXTS["fr"], "12345 .,-", "ok"]
    rule = LanguageFilter(languages=["en", "de"])
    applied = rule.apply(Batch(to_table([{"id": str(i), "text": text} for i, text in enumerate(texts)])))
    wanted, score = applied.measures
    assert (wanted.reason, wanted.maximum, wanted.values.tolist()[:4]) == ("language: not wanted", 0.0, [0, 0, 1, 1])
    assert wanted.details[:4] == [None, None, "fr", "und"]
    assert (score.reason, score.minimum) == ("language: score", 0.65)
    assert np.array_equal(score.values, applied.columns["language_score"].to_numpy().astype(float))
    assert applied.columns["language"].to_pylist()[:4] == ["en", "de", "fr", "und"]


def test_no_wanted_languages_keep_all():
    applied = LanguageFilter(languages=[]).apply(Batch(to_table([{"text": "123"}, {"text": TEXTS["ja"]}])))
    assert [(m.minimum, m.maximum) for m in applied.measures] == [(-np.inf, np.inf)]
    assert applied.columns["language"].to_pylist() == ["und", "ja"]


def test_unknown_languages_and_scores_are_refused_by_name():
    LanguageFilter().validate()
    assert {"en", "de", "zh"} <= set(known_languages())
    with pytest.raises(ValueError, match="languages: xx not known"):
        LanguageFilter(languages=["en", "xx"]).validate()
    with pytest.raises(ValueError, match=r"min_score is 1\.5"):
        LanguageFilter(min_score=1.5).validate()
    with pytest.raises(ValueError, match="characters is 0"):
        LanguageFilter(characters=0).validate()
