"""HTML to text: the main content of a page by resiliparse, decoded as a browser would (WHATWG, encoding sniffing)."""

from __future__ import annotations

import codecs
import re

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5
from resiliparse.parse.html import HTMLTree

_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_HEADER_CHARSET = re.compile(r"charset\s*=\s*[\"']?([^\s\"';,]+)", re.IGNORECASE)
_META_CHARSET = re.compile(rb"<meta\b[^>]{0,300}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_.:-]+)", re.IGNORECASE)
# Control characters other than tab and newline carry nothing in a page and upset later readers.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")
_NESTED = re.compile(r"<(/?)(?:div|article)\b", re.IGNORECASE)
_BLANK_LINES = re.compile(r"\n[ \t]*(?:\n[ \t]*)+")

MAX_DEPTH = 4000
"""Nested elements of a page; resiliparse takes time with the square of them, some 0.2 s for this many."""


def extract_text(html: bytes, content_type: str | None = None) -> str:
    """The main content of an HTML page as text; paragraphs are parted by blank lines.

    Navigation, headers, footers, forms, scripts and hidden elements are left out. Damaged markup is read as a browser
    reads it; bytes that the charset does not know become U+FFFD.

    Args:
        html: the page as it came.
        content_type: the HTTP header of that name, for its charset.

    Returns:
        The text, empty when the page has none.

    Raises:
        ValueError: elements are nested so deeply that the search for the main content would not end.
    """
    page = bytes_to_str(html, charset(html, content_type), errors="replace", fallback_encodings=())
    if (depth := _depth(page)) > MAX_DEPTH:
        raise ValueError(f"elements are nested {depth} deep, more than {MAX_DEPTH}")
    text = extract_plain_text(HTMLTree.parse(page), main_content=True, alt_texts=False)
    text = _CONTROLS.sub("", text.replace("\r\n", "\n").replace("\r", "\n").replace("\xa0", " "))
    return _BLANK_LINES.sub("\n\n", text).strip()


def _depth(page: str) -> int:
    """How deep the elements are nested that the search for the main content looks into, by their tags."""
    depth = deepest = 0
    for tag in _NESTED.finditer(page):
        depth = max(depth - 1, 0) if tag[1] else depth + 1
        deepest = max(deepest, depth)
    return deepest


def charset(html: bytes, content_type: str | None = None) -> str:
    """The charset of a page: its byte order mark, else the HTTP header, else its meta element, else by its bytes."""
    for bom, name in _BOMS:
        if html.startswith(bom):
            return name
    declared = _HEADER_CHARSET.search(content_type or "")
    if declared and (name := map_encoding_to_html5(declared[1], fallback_utf8=False)):
        return name
    meta = _META_CHARSET.search(html, 0, 4096)
    if meta and (name := map_encoding_to_html5(meta[1].decode("ascii"), fallback_utf8=False)):
        # A meta element that could be read as ASCII cannot be in UTF-16 (WHATWG, 13.2.3.2).
        return "utf-8" if name.startswith("utf-16") else name
    return detect_encoding(html) or "utf-8"
