"""JSON Lines: one JSON object a line, in plain, gzip or zstd files."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

from pipelines import storage
from pipelines.documents import BadRecord
from pipelines.sources import Record, Source, columns
from pipelines.sources.compressed import Damage, is_compressed, pieces


def read(uri: str, source: Source, start: int = 0, end: int | None = None) -> Iterator[Record | BadRecord]:
    """The documents of a file; what the source's mapping does not name becomes metadata.

    Offsets are those of lines in the decompressed content, except for damaged compression, where the offset is that of
    the damaged member in the file; the detail says which.

    Args:
        uri: the file.
        source: whose mapping is taken.
        start: with ``end``, for plain files only: the lines that begin in this range of bytes are read.
        end: where the range ends, None with the file.
    """
    with storage.open_input(uri) as file:
        compressed = is_compressed(file.read(4))
        where = " (offset in the decompressed content)" if compressed else ""
        for item in _lines(file, uri, source.max_record_bytes, where, start, end):
            yield item if isinstance(item, BadRecord) else _document(uri, *item, source, where)


def ranges(file: storage.FileInfo, size: int) -> list[tuple[int, int]]:
    """Ranges of some ``size`` bytes that a plain file can be read in; one with all of a compressed file."""
    with storage.open_input(file.uri) as opened:
        if is_compressed(opened.read(4)):
            return [(0, file.size)]
    count = max(1, round(file.size / size))
    cuts = [file.size * i // count for i in range(count + 1)]
    return list(itertools.pairwise(cuts))


def _lines(
    file: storage.pa.NativeFile, uri: str, limit: int, where: str, first: int, end: int | None
) -> Iterator[tuple[int, bytes] | BadRecord]:
    """Lines that are not blank and begin in a range, with their offsets."""
    # A line belongs to the range that holds its first byte: whether that is one tells the byte before.
    start = position = max(0, first - 1)  # of the line that is being read; of the end of what was read
    begun, size = [], 0  # that line as far as it was read, given up when it is too long
    foreign = first > 0  # the line belongs to the range before

    def finish() -> Iterator[tuple[int, bytes] | BadRecord]:
        if foreign:
            return
        if size > limit:
            yield BadRecord(uri, start, "jsonl: line too long", f"more than {limit} bytes{where}")
        elif (line := b"".join(begun)).strip():
            yield start, line

    for piece in pieces(file, _plausible, start):
        if isinstance(piece, Damage):
            detail = f"{piece.detail}; {size} bytes of a line before it are lost (offset in the file)"
            yield BadRecord(uri, piece.offset, "jsonl: damaged compression", detail)
            start, begun, size = position, [], 0
            continue
        at = 0
        while (stop := piece.data.find(b"\n", at)) >= 0:
            begun.append(piece.data[at:stop])
            size += stop - at
            yield from finish()
            at, begun, size, foreign = stop + 1, [], 0, False
            start = position + at
            if end is not None and start >= end:
                return
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
    if not isinstance(fields, dict):
        return BadRecord(uri, offset, "jsonl: no text", f"no JSON object{where}")
    found = columns.document(fields, source, uri, offset)
    if isinstance(found, str):
        return BadRecord(uri, offset, "jsonl: no text", found + where)
    return found | {"offset": offset}


def _plausible(start: bytes) -> bool:
    """Whether a member that starts so may hold text: UTF-8, but for a character cut at either end."""
    start = start.lstrip(bytes(range(0x80, 0xC0)))
    try:
        start.decode()
    except UnicodeDecodeError as error:
        return error.start >= len(start) - 3
    return b"\0" not in start
