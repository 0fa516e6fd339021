"""Text out of bytes of unknown charset, and what is no text at all."""

from __future__ import annotations

import codecs
import re
from typing import NamedTuple

from resiliparse.parse.encoding import detect_encoding

from pipelines import storage
from pipelines.documents import BadRecord

_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f-\x84\x86-\x9f]")
_AS_WINDOWS = ("utf-8", "ascii", "iso8859-1")  # what it cannot be, and what it means on the web (WHATWG)
_WIDE = re.compile("[^\x00-\x7f\ufffd]")
_SAMPLE = 1 << 16
_MAX_CONTROLS = 0.01  # share of a text's characters
_MAX_LOST = 0.001  # bytes that a charset does not know, as a share of the text's characters


class Text(NamedTuple):
    """A text, the charset that it was in, and how many stretches of bytes that charset did not know (now U+FFFD)."""

    text: str
    charset: str
    lost: int

    @property
    def facts(self) -> dict[str, str | int]:
        """What of this is worth noting in a document's metadata."""
        noted = {} if self.charset == "utf-8" else {"charset": self.charset}
        return noted | ({"lost": self.lost} if self.lost else {})


def decode(data: bytes) -> Text | str:
    """The text that bytes spell, or why they are none.

    The charset is told by a byte order mark, else it is UTF-8 where the bytes are that but for a few, else it is
    detected. Bytes with many control characters in every reading, such as pictures, are no text.
    """
    for mark, name in _BOMS:
        if data.startswith(mark):
            return _judged(data[len(mark) :], name)
    if b"\0" in data and (wide := _wide(data)):
        return _judged(data, wide)
    try:
        return _checked(Text(data.decode(), "utf-8", 0))
    except UnicodeDecodeError:
        text = data.decode(errors="replace")
    lost = text.count("\ufffd")
    # A damaged text in UTF-8 still has far more sound sequences of several bytes than broken ones.
    if len(_WIDE.findall(text)) > 10 * lost:
        return _checked(Text(text, "utf-8", lost))
    name = detect_encoding(data, html5_compatible=False) or "windows-1252"
    try:
        name = codecs.lookup(name).name
    except LookupError:  # a charset that Python does not have
        name = "cp1252"
    return _judged(data, "cp1252" if name in _AS_WINDOWS else name)


def _judged(data: bytes, charset: str) -> Text | str:
    text = data.decode(charset, errors="replace")
    lost = text.count("\ufffd")
    if lost > _MAX_LOST * len(text):
        return f"{lost} of {len(text)} characters are not in the charset {charset}, which it looks most like"
    return _checked(Text(text, charset, lost))


def _checked(text: Text) -> Text | str:
    controls = len(_CONTROLS.findall(text.text))
    if controls > _MAX_CONTROLS * len(text.text):
        return f"{controls} of {len(text.text)} characters are control characters"
    return text


def _wide(data: bytes) -> str | None:
    """UTF-16 without a byte order mark, told by the zeros that letters of Western scripts have in it."""
    sample = data[: _SAMPLE & ~1]
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    half = len(sample) // 2
    if half and max(even, odd) > 0.3 * half and min(even, odd) < 0.05 * half:
        return "utf-16-le" if odd > even else "utf-16-be"
    return None


def whole_file(uri: str, limit: int, kind: str) -> bytes | BadRecord:
    """A file, plain or compressed, as a whole; what is damaged or too long is a BadRecord of ``kind``."""
    from pipelines.sources.compressed import Damage, pieces

    data = bytearray()
    with storage.open_input(uri) as file:
        for piece in pieces(file, lambda start: True):
            if isinstance(piece, Damage):
                return BadRecord(uri, piece.offset, f"{kind}: damaged compression", piece.detail)
            data += piece.data
            if len(data) > limit:
                return BadRecord(uri, 0, f"{kind}: too long", f"more than {limit} bytes")
    return bytes(data)
