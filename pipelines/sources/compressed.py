"""Bytes out of plain, gzip and zstd files, in pieces, going on behind damage.

A compressed file may consist of several members (gzip) or frames (zstd), as every ``.warc.gz`` does with one a record.
When one cannot be decompressed, reading goes on at the next place that decompresses to something plausible. A file of
zstd frames may begin with the dictionary that they need, as ``.warc.zst`` does (IIPC, "Zstandard compression for WARC
files", version 0.1).
"""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

import zstandard

GZIP, ZSTD = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"

_DICTIONARY = b"\x5d\x2a\x4d\x18"  # a frame that decoders skip, here with a dictionary in it
_DICTIONARY_BYTES = 16 << 20

_PIECE = 1 << 18  # compressed bytes read at a time
_STEP = 1 << 20  # decompressed bytes given on at a time: a small file may expand a thousandfold
# A damaged member is noticed only after its damage, and may by then have swallowed the start of the next one; larger
# members are searched again from this far before the place where it was noticed.
_LOOK_BACK = 1 << 20
_BITE = 256  # bytes that a zstd decoder gets at a time: it cannot bound what it gives, and a few may be 128 KB
_PROBE = 512  # decompressed bytes that a place to go on at is judged by


class Piece(NamedTuple):
    """Decompressed bytes.

    Attributes:
        data: the bytes.
        member: offset in the stored file at which their member starts; 0 for a plain file.
        starts: whether they are the first of the member.
        ends: whether the member ends, intact, behind them.
    """

    data: bytes
    member: int
    starts: bool
    ends: bool


class Damage(NamedTuple):
    """A stretch that could not be decompressed.

    Attributes:
        offset: where the damaged member starts in the stored file.
        detail: what is wrong with it.
    """

    offset: int
    detail: str


def is_compressed(start: bytes) -> bool:
    """Whether a file that starts with these (at least four) bytes is gzip or zstd."""
    return start.startswith((GZIP, ZSTD)) or _skippable(start)


def pieces(file: BinaryIO, plausible: Callable[[bytes], bool], start: int = 0) -> Iterator[Piece | Damage]:
    """Decompressed content of a file in order, in pieces of bounded size; the format is told by the first bytes.

    Args:
        file: opened for reading in bytes, with random access.
        plausible: whether the first decompressed bytes of a member may be what they should be; asked only when looking
            for a place to go on behind damage.
        start: offset to read from, for plain files only.
    """
    file.seek(0)
    head = file.read(4)
    file.seek(start)
    if head.startswith(GZIP):
        yield from _Members(file, GZIP, _Gzip, plausible).read()
    elif head == ZSTD or _skippable(head):
        try:
            dictionary = _dictionary(file)
        except (ValueError, zstandard.ZstdError) as error:
            yield Damage(0, f"the dictionary at its start is damaged: {error}")
            dictionary = None
        file.seek(0)
        yield from _Members(file, ZSTD, functools.partial(_Zstd, dictionary), plausible).read()
    else:
        first = True
        while data := file.read(_STEP):
            yield Piece(data, 0, first, False)
            first = False


def _skippable(start: bytes) -> bool:
    return len(start) >= 4 and start[1:4] == _DICTIONARY[1:] and 0x50 <= start[0] <= 0x5F


def _dictionary(file: BinaryIO) -> zstandard.ZstdCompressionDict | None:
    """The dictionary at the start of a file, which may itself be compressed."""
    head = file.read(8)
    if not head.startswith(_DICTIONARY):
        return None
    size = int.from_bytes(head[4:8], "little")
    if size > _DICTIONARY_BYTES:
        raise ValueError(f"it claims {size} bytes")
    data = file.read(size)
    if data.startswith(ZSTD):
        data = zstandard.ZstdDecompressor().stream_reader(data).read(_DICTIONARY_BYTES)
    return zstandard.ZstdCompressionDict(data)


