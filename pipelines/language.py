"""Language identification with the model that ships in py3langid's wheel (Lui & Baldwin 2012), a batch at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipelines.filters import Applied, Batch, Measure

CHARACTERS = 2000
"""How much of a document is looked at by default."""


@dataclass
class LanguageFilter:
    """Keeps documents in the wanted languages."""

    enabled: bool = True
    """Whether the language is asked at all; it fills the columns language and language_score."""
    languages: list[str] = field(default_factory=lambda: ["en"])
    """Codes of the languages to keep (ISO 639, such as en, de, zh); none keeps all."""
    min_score: float = 0.65
    """Smallest probability of that language."""
    characters: int = CHARACTERS
    """How much of a document is looked at, from its start; more costs time in proportion."""

    def validate(self) -> None:
        """Raises ValueError for a language that the model does not know, no characters, and no probability."""
        unknown = sorted(set(self.languages) - set(known_languages())) if self.languages else []
        if unknown:
            raise ValueError(
                f"languages: {', '.join(unknown)} not known; the model knows {' '.join(sorted(known_languages()))}"
            )
        if not 0 <= self.min_score <= 1:
            raise ValueError(f"min_score is {self.min_score}, must be a probability between 0 and 1")
        if self.characters < 1:
            raise ValueError(f"characters is {self.characters}, must be at least 1")

    def apply(self, batch: Batch) -> Applied:
        """Measures whether the language is wanted and how sure that is; fills the two columns for it."""
        codes, scores = identify_batch(batch.table["text"], self.characters)
        columns = {"language": codes, "language_score": scores}
        values = scores.to_numpy().astype(np.float64)
        if not self.languages:
            return Applied([Measure("language: score", values)], columns=columns)
        names = codes.to_pylist()
        unwanted = np.array([name not in self.languages for name in names], np.float64)
        details = [name if other else None for name, other in zip(names, unwanted, strict=True)]
        measures = [
            Measure("language: not wanted", unwanted, maximum=0.0, details=details),
            Measure("language: score", values, minimum=self.min_score),
        ]
        return Applied(measures, columns=columns)


def identify_batch(column: pa.Array | pa.ChunkedArray, characters: int = CHARACTERS) -> tuple[pa.Array, pa.Array]:
    """The most likely language of each text and its probability, from its first so many characters.

    Args:
        column: texts, large_string.
        characters: how much of each text is looked at.

    Returns:
        ISO 639 codes (string) and probabilities (float32); ``und`` and 0 for a text without letters.
    """
    from pipelines import langid  # late: numba and the model take seconds that --help need not pay

    labels, scores = langid.classify(column, characters)
    names = pa.array([*langid.model().labels, "und"], pa.string())
    return names.take(pa.array(np.where(labels < 0, len(names) - 1, labels))), pa.array(scores)


def known_languages() -> list[str]:
    """Codes of the languages that the model tells apart."""
    from pipelines import langid

    return list(langid.model().labels)
