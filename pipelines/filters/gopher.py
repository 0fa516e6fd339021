"""The quality and repetition rules of Gopher (Rae et al. 2021, appendix A1.1 and table A1).

Where the paper leaves a choice, datatrove's is taken (how lines and paragraphs are cut, that shares of characters are
of the whole text, the greedy walk that counts duplicated n-grams), except that words are what whitespace separates.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pipelines.filters import Applied, Batch, Measure, Verdict
from pipelines.words import LETTER, SOLID, Repeats, Spans, Words, extend_ngrams, ngram_hashes, repeats, word_hash

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
"""The eight words of which a document must hold some (Rae et al. 2021)."""

_STOP_HASHES: dict[tuple[str, ...], np.ndarray] = {}


@dataclass
class GopherQuality:
    """Rules on words, symbols and lines that tell prose from other text."""

    enabled: bool = True
    """Whether these rules are applied."""
    min_words: int = 50
    """Fewest words; a word counts if it holds a letter or a digit."""
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
        """Measures of every document."""
        return _measures([self.judge(words) for words in batch.texts])

    def judge(self, words: Words) -> Verdict | None:
        """The first rule that the document breaks, in the paper's order, or None."""
        if not self.enabled:
            return None
        n = len(words)
        solid = (words.flags & SOLID) != 0
        n_solid = int(np.count_nonzero(solid))
        if n_solid < self.min_words:
            return Verdict("gopher quality: too few words", n_solid, self.min_words)
        if n_solid > self.max_words:
            return Verdict("gopher quality: too many words", n_solid, self.max_words)
        if n == 0:
            return None  # only when min_words is 0: every other rule divides by the number of words
        return self._judge_words(words, solid, n_solid) or self._judge_lines(words) or self._judge_letters(words)

    def _judge_words(self, words: Words, solid: np.ndarray, n_solid: int) -> Verdict | None:
        length = float(words.lengths[solid].sum()) / max(n_solid, 1)
        if length < self.min_mean_word_length:
            return Verdict("gopher quality: mean word length", length, self.min_mean_word_length)
        if length > self.max_mean_word_length:
            return Verdict("gopher quality: mean word length", length, self.max_mean_word_length)
        hashes = words.text.count("#") / len(words)
        if hashes > self.max_hash_ratio:
            return Verdict("gopher quality: hash signs", hashes, self.max_hash_ratio)
        ellipses = _ellipses(words.text) / len(words)
        if ellipses > self.max_ellipsis_ratio:
            return Verdict("gopher quality: ellipses", ellipses, self.max_ellipsis_ratio)
        return None

    def _judge_lines(self, words: Words) -> Verdict | None:
        text = words.text
        lines = text.splitlines()
        # A count over the whole text bounds the number of such lines and nearly always settles the matter.
        if text.count("-") + text.count("•") > self.max_bullet_lines * len(lines):
            bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines) / len(lines)
            if bullets > self.max_bullet_lines:
                return Verdict("gopher quality: bullet lines", bullets, self.max_bullet_lines)
        if _ellipses(text) > self.max_ellipsis_lines * len(lines):
            ellipses = sum(line.rstrip().endswith(("...", "…")) for line in lines) / len(lines)
            if ellipses > self.max_ellipsis_lines:
                return Verdict("gopher quality: ellipsis lines", ellipses, self.max_ellipsis_lines)
        return None

    def _judge_letters(self, words: Words) -> Verdict | None:
        alphabetic = np.count_nonzero(words.flags & LETTER) / len(words)
        if alphabetic < self.min_alphabetic_words:
            return Verdict("gopher quality: alphabetic words", alphabetic, self.min_alphabetic_words)
        found = 0
        for stop_word in _stop_hashes(tuple(self.stop_words)) if self.min_stop_words else ():
            found += bool((words.hashes == stop_word).any())
            if found >= self.min_stop_words:
                break
        if found < self.min_stop_words:
            return Verdict("gopher quality: stop words", found, self.min_stop_words)
        return None


def _measures(verdicts: list[Verdict | None]) -> Applied:
    measures: dict[tuple[str, float, bool], Measure] = {}
    for i, v in enumerate(verdicts):
        if v is not None:
            low = v.value < v.threshold
            bound = {"minimum": v.threshold} if low else {"maximum": v.threshold}
            fresh = Measure(v.reason, np.full(len(verdicts), np.nan), **bound)
            measures.setdefault((v.reason, v.threshold, low), fresh).values[i] = v.value
    return Applied(list(measures.values()))


def _ellipses(text: str) -> int:
    return text.count("...") + text.count("…")


