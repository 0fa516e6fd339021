"""Language identification with a model that ships in its wheel (py3langid, a fork of langid.py; Lui & Baldwin 2012)."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from pipelines.filters import Verdict

CHARACTERS = 2000
"""How much of a document is looked at; more hardly changes the answer and costs time in proportion."""


@dataclass
class LanguageFilter:
    """Keeps documents in the wanted languages."""

    languages: list[str] = field(default_factory=lambda: ["en"])
    """Codes of the languages to keep (ISO 639-1, such as en, de, zh); none keeps all."""
    min_score: float = 0.65
    """Smallest probability of that language."""

    def validate(self) -> None:
        """Raises ValueError for a language that the model does not know and for a score that is no probability."""
        unknown = sorted(set(self.languages) - set(known_languages())) if self.languages else []
        if unknown:
            raise ValueError(
                f"languages: {', '.join(unknown)} not known; the model knows {' '.join(sorted(known_languages()))}"
            )
        if not 0 <= self.min_score <= 1:
            raise ValueError(f"min_score is {self.min_score}, must be a probability between 0 and 1")

    def judge(self, language: str, score: float) -> Verdict | None:
        """Why a document of this language and score goes, or None."""
        if not self.languages:
            return None
        if language not in self.languages:
            return Verdict(f"language: {language}", score, self.min_score)
        if score < self.min_score:
            return Verdict("language: unsure", score, self.min_score)
        return None


def identify(text: str) -> tuple[str, float]:
    """The most likely language of a text and its probability, from its first CHARACTERS characters.

    Returns:
        An ISO 639-1 code and a probability; ``("und", 0.0)`` for a text without letters.
    """
    start = text[:CHARACTERS]
    if not any(c.isalpha() for c in start):
        return "und", 0.0
    language, score = _model().classify(start)
    return language, float(score)


def known_languages() -> list[str]:
    """Codes of the languages that the model tells apart."""
    return list(_model().labels)


@functools.lru_cache(maxsize=1)
def _model():
    # Imported late: unpacking the model takes half a second that --help need not pay.
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
