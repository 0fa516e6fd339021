"""Where documents come from: Common Crawl archives, JSON Lines, Parquet, books and code.

Every reader streams: it holds one record at a time, however large the file. What it cannot read becomes a BadRecord
with file and offset, and the rest of the file is still read.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from pipelines import storage
from pipelines.documents import BadRecord, InputError

Record = dict[str, Any]
"""A document: the keys of documents.SCHEMA that are known (metadata as a dict) and ``offset``, where the record starts
in its file. Records of a WARC have ``html`` (bytes) and ``content_type`` in place of ``text``."""

_UNIT_BYTES = 32 << 20
_SUFFIXES = {
    "warc": (".warc",),
    "wet": (".wet",),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
    "books": (".txt", ".text"),
}
_COMPRESSED = (".gz", ".zst")
_SCALARS = (str, int, float, bool)
_METADATA_CHARACTERS = 2000


@dataclass
class Source:
    """Files of one kind to read documents from."""

    kind: Literal["warc", "wet", "jsonl", "parquet", "books", "code"]
    """What the files are: web archives with HTML, web archives with extracted text, JSON Lines (plain, gzip or zstd),
    Parquet, plain-text books (one a file), or a tree of source code."""
    path: str
    """A file, a folder, or a glob; local, s3:// or gs://. In a folder, the files of that kind are taken by their
    extension; a file or a glob is taken as it is."""
    name: str = ""
    """Name that the documents carry as their source; by default the kind."""
    text_field: str = "text"
    """Field or column that holds the text, for jsonl and parquet."""
    max_record_bytes: int = 32_000_000
    """Longer records (pages, lines, books, source files) are set aside, so that memory stays bounded."""
    rules: list[str] | None = None
    """Rule sets of the filter stage for this source, in order; null takes those for its kind."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Thresholds that differ for this source, by dotted name, such as `{gopher_quality.max_words: 1000000}`."""
    weight: float = 1.0
    """How often its documents appear in the mix, see mix."""

    @property
    def label(self) -> str:
        """The name that documents carry as their source."""
        return self.name or self.kind

    def validate(self) -> None:
        """Raises ValueError for a source that names nothing."""
        if not self.path:
            raise ValueError(f"path of the source {self.label} is empty, must be a file, a folder or a glob")
        if self.max_record_bytes < 1:
            raise ValueError(f"max_record_bytes is {self.max_record_bytes}, must be at least 1")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight is {self.weight}, must be above 0")

    def relative(self, uri: str) -> str:
        """The part of a file's URI that does not change when the whole source is moved."""
        root = storage.absolute(self.path)
        if any(c in root for c in "*?["):
            root = root[: min(root.index(c) for c in "*?[" if c in root)].rpartition("/")[0]
        return uri[len(root) + 1 :] if uri.startswith(root + "/") else storage.file_name(uri)


@dataclass(frozen=True)
class Unit:
    """What one task reads.

    Attributes:
        name: unique among the units that were discovered together.
        source: what the files are.
        files: their URIs, in order.
        bytes: their size as stored.
        changed: when the newest of them was last changed (Unix seconds, 0 when unknown).
    """

    name: str
    source: Source
    files: list[str]
    bytes: int
    changed: float = 0.0


def discover(sources: list[Source]) -> list[Unit]:
    """Units of work, the same for the same files: one a file, or some 32 MB of small files for books and code.

    Raises:
        FileNotFoundError: a source has no files; the message names its path.
        ValueError: two files would give their documents the same ids, since sources of one name overlap or hold files
            of one name.
    """
    units: list[Unit] = []
    numbers: dict[str, int] = {}
    taken: dict[tuple[str, str], str] = {}
    for source in sources:
        files = _files(source)
        if not files:
            raise FileNotFoundError(f"{source.path}: holds no {source.kind} files")
        for file in files:
            key = source.label, source.relative(file.uri)
            if key in taken:
                raise InputError(
                    f"sources: {taken[key]} and {file.uri} would give their documents the same ids under the name "
                    f"{source.label}; give each source a name of its own, or one path that holds both"
                )
            taken[key] = file.uri
        for group in _groups(files, _UNIT_BYTES if source.kind in ("books", "code") else 0):
            number = numbers[source.label] = numbers.get(source.label, -1) + 1
            size = sum(file.size for file in group)
            changed = max(file.mtime for file in group)
            units.append(Unit(f"{source.label}-{number:05d}", source, [file.uri for file in group], size, changed))
    return units


