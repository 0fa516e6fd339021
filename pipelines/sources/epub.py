"""EPUB books (EPUB 2 and 3): the chapters in the order of the spine, XHTML to text.

An EPUB is a zip archive: how much is read of it is bounded, whatever it claims or expands to.
"""

from __future__ import annotations

import posixpath
import re
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree as ET

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.html import HTMLTree

from pipelines import storage
from pipelines.documents import BadRecord
from pipelines.sources.text import decode

_CONTAINER, _ENCRYPTION = "META-INF/container.xml", "META-INF/encryption.xml"
_XHTML = ("application/xhtml+xml", "text/html")
_FONTS = ("http://www.idpf.org/2008/embedding", "http://ns.adobe.com/pdf/enc#RC")
_INDEX_BYTES = 8 << 20  # of the archive's table of contents, and of each XML file
_DAMAGE = (zipfile.BadZipFile, zlib.error, ET.ParseError, NotImplementedError, EOFError, ValueError, OSError)
_DECLARED = re.compile(rb"\s*<\?xml\b[^>]*?\bencoding\s*=\s*[\"']([A-Za-z0-9._-]+)")
# An element that XHTML may write as <title/>; read as HTML, it would swallow all that follows.
_SELF_CLOSED = re.compile(
    r"<((?!(?:br|hr|img|meta|link|input|col|area|base|wbr|embed|source)\b)[a-z][\w:-]*)([^<>]*)/>", re.I
)


class _RefusedError(Exception):
    """Why a book is set aside: a countable reason and its detail."""


def read_epub(uri: str, limit: int) -> tuple[str, dict[str, Any]] | BadRecord:
    """Text and facts (title, author, language) of a book; a BadRecord when it is damaged, encrypted or too long."""
    with storage.open_input(uri) as file:
        try:
            _check_index(file)
            with zipfile.ZipFile(file) as archive:
                return _book(archive, limit)
        except _RefusedError as refused:
            return BadRecord(uri, 0, *refused.args)
        except KeyError as error:
            return BadRecord(uri, 0, "book: damaged epub", str(error.args[0]))
        except _DAMAGE as error:
            if storage.failed(error):
                raise
            return BadRecord(uri, 0, "book: damaged epub", f"{type(error).__name__}: {error}")


def _check_index(file: Any) -> None:
    """Refuse an archive whose table of contents is too long to be read into memory."""
    size = file.size()
    file.seek(max(0, size - 65_557))
    tail = file.read(65_557)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0:
        raise _RefusedError("book: damaged epub", "not a zip archive")
    if int.from_bytes(tail[at + 12 : at + 16], "little") > _INDEX_BYTES:
        raise _RefusedError("book: too long", f"its table of contents has more than {_INDEX_BYTES} bytes")
    file.seek(0)


def _book(archive: zipfile.ZipFile, limit: int) -> tuple[str, dict[str, Any]]:
    root = _xml(archive, _CONTAINER).find(".//{*}rootfile")
    if root is None or not root.get("full-path"):
        raise _RefusedError("book: damaged epub", f"{_CONTAINER} names no package")
    package_path = root.get("full-path")
    package = _xml(archive, package_path)
    chapters = list(_chapters(package, posixpath.dirname(package_path)))
    encrypted = _encrypted(archive)
    texts, left = [], limit
    for name in chapters:
        if name in encrypted:
            raise _RefusedError("book: encrypted epub", name)
        page = _entry(archive, name, left)
        left -= len(page)
        texts.append(_text(page))
    facts = {
        key: " ".join(found.text.split())[:500]
        for key, element in (("title", "title"), ("author", "creator"), ("language", "language"))
        if (found := package.find(f".//{{http://purl.org/dc/elements/1.1/}}{element}")) is not None and found.text
    }
    return "\n\n".join(filter(None, texts)) + "\n" if any(texts) else "", facts


def _chapters(package: ET.Element, folder: str) -> Iterator[str]:
    """Names in the archive of the pages of text, in reading order, without the table of contents."""
    items = {item.get("id"): item for item in package.iterfind(".//{*}manifest/{*}item")}
    for reference in package.iterfind(".//{*}spine/{*}itemref"):
        item = items.get(reference.get("idref"))
        if item is None:
            raise _RefusedError("book: damaged epub", f"the spine names {reference.get('idref')}, which is not there")
        if item.get("media-type") in _XHTML and "nav" not in (item.get("properties") or "").split():
            yield posixpath.normpath(posixpath.join(folder, unquote(item.get("href") or "")))


def _encrypted(archive: zipfile.ZipFile) -> set[str]:
    """What the archive says is encrypted; fonts that are only obfuscated are none of it."""
    if _ENCRYPTION not in archive.namelist():
        return set()
    names = set()
    for data in _xml(archive, _ENCRYPTION).iterfind(".//{*}EncryptedData"):
        method, place = data.find("{*}EncryptionMethod"), data.find(".//{*}CipherReference")
        if place is not None and (method is None or method.get("Algorithm") not in _FONTS):
            names.add(posixpath.normpath(unquote(place.get("URI") or "")))
    return names


def _xml(archive: zipfile.ZipFile, name: str) -> ET.Element:
    # Python's expat refuses entities that expand without end.
    return ET.fromstring(_entry(archive, name, _INDEX_BYTES))  # noqa: S314


def _entry(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    if archive.getinfo(name).flag_bits & 1:
        raise _RefusedError("book: encrypted epub", name)
    with archive.open(name) as file:
        data = file.read(limit + 1)
        if len(data) > limit:
            raise _RefusedError("book: too long", f"{name} has more than the {limit} bytes that are left to it")
        file.read(1)  # the end, where the checksum is compared
    return data


def _text(page: bytes) -> str:
    declared = _DECLARED.match(page)
    try:
        html = page.decode(declared[1].decode() if declared else "utf-8-sig")
    except (UnicodeDecodeError, LookupError):
        found = decode(page)
        if isinstance(found, str):
            raise _RefusedError("book: not text", found) from None
        html = found.text
    tree = HTMLTree.parse(_SELF_CLOSED.sub(r"<\1\2></\1>", html))
    return extract_plain_text(tree, main_content=False, alt_texts=False, list_bullets=False).strip()
