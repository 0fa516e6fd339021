"""JSON Lines: one JSON object a line, in plain, gzip or zstd files."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pipelines import storage
from pipelines.documents import BadRecord, document_id
from pipelines.sources import Record, Source, clean, scalars
from pipelines.sources.compressed import Damage, pieces


def read(uri: str, source: Source) -> Iterator[Record | BadRecord]:
    """The documents of a file; other fields than text, url and id become metadata.

    Offsets are those of lines in the decompressed content, except for damaged compression, where the offset is that of
    the damaged member in the file; the detail says which.
    """
    with storage.open_input(uri) as file:
        compressed = file.read(2) in (b"\x1f\x8b", b"\x28\xb5")
        file.seek(0)
        where = " (offset in the decompressed content)" if compressed else ""
        for item in _lines(file, uri, source.max_record_bytes, where):
            yield item if isinstance(item, BadRecord) else _document(uri, *item, source, where)


def _lines(file: storage.pa.NativeFile, uri: str, limit: int, where: str) -> Iterator[tuple[int, bytes] | BadRecord]:
    """Lines that are not blank, with their offsets."""
    start = position = 0  # of the line that is being read; of the end of what was read
    begun, size = [], 0  # that line as far as it was read, given up when it is too long

    def finish() -> Iterator[tuple[int, bytes] | BadRecord]:
        if size > limit:
            yield BadRecord(uri, start, "jsonl: line too long", f"more than {limit} bytes{where}")
        elif (line := b"".join(begun)).strip():
            yield start, line

    for piece in pieces(file, _plausible):
        if isinstance(piece, Damage):
            detail = f"{piece.detail}; {size} bytes of a line before it are lost (offset in the file)"
            yield BadRecord(uri, piece.offset, "jsonl: damaged compression", detail)
            start, begun, size = position, [], 0
            continue
        at = 0
        while (end := piece.data.find(b"\n", at)) >= 0:
            begun.append(piece.data[at:end])
            size += end - at
            yield from finish()
            at, begun, size = end + 1, [], 0
            start = position + at
        begun.append(piece.data[at:])
        size += len(piece.data) - at
        if size > limit:
            begun = []
        position += len(piece.data)
    yield from finish()


def _document(uri: str, offset: int, line: bytes, source: Source, where: str) -> Record | BadRecord:
    try:
        fields = json.loads(line.decode("utf-8-sig" if offset == 0 else "utf-8"))
    except UnicodeDecodeError as error:
        return BadRecord(uri, offset, "jsonl: bad UTF-8", f"{error}{where}")
    except (ValueError, RecursionError) as error:
        return BadRecord(uri, offset, "jsonl: invalid JSON", f"{error}{where}")
    text = fields.get(source.text_field) if isinstance(fields, dict) else None
    if not isinstance(text, str):
        return BadRecord(uri, offset, "jsonl: no text", f"no string in the field {source.text_field}{where}")
    url = fields.get("url")
    return {
        "id": document_id(source.label, source.relative(uri), offset),
        "text": clean(text),
        "url": clean(url) if isinstance(url, str) else None,
        "path": uri,
        "offset": offset,
        "metadata": scalars(fields, (source.text_field, "url")),
    }


def _plausible(start: bytes) -> bool:
    """Whether a member that starts so may hold text: UTF-8, but for a character cut at either end."""
    start = start.lstrip(bytes(range(0x80, 0xC0)))
    try:
        start.decode()
    except UnicodeDecodeError as error:
        return error.start >= len(start) - 3
    return b"\0" not in start
