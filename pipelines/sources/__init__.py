"""Where documents come from: Common Crawl archives, JSON Lines, Parquet, books and code.

Every reader streams: it holds one record at a time, however large the file. What it cannot read becomes a BadRecord
with file and offset, and the rest of the file is still read.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from types import ModuleType
from typing import Any, Literal

from pipelines import storage
from pipelines.documents import BadRecord, InputError

Record = dict[str, Any]
"""A document: the keys of documents.SCHEMA that are known (metadata as a dict) and ``offset``, where the record starts
in its file. Records of a WARC have ``html`` (bytes) and ``content_type`` in place of ``text``."""

_UNIT_BYTES = 32 << 20  # of small files that are read together
_SPLIT_BYTES = 64 << 20  # of a large file that are read by themselves
_PROBED = 3  # files of a table that are looked at before anything is started
_SUFFIXES = {
    "warc": (".warc",),
    "wet": (".wet",),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
    "books": (".txt", ".text", ".epub"),
}
_COMPRESSED = (".gz", ".zst")
_ONLY_FOR = {"strip_gutenberg": "books"} | dict.fromkeys(
    ("crawl", "archives", "limit", "base", "delay"), "common-crawl"
)  # settings that do nothing for other kinds
ARCHIVES = (".tar", *_SUFFIXES["jsonl"], *_SUFFIXES["parquet"])
"""What code may be packed in."""


@dataclass
class Source:
    """Files of one kind to read documents from."""

    kind: Literal["common-crawl", "warc", "wet", "jsonl", "parquet", "books", "code"]
    """What the files are: archives of Common Crawl by the crawl's name, web archives with HTML, web archives with
    extracted text, JSON Lines, Parquet, books (plain text in any charset or EPUB, one a file), or source code (a tree
    of files, tar archives, or JSON Lines and Parquet with a column for it). All but Parquet may be gzip or zstd."""
    path: str = ""
    """A file, a folder, or a glob; local, s3:// or gs://, or the http(s):// address of a file. In a folder, the files
    of that kind are taken by their extension; a file or a glob is taken as it is. Archives and tables of code have to
    be named, such as `stack/**/*.parquet`: a folder is taken for a tree of source files."""
    name: str = ""
    """Name that the documents carry as their source; by default the kind."""
    crawl: str = ""
    """For common-crawl: the crawl, such as `CC-MAIN-2026-04`."""
    archives: Literal["warc", "wet"] = "warc"
    """For common-crawl: pages as HTML (warc), or the text that Common Crawl extracted (wet)."""
    limit: int | None = None
    """For common-crawl: archives to read, spread evenly over the crawl's listing; null reads all."""
    base: str = "https://data.commoncrawl.org"
    """For common-crawl: where the crawl's listing and archives lie; a URL, s3:// or a folder of the same layout."""
    delay: float = 1.0
    """For common-crawl over http(s): seconds that a task waits before it asks for the next archive."""
    columns: dict[str, str] = field(default_factory=dict)
    """For jsonl, parquet and code in these: where the parts of a document stand, such as
    `{text: content, language: lang, file: max_stars_repo_path}`. Nested fields are named with dots (`meta.url`). By
    default text is in `text` and the address in `url`; `id` takes ids that are unique in the source; `language` and
    `language_score` are taken too, and all other names go to the metadata, as do scalars that are not named here."""
    strip_gutenberg: bool = True
    """For books: take off the header and the licence that Project Gutenberg puts around its texts."""
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

    @property
    def format(self) -> str:
        """The kind of its files: for Common Crawl that of the archives."""
        return self.archives if self.kind == "common-crawl" else self.kind

    @property
    def place(self) -> str:
        """What the source names, for messages."""
        return f"{self.base} {self.crawl}" if self.kind == "common-crawl" else self.path

    def validate(self) -> None:
        """Raises ValueError for a source that names nothing, or something that its kind does not have."""
        if self.kind == "common-crawl":
            if not self.crawl or self.path:
                wrong = "crawl is empty" if not self.crawl else f"path is {self.path!r}"
                raise ValueError(
                    f"{wrong} in the source {self.label}, which takes crawl (such as CC-MAIN-2026-04) and no path"
                )
        elif not self.path:
            raise ValueError(f"path of the source {self.label} is empty, must be a file, a folder or a glob")
        for entry in fields(self):
            kind = _ONLY_FOR.get(entry.name, self.kind)
            if kind != self.kind and getattr(self, entry.name) != entry.default:
                raise ValueError(f"{entry.name} is for sources of the kind {kind}, not for {self.label}")
        if self.columns and self.kind not in ("jsonl", "parquet", "code"):
            raise ValueError(f"columns is {self.columns}, but sources of the kind {self.kind} have none")
        if not all(self.columns.keys()) or not all(self.columns.values()):
            raise ValueError(f"columns is {self.columns}; names in it must not be empty")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}, must be at least 1, or null for all")
        if self.delay < 0:
            raise ValueError(f"delay is {self.delay}, must be at least 0")
        if self.max_record_bytes < 1:
            raise ValueError(f"max_record_bytes is {self.max_record_bytes}, must be at least 1")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight is {self.weight}, must be above 0")

    def relative(self, uri: str) -> str:
        """The part of a file's URI that does not change when the whole source is moved."""
        root = storage.absolute(self.base if self.kind == "common-crawl" else self.path)
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
        bytes: their size as stored, 0 when unknown.
        changed: when the newest of them was last changed (Unix seconds, 0 when unknown).
        start: where in its one file it begins: a byte of JSON Lines, a row group of Parquet.
        end: where it ends, None with the file.
    """

    name: str
    source: Source
    files: list[str]
    bytes: int
    changed: float = 0.0
    start: int = 0
    end: int | None = None


def discover(sources: list[Source]) -> list[Unit]:
    """Units of work, the same for the same files.

    A unit is a file, some 32 MB of small files for books and code, or some 64 MB of a large Parquet file or plain JSON
    Lines file. How a file is cut does not change its documents' ids.

    Raises:
        FileNotFoundError: a source has no files; the message names its path.
        ValueError: two files would give their documents the same ids, since sources of one name overlap or hold files
            of one name; or a table has no column for the text.
    """
    units: list[Unit] = []
    numbers: dict[str, int] = {}
    taken: dict[tuple[str, str], str] = {}

    def add(source: Source, files: list[storage.FileInfo], size: int, start: int = 0, end: int | None = None) -> None:
        number = numbers[source.label] = numbers.get(source.label, -1) + 1
        changed = max(file.mtime for file in files)
        uris = [file.uri for file in files]
        units.append(Unit(f"{source.label}-{number:05d}", source, uris, size, changed, start, end))

    for source in sources:
        files = _files(source)
        if not files:
            hint = (
                "; archives and tables of code are named by a glob, such as **/*.tar" if source.kind == "code" else ""
            )
            raise FileNotFoundError(f"{source.place}: holds no {source.kind} files{hint}")
        for file in files:
            key = source.label, source.relative(file.uri)
            if key in taken:
                raise InputError(
                    f"sources: {taken[key]} and {file.uri} would give their documents the same ids under the name "
                    f"{source.label}; give each source a name of its own, or one path that holds both"
                )
            taken[key] = file.uri
        _check_columns(source, files)
        together = _UNIT_BYTES if source.kind in ("books", "code") else 0
        for group in _groups(files, together):
            reader = _reader(source, group[0].uri)
            if len(group) > 1 or group[0].size < 2 * _SPLIT_BYTES or not hasattr(reader, "ranges"):
                add(source, group, sum(file.size for file in group))
                continue
            cuts = reader.ranges(group[0], _SPLIT_BYTES)
            for start, end in cuts:
                whole = len(cuts) == 1
                add(source, group, group[0].size // len(cuts), start, None if whole else end)
    return units


def _files(source: Source) -> list[storage.FileInfo]:
    if source.kind == "common-crawl":
        from pipelines.sources import common_crawl

        return common_crawl.list_archives(source)
    if source.kind == "code":
        from pipelines.sources import code

        return code.list_code(source)
    files = storage.list_files(source.path)
    single = any(c in source.path for c in "*?[") or (len(files) == 1 and files[0].uri == storage.absolute(source.path))
    if single:
        return files
    return [file for file in files if stem(file.uri).endswith(_SUFFIXES[source.kind])]


def _check_columns(source: Source, files: list[storage.FileInfo]) -> None:
    """Refuse Parquet whose first readable files have no column for the text: the mapping is wrong, not the files."""
    faults = []
    for file in files[:_PROBED]:
        reader = _reader(source, file.uri)
        if not hasattr(reader, "missing_text"):
            return
        opened = reader.open_file(file.uri)
        if isinstance(opened, BadRecord):
            continue
        fault = reader.missing_text(opened.schema_arrow, source)
        if fault is None:
            return
        faults.append(f"{file.uri}: {fault}")
    if faults:
        raise InputError(f"{faults[0]}; say which holds the text, such as columns: {{text: content}}")


def _reader(source: Source, uri: str) -> ModuleType:
    """The module that reads a file of a source; its ``read`` takes the URI and the source."""
    name = {"warc": "warc", "wet": "warc", "common-crawl": "common_crawl"}.get(source.kind, source.kind)
    if source.kind == "code":
        name = next((table for table in ("jsonl", "parquet") if stem(uri).endswith(_SUFFIXES[table])), "code")
    return importlib.import_module(f"pipelines.sources.{name}")


def stem(uri: str) -> str:
    """A URI in lower case without the extension of its compression."""
    lower = uri.lower()
    for short in (".tgz", ".tzst"):
        if lower.endswith(short):
            return lower.removesuffix(short) + ".tar"
    return lower.rpartition(".")[0] if lower.endswith(_COMPRESSED) else lower


def _groups(files: list[storage.FileInfo], size: int) -> Iterator[list[storage.FileInfo]]:
    """Files in groups of at most ``size`` bytes, or each by itself when that is 0."""
    group: list[storage.FileInfo] = []
    total = 0
    for file in files:
        if group and (not size or total + file.size > size):
            yield group
            group, total = [], 0
        group.append(file)
        total += file.size
    if group:
        yield group


def read(unit: Unit) -> Iterator[Record | BadRecord]:
    """The documents of a unit in order, and what could not be read.

    A file of no bytes, or in which nothing is found, is itself a BadRecord, and so is one whose name is not UTF-8. An
    error of the storage (a lost connection, a missing right) is raised: it says nothing about the file.
    """
    source = unit.source
    part = {} if unit.end is None else {"start": unit.start, "end": unit.end}
    for uri in unit.files:
        if not _is_utf8(uri):
            shown = os.fsencode(uri).decode("utf-8", "replace")
            yield BadRecord(shown, 0, "file name: not UTF-8", repr(os.fsencode(storage.file_name(uri))))
            continue
        found = bool(part)  # what is none in a part of a file says nothing about the file
        for record in _reader(source, uri).read(uri, source, **part):
            found = True
            if not isinstance(record, BadRecord):
                record["source"] = source.label
            yield record
        if not found:
            with storage.open_input(uri) as file:
                reason = "no records" if file.size() else "empty file"
            yield BadRecord(uri, 0, reason, f"no {source.kind} record in it")


def _is_utf8(uri: str) -> bool:
    try:
        uri.encode()
    except UnicodeEncodeError:
        return False
    return True


def title(uri: str) -> str:
    """A file's name without its extensions."""
    return os.path.splitext(storage.file_name(uri[: len(stem(uri))]))[0]
