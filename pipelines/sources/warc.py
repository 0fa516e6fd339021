"""Web archives (WARC/1.0 and 1.1): HTML pages of response records, and the extracted text of WET files.

In a ``.warc.gz`` or ``.warc.zst`` every record is its own member or frame. A damaged one costs that record alone; a
broken header in an uncompressed archive costs the bytes up to the next one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from pipelines import storage
from pipelines.documents import BadRecord, document_id
from pipelines.sources import Record, Source, http_body
from pipelines.sources.compressed import Damage, is_compressed, pieces

_VERSION = b"WARC/"
_BEHIND = 4 + len(_VERSION)  # bytes by which the end of a record is known: two line ends and the next one's start
_MAX_REWINDS = 100  # in a file
_NEXT_RECORD = re.compile(rb"(?<=\n)WARC/[0-9]")
_HEADER_BYTES = 64 << 10
_LENGTH = re.compile(rb"^content-length:[ \t]*([0-9]{1,15})[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
_TYPE = re.compile(rb"^warc-type:[ \t]*([a-z]+)", re.IGNORECASE | re.MULTILINE)
_HTML = ("text/html", "application/xhtml+xml")


class _Raw(NamedTuple):
    """A record as it stands in the archive: its position within the member, its type, its header, its block."""

    position: int
    kind: bytes
    header: bytes
    block: bytes


class _Broken(NamedTuple):
    position: int
    reason: str
    detail: str


def read(uri: str, source: Source) -> Iterator[Record | BadRecord]:
    """Pages (kind warc) or extracted texts (kind wet) of an archive.

    Responses that are no HTML or whose HTTP status is not 200 are BadRecords too, so that they are counted.
    """
    wanted = b"response" if source.format == "warc" else b"conversion"
    for found in _records(uri, source.max_record_bytes):
        if isinstance(found, BadRecord):
            yield found
            continue
        offset, raw = found
        if raw.kind.lower() != wanted:
            continue
        try:
            yield _page(uri, offset, raw, source) if wanted == b"response" else _text(uri, offset, raw, source)
        except Exception as error:  # whatever the parser says of a record, the next one is read
            yield BadRecord(uri, offset, f"{source.format}: broken record", repr(error))


def _records(uri: str, limit: int) -> Iterator[tuple[int, _Raw] | BadRecord]:
    """Raw records with their offsets: that of the member where there are members, else that of the record."""

    def located(found: _Raw | _Broken, member: int, compressed: bool) -> tuple[int, _Raw] | BadRecord:
        offset = member if compressed else found.position
        if isinstance(found, _Raw):
            return offset, found
        where = f"; {found.position} bytes into the member that starts at the offset" if compressed else ""
        return BadRecord(uri, offset, found.reason, found.detail + where)

    with storage.open_input(uri) as file:
        compressed = is_compressed(file.read(4))
        splitter, held, member, rewinds = _Splitter(limit), None, 0, 0
        stream = pieces(file, lambda start: start.startswith(_VERSION))
        while True:
            piece = next(stream, None)
            if isinstance(piece, Damage):
                # What is held comes from the damaged member and so cannot be trusted.
                splitter, held = _Splitter(limit), None
                yield BadRecord(uri, piece.offset, "warc: damaged compression", piece.detail)
                continue
            member = piece.member if piece else member
            for found in splitter.feed(piece.data if piece else b"", final=piece is None or piece.ends):
                if held is not None:
                    yield held
                held = located(found, member, compressed)
            if splitter.astray is not None and not compressed and rewinds < _MAX_REWINDS:
                # The length was wrong: what was passed over may hold records.
                rewinds += 1
                start, splitter = splitter.astray, _Splitter(limit)
                splitter.position, splitter.searching = start, True
                stream = pieces(file, lambda start: False, start)
                continue
            if piece is None or piece.ends:
                if held is not None:
                    yield held
                splitter, held = _Splitter(limit), None
            if piece is None:
                return


class _Splitter:
    """Cuts a stream of bytes into records; after a broken one it goes on at the next line that starts a record."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.buffer = bytearray()
        self.position = 0  # of the first byte of the buffer
        self.skip = 0  # bytes of a block that is too long, still to be passed over
        self.passed: int | None = None  # where such a block begins, until it is seen to end at a record's end
        self.astray: int | None = None  # where one begins that did not
        self.searching = False

    def feed(self, data: bytes, *, final: bool) -> Iterator[_Raw | _Broken]:
        """Records that are complete once ``data`` is there; ``final`` says that nothing follows."""
        self.buffer += data
        while self.buffer:
            if self.skip:
                gone = min(self.skip, len(self.buffer))
                self.skip -= gone
                self._drop(gone)
            elif self.passed is not None:
                if len(self.buffer) < _BEHIND and not final:
                    return
                if not self._record_follows(0):
                    self.astray = self.passed
                    return
                self.passed = None
            elif self.searching:
                if not self._search(final):
                    return
            else:
                found = self._next(final)
                if found is None:
                    return
                if found:
                    yield found
        if final and self.skip:
            self.astray = self.passed

    def _next(self, final: bool) -> _Raw | _Broken | bool | None:
        """A record or what is wrong with it; False after blank lines, None when more bytes are needed."""
        blank = len(self.buffer) - len(self.buffer.lstrip(b"\r\n"))
        if blank:
            self._drop(blank)
            return False
        if not self.buffer.startswith(_VERSION[: len(self.buffer)]):
            return self._broken("warc: broken header", f"starts with {bytes(self.buffer[:40])!r}", 1)
        end = self.buffer.find(b"\r\n\r\n", 0, _HEADER_BYTES)
        if end < 0:
            if len(self.buffer) < _HEADER_BYTES and not final:
                return None
            return self._broken("warc: broken header", "does not end", 1)
        header = bytes(self.buffer[: end + 2])
        length = _LENGTH.search(header)
        kind = _TYPE.search(header)
        if not length or not kind:
            missing = "Content-Length" if not length else "WARC-Type"
            return self._broken("warc: broken header", f"no valid {missing}", len(header))
        return self._block(end + 4, int(length[1]), kind[1], final)

    def _block(self, start: int, length: int, kind: bytes, final: bool) -> _Raw | _Broken | None:
        if length > self.limit:
            broken = _Broken(self.position, "warc: record too long", f"{length} bytes")
            self._drop(start)
            self.skip, self.passed = length, self.position
            return broken
        end = start + length
        if len(self.buffer) < end + _BEHIND and not final:
            return None
        if len(self.buffer) < end:
            return self._broken("warc: record cut short", f"{len(self.buffer) - start} of {length} bytes", start)
        if not self._record_follows(end):
            return self._broken("warc: broken header", f"Content-Length {length} does not end at a record's end", start)
        raw = _Raw(self.position, kind, bytes(self.buffer[: start - 4]), bytes(self.buffer[start:end]))
        self._drop(end)
        return raw

    def _record_follows(self, end: int) -> bool:
        """Whether what stands behind a block, as far as it is there, is a record's end or the next one's start."""
        behind = bytes(self.buffer[end : end + _BEHIND])
        return behind.startswith(b"\r\n\r\n") or _VERSION.startswith(behind.lstrip(b"\r\n")[: len(_VERSION)])

    def _broken(self, reason: str, detail: str, search_from: int) -> _Broken:
        broken = _Broken(self.position, reason, detail)
        # One byte stays in front: a record is recognised by the line end before it.
        self._drop(max(0, min(search_from, len(self.buffer)) - 1))
        self.searching = True
        return broken

    def _search(self, final: bool) -> bool:
        found = _NEXT_RECORD.search(self.buffer)
        if found:
            self._drop(found.start())
            self.searching = False
            return True
        self._drop(len(self.buffer) if final else max(0, len(self.buffer) - len(_VERSION) - 2))
        return False

    def _drop(self, count: int) -> None:
        del self.buffer[:count]
        self.position += count


