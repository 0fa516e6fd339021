import pytest

from pipelines.language import CHARACTERS, LanguageFilter, identify

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
}


@pytest.mark.parametrize("language", TEXTS)
def test_languages_are_told_apart_with_a_high_score(language):
    found, score = identify(TEXTS[language])
    assert found == language
    assert 0.9 < score <= 1.0


def test_only_the_start_of_a_document_counts():
    start = (TEXTS["en"] + " ") * (CHARACTERS // len(TEXTS["en"]) + 1)
    assert identify(start) == identify(start + TEXTS["ru"] * 50)


@pytest.mark.parametrize("text", ["", " \n", "12345 .,-"])
def test_a_text_without_letters_has_no_language(text):
    assert identify(text) == ("und", 0.0)


def test_the_filter_names_what_it_drops():
    rule = LanguageFilter(languages=["en", "de"], min_score=0.65)
    assert rule.judge("en", 0.65) is None
    assert rule.judge("de", 0.9) is None
    assert rule.judge("fr", 0.99).reason == "language: fr"
    assert rule.judge("en", 0.64) == ("language: unsure", 0.64, 0.65)
    assert LanguageFilter(languages=[]).judge("und", 0.0) is None


def test_unknown_languages_and_scores_are_refused_by_name():
    LanguageFilter().validate()
    with pytest.raises(ValueError, match="languages: xx not known"):
        LanguageFilter(languages=["en", "xx"]).validate()
    with pytest.raises(ValueError, match=r"min_score is 1\.5"):
        LanguageFilter(min_score=1.5).validate()
