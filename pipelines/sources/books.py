"""Books: one document a file, plain text in any charset or EPUB."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pipelines.documents import BadRecord, document_id
from pipelines.sources import Record, Source, stem, title

_START = re.compile(
    r"^[ \t]*\*\*\*[ \t]*START OF (?:THE |THIS )?PROJECT GUTENBERG[^\n]*\n|^\*END[ *]*THE SMALL PRINT![^\n]*\n",
    re.IGNORECASE | re.MULTILINE,
)
_END = re.compile(
    r"^[ \t]*(?:\*\*\*[ \t]*END OF (?:THE |THIS )?PROJECT GUTENBERG|End of (?:the |this )?Project Gutenberg)",
    re.IGNORECASE | re.MULTILINE,
)
_CREDITS = re.compile(r"\A\s*(?:Produced by|E-text prepared by|Transcribed from)[^\n]*(?:\n[^\n]+)*\n", re.IGNORECASE)
_MARGIN = 40_000  # characters at either end within which a header or a licence lies


def read(uri: str, source: Source) -> Iterator[Record | BadRecord]:
    """The book, unless it is empty, too long, damaged, or no text."""
    if stem(uri).endswith(".epub"):
        from pipelines.sources import epub

        book = epub.read_epub(uri, source.max_record_bytes)
    else:
        book = _plain(uri, source)
    if isinstance(book, BadRecord):
        yield book
        return
    text, facts = book
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if source.strip_gutenberg:
        text = without_gutenberg(text)
    if text.strip():
        yield {
            "id": document_id(source.label, source.relative(uri), 0),
            "text": text,
            "path": uri,
            "offset": 0,
            "metadata": {"title": title(uri)} | facts,
        }


def _plain(uri: str, source: Source) -> tuple[str, dict[str, str | int]] | BadRecord:
    from pipelines.sources.text import decode, whole_file

    data = whole_file(uri, source.max_record_bytes, "book")
    if isinstance(data, BadRecord):
        return data
    found = decode(data)
    return BadRecord(uri, 0, "book: not text", found) if isinstance(found, str) else (found.text, found.facts)


def without_gutenberg(text: str) -> str:
    """A book without the header and the licence that Project Gutenberg puts around it; others stay as they are."""
    start = _START.search(text, 0, _MARGIN)
    if not start:
        return text
    end = _END.search(text, max(start.end(), len(text) - _MARGIN))
    inner = text[start.end() : end.start() if end else len(text)]
    return _CREDITS.sub("", inner, count=1).strip("\n") + "\n"