def _files(source: Source) -> list[storage.FileInfo]:
    if source.kind == "code":
        from pipelines.sources import code

        return code.list_code(source)
    files = storage.list_files(source.path)
    single = any(c in source.path for c in "*?[") or (len(files) == 1 and files[0].uri == storage.absolute(source.path))
    if single:
        return files
    return [file for file in files if _stem(file.uri).endswith(_SUFFIXES[source.kind])]


def _stem(uri: str) -> str:
    """A URI in lower case without the extension of its compression."""
    lower = uri.lower()
    return lower.rpartition(".")[0] if lower.endswith(_COMPRESSED) else lower


def _groups(files: list[storage.FileInfo], size: int) -> Iterator[list[storage.FileInfo]]:
    group: list[storage.FileInfo] = []
    total = 0
    for file in files:
        if group and total + file.size > size:
            yield group
            group, total = [], 0
        group.append(file)
        total += file.size
    if group:
        yield group


def read(unit: Unit) -> Iterator[Record | BadRecord]:
    """The documents of a unit in order, and what could not be read.

    A file of no bytes, or in which nothing is found, is itself a BadRecord. An error of the storage (a lost
    connection, a missing right) is raised: it says nothing about the file.
    """
    reader = importlib.import_module(
        {"warc": "pipelines.sources.warc", "wet": "pipelines.sources.warc"}.get(
            unit.source.kind, f"pipelines.sources.{unit.source.kind}"
        )
    )
    for uri in unit.files:
        found = False
        for record in reader.read(uri, unit.source):
            found = True
            if not isinstance(record, BadRecord):
                record["source"] = unit.source.label
            yield record
        if not found:
            with storage.open_input(uri) as file:
                reason = "no records" if file.size() else "empty file"
            yield BadRecord(uri, 0, reason, f"no {unit.source.kind} record in it")


def clean(text: str) -> str:
    """A text that can be stored as UTF-8: lone surrogates, which JSON can spell, become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def scalars(fields: dict[str, Any], leave_out: tuple[str, ...]) -> dict[str, Any]:
    """Fields worth keeping as metadata: numbers, truth values and strings of up to some thousand characters."""
    return {
        key: value
        for key, value in fields.items()
        if key not in leave_out
        and isinstance(value, _SCALARS)
        and not (isinstance(value, str) and len(value) > _METADATA_CHARACTERS)
    }


def whole_text(uri: str, limit: int, kind: str) -> str | BadRecord:
    """A text file, plain or compressed, as one string; what is not UTF-8, damaged or too long is a BadRecord."""
    from pipelines.sources.compressed import Damage, pieces

    data = bytearray()
    with storage.open_input(uri) as file:
        for piece in pieces(file, lambda start: True):
            if isinstance(piece, Damage):
                return BadRecord(uri, piece.offset, f"{kind}: damaged compression", piece.detail)
            data += piece.data
            if len(data) > limit:
                return BadRecord(uri, 0, f"{kind}: too long", f"more than {limit} bytes")
    try:
        return bytes(data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return BadRecord(uri, error.start, f"{kind}: bad UTF-8", str(error))


def title(uri: str) -> str:
    """A file's name without its extensions."""
    return os.path.splitext(storage.file_name(_stem_keeping_case(uri)))[0]


def _stem_keeping_case(uri: str) -> str:
    return uri[: len(_stem(uri))]