class _Gzip:
    """One gzip member; checks its length and CRC at its end."""

    def __init__(self) -> None:
        self.stream = zlib.decompressobj(wbits=31)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What ``data`` decompresses to, up to the very place of an error."""
        while data and not self.stream.eof:
            before = self.stream.copy()
            try:
                out = self.stream.decompress(data, _STEP)
            except zlib.error:
                if len(data) == 1:
                    raise
                # The call that fails gives nothing: go back and halve it until all before the error is out.
                self.stream = before
                half = len(data) // 2
                yield from self.feed(data[:half])
                data = data[half:]
                continue
            if out:
                yield out
            data = self.stream.unconsumed_tail

    @property
    def ended(self) -> bool:
        return self.stream.eof

    @property
    def left(self) -> bytes:
        """What was fed beyond the end of the member."""
        return self.stream.unused_data


class _Zstd:
    """One zstd frame; checks its checksum, if it has one, at its end."""

    def __init__(self, dictionary: zstandard.ZstdCompressionDict | None) -> None:
        self.stream = zstandard.ZstdDecompressor(dictionary, max_window_size=1 << 27).decompressobj()
        self.fed = 0  # bytes that raised no error
        self.rest = b""

    def feed(self, data: bytes, bite: int = _BITE) -> Iterator[bytes]:
        """What ``data`` decompresses to, ``bite`` bytes at a time."""
        for at in range(0, len(data), bite):
            if self.stream.eof:
                self.rest = data[at:]
                return
            out = self.stream.decompress(data[at : at + bite])
            self.fed += len(data[at : at + bite])
            if out:
                yield out

    @property
    def ended(self) -> bool:
        return self.stream.eof

    @property
    def left(self) -> bytes:
        """What was fed beyond the end of the frame."""
        return self.stream.unused_data + self.rest


_ERRORS = (zlib.error, zstandard.ZstdError)


class _Members:
    """Walks through the members of one file. ``at`` is the offset in the file of the first byte of ``buffer``."""

    def __init__(
        self, file: BinaryIO, magic: bytes, decoder: Callable[[], _Gzip | _Zstd], plausible: Callable[[bytes], bool]
    ) -> None:
        self.file, self.magic, self.decoder, self.plausible = file, magic, decoder, plausible
        self.at, self.buffer = 0, b""

    def read(self) -> Iterator[Piece | Damage]:
        while self._fill(8):
            if self.magic == ZSTD and _skippable(self.buffer[:4]):
                self._go(self.at + 8 + int.from_bytes(self.buffer[4:8], "little"))
                continue
            if not self.buffer.startswith(self.magic):
                start = self.at
                if self._only_zeros():
                    return  # padding behind the last member is allowed
                self._go(start)
                yield Damage(start, "no compressed data where the next member should start")
                self._search(start + 1)
                continue
            start, noticed = self.at, None
            try:
                yield from self._member(start)
            except _ERRORS as error:
                noticed = (self.at, str(error))
            except EOFError:
                noticed = (self.at, "the file ends before the compressed data does")
            if noticed:
                yield Damage(start, noticed[1])
                self._search(max(start + 1, noticed[0] - _LOOK_BACK))

    def _member(self, start: int) -> Iterator[Piece]:
        stream = self.decoder()
        held, first = b"", True
        try:
            while not stream.ended:
                for out in stream.feed(self._take()):
                    if held:
                        yield Piece(held, start, first, False)
                        first = False
                    held = out
        except (EOFError, *_ERRORS) as error:
            if held:
                yield Piece(held, start, first, False)
                first = False
            if isinstance(error, zstandard.ZstdError):
                for out in self._last_before_damage(start, stream.fed):
                    yield Piece(out, start, first, False)
                    first = False
            raise
        self.buffer = stream.left + self.buffer
        self.at -= len(stream.left)
        yield Piece(held, start, first, True)

    def _last_before_damage(self, start: int, sound: int) -> Iterator[bytes]:
        """What a zstd frame gives between its ``sound`` first bytes and its damage, which the call that failed kept."""
        here = self.at
        self._go(start)
        stream = self.decoder()
        while stream.fed < sound:
            data = self._take()
            extra = max(0, stream.fed + len(data) - sound)
            for _ in stream.feed(data[: len(data) - extra]):
                pass  # given before
            if extra:
                self._go(self.at - extra)
        with contextlib.suppress(EOFError, *_ERRORS):
            yield from stream.feed(self._take()[:_BITE], bite=1)
        self._go(here)

    def _take(self) -> bytes:
        """What is in the buffer or, when it is empty, the next bytes of the file."""
        if not self.buffer and not self._fill(1):
            raise EOFError
        data, self.buffer = self.buffer, b""
        self.at += len(data)
        return data

    def _fill(self, size: int) -> bool:
        """Read on until the buffer holds ``size`` bytes or the file ends; whether it holds any."""
        while len(self.buffer) < size:
            more = self.file.read(_PIECE)
            if not more:
                break
            self.buffer += more
        return bool(self.buffer)

    def _go(self, offset: int) -> None:
        self.file.seek(offset)
        self.at, self.buffer = offset, b""

    def _only_zeros(self) -> bool:
        while self._fill(1):
            if self.buffer.strip(b"\0"):
                return False
            self.at, self.buffer = self.at + len(self.buffer), b""
        return True

    def _search(self, offset: int) -> None:
        """Go to the next place from ``offset`` on where a plausible member starts, or to the end of the file."""
        self._go(offset)
        while self._fill(len(self.magic)) and len(self.buffer) >= len(self.magic):
            found = self.buffer.find(self.magic)
            if found < 0:
                keep = len(self.magic) - 1
                self.at += len(self.buffer) - keep
                self.buffer = self.buffer[-keep:]
                if not self._fill(len(self.magic)) or len(self.buffer) < len(self.magic):
                    break
                continue
            self.at, self.buffer = self.at + found, self.buffer[found:]
            place = self.at
            if self._plausible_here():
                self._go(place)
                return
            self._go(place + 1)
        self.at, self.buffer = self.at + len(self.buffer), b""

    def _plausible_here(self) -> bool:
        start = b""
        try:
            for piece in self._member(self.at):
                start += piece.data[:_PROBE]
                if len(start) >= _PROBE:
                    break
        except EOFError:
            pass  # the last member is cut short, and is to be reported as such
        except _ERRORS:
            return False
        return self.plausible(start[:_PROBE])
