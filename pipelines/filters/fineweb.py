"""FineWeb's own rules (Penedo et al. 2024, section 3.6): lists, menus and repeated lines.

Lines are cut at newlines, without those that hold nothing but white space. FineWeb applies these rules after Gopher's
and C4's, to the text that C4 has edited.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.filters import Applied, Batch, Measure, share


@dataclass
class FineWeb:
    """Rules on the lines of a document."""

    enabled: bool = True
    """Whether these rules are applied."""
    min_terminated_lines: float = 0.12
    """Smallest share of lines that end in a closing mark, of any script."""
    short_line: int = 30
    """Characters up to which a line is short."""
    max_short_lines: float = 0.67
    """Largest share of short lines."""
    max_duplicate_line_characters: float = 0.01
    """Largest share of characters in lines that occurred before; of all characters but newlines."""
    max_newlines_per_word: float = 0.3
    """Most newlines per word."""

    def validate(self) -> None:
        """Raises ValueError for shares outside 0 to 1 and lengths below 0."""
        for name in ("min_terminated_lines", "max_short_lines", "max_duplicate_line_characters"):
            if not 0 <= (limit := getattr(self, name)) <= 1:
                raise ValueError(f"{name} is {limit}, must be a share between 0 and 1")
        for name in ("short_line", "max_newlines_per_word"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name} is {value}, must not be negative")

    def apply(self, batch: Batch) -> Applied:
        """Measure every document."""
        from pipelines.words.lines import BLANK, TERMINATED
        from pipelines.words.repetition import duplicates, within

        texts = batch.texts
        lines, counts = texts.lines, texts.counts
        filled = (lines.flags & BLANK) == 0
        n = within(lines, filled)
        terminated = within(lines, filled & ((lines.flags & TERMINATED) != 0))
        short = within(lines, filled & (lines.lengths <= self.short_line))
        _, characters = duplicates(lines, skip=BLANK)
        words = texts.words.last - texts.words.first
        measures = (
            Measure("fineweb: lines ending in punctuation", share(terminated, n), minimum=self.min_terminated_lines),
            Measure("fineweb: short lines", share(short, n), maximum=self.max_short_lines),
            Measure(
                "fineweb: duplicate line characters",
                share(characters, counts.characters - counts.newlines),
                maximum=self.max_duplicate_line_characters,
            ),
            Measure("fineweb: newlines per word", share(counts.newlines, words), maximum=self.max_newlines_per_word),
        )
        return Applied([*measures])
