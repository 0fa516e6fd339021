"""The quality and repetition rules of Gopher (Rae et al. 2021, appendix A1.1 and table A1).

Where the paper leaves a choice, datatrove's is taken: how lines and paragraphs are cut, which words count, that shares
of characters are of the whole text, the walk that counts duplicated n-grams. Words are cut as spaCy's English tokenizer
cuts them (``words.tokens``), which makes punctuation a word of its own.

The thresholds were made for English. In scripts without spaces every character is a word here, so that n-grams repeat
sooner; texts in such scripts want thresholds of their own, or a language rule before these.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pipelines.filters import Applied, Batch, Measure, share

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
"""The eight words of which a document must hold some (Rae et al. 2021)."""


@dataclass
class GopherQuality:
    """Rules on words, symbols and lines that tell prose from other text."""

    enabled: bool = True
    """Whether these rules are applied."""
    min_words: int = 50
    """Fewest words; a word counts if it is not all punctuation."""
    max_words: int = 100_000
    """Most words."""
    min_mean_word_length: float = 3.0
    """Smallest mean length of those words, in characters."""
    max_mean_word_length: float = 10.0
    """Largest mean length of those words, in characters."""
    max_hash_ratio: float = 0.1
    """Most hash signs per word."""
    max_ellipsis_ratio: float = 0.1
    """Most ellipses (three dots or the one character) per word."""
    max_bullet_lines: float = 0.9
    """Largest share of lines that start with a bullet or a hyphen."""
    max_ellipsis_lines: float = 0.3
    """Largest share of lines that end with an ellipsis."""
    min_alphabetic_words: float = 0.8
    """Smallest share of words that hold a letter."""
    min_stop_words: int = 2
    """How many different stop words the document must hold."""
    stop_words: list[str] = field(default_factory=lambda: list(STOP_WORDS))
    """The stop words, compared with their case."""

    def validate(self) -> None:
        """Raises ValueError for settings that no document can meet."""
        if self.min_words > self.max_words:
            raise ValueError(f"min_words is {self.min_words}, must not be above max_words {self.max_words}")
        if self.min_mean_word_length > self.max_mean_word_length:
            raise ValueError(
                f"min_mean_word_length is {self.min_mean_word_length}, "
                f"must not be above max_mean_word_length {self.max_mean_word_length}"
            )
        if self.min_stop_words > len(set(self.stop_words)):
            raise ValueError(
                f"min_stop_words is {self.min_stop_words}, must not be above the {len(set(self.stop_words))} stop words"
            )

    def apply(self, batch: Batch) -> Applied:
        """Measure every document, in the paper's order."""
        from pipelines.words.repetition import totals

        texts = batch.texts
        counts = texts.counts
        words = texts.words.last - texts.words.first
        counted, characters, letters, stop_words = totals(texts.words, self.stop_words)

        def measure(rule: str, values: np.ndarray, minimum: float = -np.inf, maximum: float = np.inf) -> Measure:
            return Measure(f"gopher quality: {rule}", values.astype(np.float64), minimum, maximum)

        length = share(characters, counted)
        bullets, ellipses = share(counts.bullets, counts.lines), share(counts.trailing_off, counts.lines)
        return Applied(
            [
                measure("too few words", counted, minimum=self.min_words),
                measure("too many words", counted, maximum=self.max_words),
                measure("mean word length", length, self.min_mean_word_length, self.max_mean_word_length),
                measure("hash signs", share(counts.hashes, words), maximum=self.max_hash_ratio),
                measure("ellipses", share(counts.ellipses, words), maximum=self.max_ellipsis_ratio),
                measure("bullet lines", bullets, maximum=self.max_bullet_lines),
                measure("ellipsis lines", ellipses, maximum=self.max_ellipsis_lines),
                measure("alphabetic words", share(letters, words), minimum=self.min_alphabetic_words),
                measure("stop words", stop_words, minimum=self.min_stop_words),
            ]
        )


@dataclass
class GopherRepetition:
    """Rules on lines, paragraphs and n-grams that occur again and again. Shares of characters are of the whole text."""

    enabled: bool = True
    """Whether these rules are applied."""
    max_duplicate_lines: float = 0.30
    """Largest share of lines that occurred before."""
    max_duplicate_paragraphs: float = 0.30
    """Largest share of paragraphs that occurred before."""
    max_duplicate_line_characters: float = 0.20
    """Largest share of characters in lines that occurred before."""
    max_duplicate_paragraph_characters: float = 0.20
    """Largest share of characters in paragraphs that occurred before."""
    max_top_ngram: dict[int, float] = field(default_factory=lambda: {2: 0.20, 3: 0.18, 4: 0.16})
    """Largest share of characters in the most frequent n-gram, by n."""
    max_duplicate_ngram: dict[int, float] = field(
        default_factory=lambda: {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
    )
    """Largest share of characters in n-grams that occurred before, by n."""

    def validate(self) -> None:
        """Raises ValueError for shares outside 0 to 1 and n-grams of no words."""
        shares = {name: getattr(self, name) for name in self.__dataclass_fields__ if name.startswith("max_duplicate_")}
        ngrams = shares.pop("max_duplicate_ngram")
        shares |= {f"max_duplicate_ngram[{n}]": limit for n, limit in ngrams.items()}
        shares |= {f"max_top_ngram[{n}]": limit for n, limit in self.max_top_ngram.items()}
        for name, limit in shares.items():
            if not 0 <= limit <= 1:
                raise ValueError(f"{name} is {limit}, must be a share between 0 and 1")
        for n in [*self.max_top_ngram, *ngrams]:
            if n < 1:
                raise ValueError(f"max_top_ngram and max_duplicate_ngram: n is {n}, must be at least 1")

    def apply(self, batch: Batch) -> Applied:
        """Measure every document: paragraphs, lines, n-grams."""
        from pipelines.words.repetition import duplicates, ngram_characters

        texts = batch.texts
        size = texts.counts.characters
        measures = []

        def measure(rule: str, values: np.ndarray, maximum: float) -> None:
            measures.append(Measure(f"gopher repetition: {rule}", values, maximum=maximum))

        count, characters = duplicates(texts.paragraphs)
        paragraphs = np.maximum(texts.paragraphs.last - texts.paragraphs.first, 1)
        measure("duplicate paragraphs", share(count, paragraphs), self.max_duplicate_paragraphs)
        measure("duplicate paragraph characters", share(characters, size), self.max_duplicate_paragraph_characters)
        # A newline at either end of the text makes an empty line there; two make one that occurred before.
        count, characters = duplicates(texts.lines)
        edges = texts.counts.edges
        lines = texts.lines.last - texts.lines.first + edges
        measure("duplicate lines", share(count + (edges == 2), lines), self.max_duplicate_lines)
        measure("duplicate line characters", share(characters, size), self.max_duplicate_line_characters)
        top, duplicated = ngram_characters(texts.words, self.max_top_ngram, self.max_duplicate_ngram)
        for n, limit in self.max_top_ngram.items():
            measure(f"top {n}-gram", share(top[n], size), limit)
        for n, limit in self.max_duplicate_ngram.items():
            measure(f"duplicate {n}-grams", share(duplicated[n], size), limit)
        return Applied(measures)
