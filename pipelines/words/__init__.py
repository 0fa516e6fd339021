"""The one fast pass over text that filters, deduplication and decontamination share.

``Texts`` is what the rule sets ask of a batch: words, sentences, lines and paragraphs as the published rules cut them.
``shingles``, ``normal_words`` and ``normal.ngram_hashes`` cut words without regard to case and punctuation.
"""

from __future__ import annotations

from pipelines.words.normal import NormalWords, normal_words, shingles
from pipelines.words.texts import Texts

__all__ = ["NormalWords", "Texts", "normal_words", "shingles"]
