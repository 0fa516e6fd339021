"""Books: plain-text files in UTF-8, one document a file."""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.documents import BadRecord, document_id
from pipelines.sources import Record, Source, title, whole_text


def read(uri: str, source: Source) -> Iterator[Record | BadRecord]:
    """The book, unless it is empty, too long, or not UTF-8."""
    text = whole_text(uri, source.max_record_bytes, "book")
    if isinstance(text, BadRecord):
        yield text
    elif text.strip():
        path = source.relative(uri)
        yield {
            "id": document_id(source.label, path, 0),
            "text": text.replace("\r\n", "\n"),
            "path": uri,
            "offset": 0,
            "metadata": {"title": title(uri)},
        }
