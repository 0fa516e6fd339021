"""The rules of C4 (Raffel et al. 2020, section 2.2), as datatrove reads them: lines go, and some documents.

Lines are those of ``str.splitlines``, stripped; what stays is joined by newlines. A line is judged in this order: a
word too long, citations cut out, terminal punctuation, too few words, lorem ipsum, javascript, curly bracket, policy.
FineWeb runs the rules without ``terminal_punctuation``. The list of bad words is not part of this rule set.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipelines.filters import Applied, Batch, Measure

POLICY_PHRASES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
"""What lines about policies say (C4's published code)."""


@dataclass
class C4:
    """Rules that remove lines which are no prose, and documents of which too little is left."""

    enabled: bool = True
    """Whether these rules are applied."""
    terminal_punctuation: bool = True
    """Remove lines that do not end in . ? ! or a quotation mark, or that end in three dots."""
    min_words: int = 3
    """Remove lines of fewer words between white space; 0 to keep them."""
    max_word_length: int = 1000
    """Remove lines with a word of more characters; 0 to keep them."""
    javascript: bool = True
    """Remove lines that say javascript."""
    policy_phrases: list[str] = field(default_factory=lambda: list(POLICY_PHRASES))
    """Remove lines that hold one of these; upper and lower case of a to z are the same."""
    citations: bool = True
    """Cut [1], [], [edit] and [citation needed] out of lines."""
    lorem_ipsum: bool = True
    """Drop documents that say lorem ipsum in a line that would stay."""
    curly_bracket: bool = True
    """Drop documents with a { in a line that would stay."""
    min_sentences: int = 5
    """Fewest sentences in the lines that stay; 0 to drop no document for it."""

    def validate(self) -> None:
        """Raises ValueError for settings that mean nothing."""
        for name in ("min_words", "max_word_length", "min_sentences"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name} is {value}, must not be negative; 0 switches the rule off")
        if not all(isinstance(phrase, str) and phrase for phrase in self.policy_phrases):
            raise ValueError("policy_phrases holds an empty phrase, which every line would contain")

    def apply(self, batch: Batch) -> Applied:
        """Remove lines, and measure every document."""
        from pipelines.filters.c4_lines import OUTCOMES, edit

        texts = batch.texts
        edited = edit(
            texts,
            policy_phrases=self.policy_phrases,
            terminal_punctuation=self.terminal_punctuation,
            min_words=self.min_words,
            max_word_length=self.max_word_length,
            javascript=self.javascript,
            lorem_ipsum=self.lorem_ipsum,
            curly_bracket=self.curly_bracket,
            citations=self.citations,
        )
        lines = dict(zip(OUTCOMES, edited.lines, strict=True))

        def measure(rule: str, values: np.ndarray, minimum: float = -np.inf, maximum: float = np.inf) -> Measure:
            return Measure(f"c4: {rule}", values.astype(np.float64), minimum, maximum)

        measures = []
        if self.lorem_ipsum:
            measures.append(measure("lorem ipsum", lines["lorem ipsum line"], maximum=0))
        if self.curly_bracket:
            measures.append(measure("curly bracket", lines["curly bracket line"], maximum=0))
        if self.min_sentences:
            measures.append(measure("too few sentences", edited.sentences, minimum=self.min_sentences))
        text = pa.Array.from_buffers(
            pa.large_string(),
            texts.documents,
            [None, pa.py_buffer(edited.offsets), pa.py_buffer(edited.data)],
        )
        counts = {f"c4: {outcome}": int(count.sum()) for outcome, count in lines.items()}
        return Applied(measures, text, {outcome: count for outcome, count in counts.items() if count})