def _stop_hashes(stop_words: tuple[str, ...]) -> np.ndarray:
    if stop_words not in _STOP_HASHES:
        _STOP_HASHES[stop_words] = np.array([word_hash(w) for w in dict.fromkeys(stop_words)], np.uint64)
    return _STOP_HASHES[stop_words]


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
        shares |= {f"max_duplicate_ngram[{n}]": share for n, share in ngrams.items()}
        shares |= {f"max_top_ngram[{n}]": share for n, share in self.max_top_ngram.items()}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}, must be a share between 0 and 1")
        for n in [*self.max_top_ngram, *ngrams]:
            if n < 1:
                raise ValueError(f"max_top_ngram and max_duplicate_ngram: n is {n}, must be at least 1")

    def apply(self, batch: Batch) -> Applied:
        """Measures of every document."""
        return _measures([self.judge(words) for words in batch.texts])

    def judge(self, words: Words) -> Verdict | None:
        """The first rule that the document breaks (paragraphs, lines, n-grams), or None."""
        if not self.enabled:
            return None
        size = len(words.text)
        checks = (
            ("paragraph", words.paragraphs, self.max_duplicate_paragraphs, self.max_duplicate_paragraph_characters),
            ("line", words.lines, self.max_duplicate_lines, self.max_duplicate_line_characters),
        )
        for what, spans, max_share, max_characters in checks:
            count, characters = duplicates(spans)
            if count and count / len(spans.starts) > max_share:
                return Verdict(f"gopher repetition: duplicate {what}s", count / len(spans.starts), max_share)
            if count and characters / size > max_characters:
                return Verdict(f"gopher repetition: duplicate {what} characters", characters / size, max_characters)
        return self._judge_ngrams(words, size)

    def _judge_ngrams(self, words: Words, size: int) -> Verdict | None:
        wanted = sorted({*self.max_top_ngram, *self.max_duplicate_ngram})
        for n, again in repeated_ngrams(words, wanted):
            if n in self.max_top_ngram:
                share = top_ngram_characters(words, again, n) / size
                if share > self.max_top_ngram[n]:
                    return Verdict(f"gopher repetition: top {n}-gram", share, self.max_top_ngram[n])
            if n in self.max_duplicate_ngram:
                limit = self.max_duplicate_ngram[n]
                # Counting overlaps twice bounds the exact measure from above and is much cheaper.
                if again.positions.size and _ngram_lengths(words, again, n, later=True).sum() > limit * size:
                    share = duplicate_ngram_characters(words, again, n) / size
                    if share > limit:
                        return Verdict(f"gopher repetition: duplicate {n}-grams", share, limit)
        return None


def duplicates(spans: Spans) -> tuple[int, int]:
    """How many spans occurred before in the same text, and their characters."""
    again = repeats(spans.hashes)
    if not again.positions.size:
        return 0, 0
    lengths = spans.lengths[again.positions]
    return len(lengths) - len(again.first), int(lengths.sum() - lengths[again.first].sum())


def repeated_ngrams(words: Words, sizes: list[int]) -> list[tuple[int, Repeats]]:
    """For each n of ``sizes`` (ascending) that the text is long enough for: the n-grams that occur more than once.

    An (n+1)-gram can only repeat where the n-grams at its place and at the next one do, so that after the first sort
    each longer n looks at few candidates.
    """
    result: list[tuple[int, Repeats]] = []
    grams, candidates = words.hashes, None
    for n in range(sizes[0], sizes[-1] + 1) if sizes else ():
        if n > len(words):
            break
        grams = ngram_hashes(words.hashes, n) if candidates is None else extend_ngrams(grams, words.hashes, n - 1)
        again = repeats(grams if candidates is None else grams[candidates])
        if candidates is not None:
            again = again._replace(positions=candidates[again.positions])
        if n in sizes:
            result.append((n, again))
        marked = np.zeros(len(grams) + 1, bool)
        marked[again.positions] = True
        candidates = np.flatnonzero(marked[:-2] & marked[1:-1])
    return result


def _ngram_lengths(words: Words, again: Repeats, n: int, *, later: bool = False) -> np.ndarray:
    """Characters of the words in each repeated n-gram; ``later`` leaves out the first of each group."""
    sums = np.concatenate(([0], np.cumsum(words.lengths)))
    positions = np.delete(again.positions, again.first) if later else again.positions
    return sums[positions + n] - sums[positions]


def top_ngram_characters(words: Words, again: Repeats, n: int) -> int:
    """Characters of the most frequent n-gram, its words joined by single spaces, times its occurrences.

    Of several that are equally frequent, the one that occurs first counts.
    """
    position, count = 0, 1
    if again.first.size:
        count = int(again.counts.max())
        position = int(again.positions[again.first[again.counts == count]].min())
    return count * (int(words.lengths[position : position + n].sum()) + n - 1)


def duplicate_ngram_characters(words: Words, again: Repeats, n: int) -> int:
    """Characters of the words in n-grams that occurred before, each counted once.

    The text is walked from the start; an n-gram seen before is counted and skipped as a whole, any other is remembered
    and the walk moves on by one word. Only n-grams that repeat can matter, so the walk visits those alone.
    """
    order = np.argsort(again.positions)
    positions = again.positions[order]
    lengths = _ngram_lengths(words, again, n)[order]
    seen: set[int] = set()
    total = at = 0
    for position, group, length in zip(positions.tolist(), again.groups[order].tolist(), lengths.tolist(), strict=True):
        if position < at:
            continue
        if group in seen:
            total += length
            at = position + n
        else:
            seen.add(group)
    return total
