"""The one fast pass over text that filters, deduplication and decontamination share.

``Texts`` is what the rule sets ask of a batch: words, sentences, lines and paragraphs as the published rules cut them.
``shingles``, ``normal_words`` and ``normal.ngram_hashes`` cut words without regard to case and punctuation.
"""

from __future__ import annotations

from pipelines.words.normal import NormalWords, normal_words, shingles
from pipelines.words.single import (
    LETTER,
    SOLID,
    Repeats,
    Spans,
    Words,
    analyse,
    extend_ngrams,
    ngram_hashes,
    repeats,
    word_hash,
)
from pipelines.words.texts import Texts

__all__ = [
    "LETTER",
    "SOLID",
    "NormalWords",
    "Repeats",
    "Spans",
    "Texts",
    "Words",
    "analyse",
    "extend_ngrams",
    "ngram_hashes",
    "normal_words",
    "repeats",
    "shingles",
    "word_hash",
]
