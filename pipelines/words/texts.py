"""The texts of a batch with everything that the rules ask of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.words.columns import buffers
from pipelines.words.lines import Counts, Spans, lines
from pipelines.words.tokens import Tokens, tokens

_LARGEST = 2**31 - 1


class Texts(NamedTuple):
    """Documents cut into words, lines and paragraphs: flat arrays, of which each document has a range.

    Attributes:
        data: UTF-8 of all documents, uint8.
        begin: first byte of each document, (documents,), int64.
        end: one past its last byte, (documents,), int64.
        words: words as spaCy's English tokenizer cuts them (see ``tokens``), without white space.
        lines: lines that are not empty.
        paragraphs: the stripped text, cut at two or more newlines.
        counts: what was counted on the way.
    """

    data: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    words: Tokens
    lines: Spans
    paragraphs: Spans
    counts: Counts

    @classmethod
    def of(cls, column: pa.Array | pa.ChunkedArray) -> Texts:
        """Analyse a string column; null is an empty document.

        Raises:
            ValueError: a document of 2 GiB or more.
        """
        data, offsets = buffers(column)
        if (longest := int(np.diff(offsets).max(initial=0))) > _LARGEST:
            raise ValueError(f"a document has {longest:,} bytes; the rules read documents of less than 2 GiB, split it")
        return cls(data, offsets[:-1].copy(), offsets[1:].copy(), tokens(data, offsets), *lines(data, offsets))

    @property
    def documents(self) -> int:
        """How many there are."""
        return len(self.begin)

    def filter(self, mask: np.ndarray) -> Texts:
        """The documents where ``mask`` (documents,), bool, is true; only ranges change."""

        def rest(spans: Any) -> Any:
            return spans._replace(first=spans.first[mask], last=spans.last[mask])

        return Texts(
            self.data,
            self.begin[mask],
            self.end[mask],
            rest(self.words),
            rest(self.lines),
            rest(self.paragraphs),
            Counts(*(count[mask] for count in self.counts)),
        )

    def updated(self, changed: np.ndarray, column: pa.Array | pa.ChunkedArray) -> Texts:
        """The documents with other text.

        Args:
            changed: which documents have other text, (documents,), bool; the rest is not analysed again.
            column: the text of those.
        """
        other = Texts.of(column)

        def ranges(mine: np.ndarray, theirs: np.ndarray, shift: int) -> np.ndarray:
            both = mine.copy()
            both[changed] = theirs + shift
            return both

        def joined(mine: Any, theirs: Any) -> Any:
            flat = [np.concatenate(pair) for pair in zip(mine[:5], theirs[:5], strict=True)]
            shift = len(mine.hashes)
            return type(mine)(*flat, *(ranges(mine[i], theirs[i], shift) for i in (5, 6)))

        data = np.concatenate((self.data, other.data))
        data.flags.writeable = False
        return Texts(
            data,
            ranges(self.begin, other.begin, len(self.data)),
            ranges(self.end, other.end, len(self.data)),
            joined(self.words, other.words),
            joined(self.lines, other.lines),
            joined(self.paragraphs, other.paragraphs),
            Counts(*(ranges(mine, theirs, 0) for mine, theirs in zip(self.counts, other.counts, strict=True))),
        )
