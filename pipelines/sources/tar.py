"""Tar archives, plain or compressed, as a stream: one file of bounded size is held at a time.

Behind a damaged header, and behind compressed data that could not be read, reading goes on at the next sound header.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

from pipelines import storage
from pipelines.documents import BadRecord
from pipelines.sources.compressed import Damage, is_compressed, pieces

_BLOCK = tarfile.BLOCKSIZE
_MAGIC, _MAGIC_AT = b"ustar", 257
_NAME_BYTES = 1 << 20  # of an extended header


class Member(NamedTuple):
    """A file in an archive.

    Attributes:
        name: its path there.
        position: of its header in the archive as it is when not compressed.
        offset: of its header in the file, or of the compressed member that it lies in.
        data: its content.
    """

    name: str
    position: int
    offset: int
    data: bytes


def members(uri: str, limit: int, wanted: Callable[[str], bool]) -> Iterator[Member | BadRecord]:
    """The regular files whose name is wanted; longer ones than ``limit`` and what is damaged are BadRecords."""
    with storage.open_input(uri) as file:
        compressed = is_compressed(file.read(4))
        reader = _Reader(uri, limit, wanted, compressed)
        for piece in pieces(file, lambda start: True):
            if isinstance(piece, Damage):
                yield BadRecord(uri, piece.offset, "tar: damaged compression", piece.detail)
                reader.lost()
            else:
                reader.member = piece.member
                yield from reader.feed(piece.data)
        yield from reader.feed(b"", last=True)


class _Reader:
    """Cuts a stream of bytes into members."""

    def __init__(self, uri: str, limit: int, wanted: Callable[[str], bool], compressed: bool) -> None:
        self.uri, self.limit, self.wanted, self.compressed = uri, limit, wanted, compressed
        self.buffer = bytearray()
        self.position = 0  # of the first byte of the buffer
        self.member = 0  # offset of the compressed member that is being read
        self.skip = 0  # bytes of content still to be passed over
        self.searching = False
        self.ended = False  # whether the last that was read is the mark of an archive's end
        self.extended: dict[str, str] = {}  # what an extended header said of the next file

    def lost(self) -> None:
        """Begin anew behind a gap of unknown length."""
        self.buffer.clear()
        self.skip, self.searching, self.ended, self.extended = 0, True, True, {}

    def feed(self, data: bytes, last: bool = False) -> Iterator[Member | BadRecord]:
        """Files that are complete once ``data`` is there; ``last`` says that nothing follows."""
        self.buffer += data
        while self.buffer:
            if self.skip:
                gone = min(self.skip, len(self.buffer))
                self.skip -= gone
                self._drop(gone)
                continue
            if self.searching and not self._search():
                if last:
                    self.buffer.clear()
                    continue
                return
            if len(self.buffer) < _BLOCK:
                if last:
                    self.buffer.clear()
                break
            if not any(self.buffer[:_BLOCK]):
                self._drop(_BLOCK)  # the archive's end, behind which another may follow
                self.ended = True
                continue
            self.ended = False
            info = _header(self.buffer)
            if info is None:
                yield self._bad("tar: broken header", f"starts with {bytes(self.buffer[:40])!r}")
                self._drop(_BLOCK)
                self.searching, self.extended = True, {}
                continue
            padded = -(-self._size(info) // _BLOCK) * _BLOCK
            whole = _BLOCK + self._size(info)
            if not self._held(info):
                if info.isreg() and self._name(info) and self.wanted(self._name(info)) and self._size(info):
                    yield self._bad("tar: too long", f"{self._name(info)}: {self._size(info)} bytes")
                self.extended = {}
                self._drop(_BLOCK)
                self.skip = padded
                continue
            if len(self.buffer) < whole:
                if not last:
                    return
                yield self._bad("tar: cut short", f"{self._name(info)}: {whole - len(self.buffer)} bytes are missing")
                self.ended = True  # which is said herewith
                # Its size may have been what is wrong: the next header may lie within what was taken for content.
                self._drop(_BLOCK)
                self.searching, self.extended = True, {}
                continue
            yield from self._take(info, bytes(self.buffer[_BLOCK:whole]))
            self._drop(_BLOCK)
            self.skip = padded
        if last and not self.ended:
            yield self._bad("tar: cut short", "the archive does not end with its mark")

    def _take(self, info: tarfile.TarInfo, content: bytes) -> Iterator[Member]:
        if info.type == tarfile.GNUTYPE_LONGNAME:
            self.extended["path"] = content.rstrip(b"\0").decode("utf-8", "replace")
        elif info.type == tarfile.XHDTYPE:
            self.extended |= _pax(content)
        else:
            yield Member(self._name(info), self.position, self._offset(), content)
            self.extended = {}

    def _held(self, info: tarfile.TarInfo) -> bool:
        """Whether the content is to be looked at, rather than passed over."""
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            return info.size <= _NAME_BYTES
        return info.isreg() and not info.issparse() and self._size(info) <= self.limit and self.wanted(self._name(info))

    def _name(self, info: tarfile.TarInfo) -> str:
        return self.extended.get("path") or info.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    def _size(self, info: tarfile.TarInfo) -> int:
        stated = self.extended.get("size", "")
        if info.type in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE):
            return 0
        return int(stated) if info.isreg() and stated.isdigit() else max(0, info.size)

    def _search(self) -> bool:
        """Go to the next sound header in the buffer, or to where one may still begin; whether there is one."""
        at = self.buffer.find(_MAGIC, _MAGIC_AT)
        while at >= 0:
            start = at - _MAGIC_AT
            if start + _BLOCK > len(self.buffer):
                self._drop(start)
                return True
            if _header(self.buffer[start : start + _BLOCK]) is not None:
                self._drop(start)
                self.searching = False
                return True
            at = self.buffer.find(_MAGIC, at + 1)
        self._drop(max(0, len(self.buffer) - _BLOCK))
        return False

    def _offset(self) -> int:
        return self.member if self.compressed else self.position

    def _bad(self, reason: str, detail: str) -> BadRecord:
        where = f"; {self.position} bytes into the decompressed archive" if self.compressed else ""
        return BadRecord(self.uri, self._offset(), reason, detail + where)

    def _drop(self, count: int) -> None:
        del self.buffer[:count]
        self.position += count


def _header(block: bytes | bytearray) -> tarfile.TarInfo | None:
    """The header in a block, None when its checksum or its numbers are wrong."""
    try:
        return tarfile.TarInfo.frombuf(bytes(block[:_BLOCK]), "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return None


def _pax(content: bytes) -> dict[str, str]:
    """Path and size out of an extended header: lines such as ``30 path=src/main.c``."""
    out, at = {}, 0
    while at < len(content):
        size, space, _ = content[at : at + 20].partition(b" ")
        if not space or not size.isdigit() or int(size) <= len(size) + 1:
            break
        key, _, value = content[at + len(size) + 1 : at + int(size) - 1].partition(b"=")
        if key in (b"path", b"size"):
            out[key.decode()] = value.decode("utf-8", "replace")
        at += int(size)
    return out