def _page(uri: str, offset: int, raw: _Raw, source: Source) -> Record | BadRecord:
    header = http_body.headers(raw.header)
    response = http_body.parse(raw.block)
    if response is None:
        return BadRecord(uri, offset, "warc: not HTTP", header.get("content-type", ""))
    if response.status != 200:
        return BadRecord(uri, offset, "warc: HTTP status", str(response.status))
    content_type = response.headers.get("content-type") or header.get("warc-identified-payload-type") or ""
    if content_type.partition(";")[0].strip().lower() not in _HTML:
        return BadRecord(uri, offset, "warc: not HTML", content_type)
    try:
        # A compressed body may be a thousand times as long as the record that holds it.
        html = http_body.decoded(response, source.max_record_bytes)
    except ValueError as error:
        return BadRecord(uri, offset, "warc: damaged body", str(error))
    if len(html) > source.max_record_bytes:
        return BadRecord(uri, offset, "warc: record too long", f"more than {source.max_record_bytes} bytes of HTML")
    document = _document(uri, offset, header, source)
    if "warc-truncated" in header:
        document["metadata"]["truncated"] = header["warc-truncated"]
    return document | {"html": html, "content_type": content_type}


def _text(uri: str, offset: int, raw: _Raw, source: Source) -> Record | BadRecord:
    try:
        text = raw.block.decode()
    except UnicodeDecodeError as error:
        return BadRecord(uri, offset, "wet: bad UTF-8", str(error))
    return _document(uri, offset, http_body.headers(raw.header), source) | {"text": text}


def _document(uri: str, offset: int, header: dict[str, str], source: Source) -> Record:
    record = header.get("warc-record-id") or str(offset)
    return {
        "id": document_id(source.label, source.relative(uri), record),
        "url": header.get("warc-target-uri"),
        "path": uri,
        "offset": offset,
        "metadata": {"date": header.get("warc-date"), "record": record},
    }
