"""Rules on where a document comes from, by the user's own lists, after RefinedWeb (Penedo et al. 2023, appendix G.1).

A listed domain stands for its subdomains; a listed address for itself; words are counted in the address: one hard word
is enough, soft ones need company, and a part counts wherever it occurs once all but letters and digits is taken out.
No lists come with Ingot: a rule acts when files are given.
"""

from __future__ import annotations

import functools
import gzip
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipelines import storage
from pipelines.documents import InputError
from pipelines.filters import Applied, Batch, Measure

if TYPE_CHECKING:
    from pipelines.filters.phrases import Phrases

_GAPS = r"[^\p{L}\p{M}\p{N}]+"


@dataclass
class UrlRules:
    """Lists of domains, addresses and words. Each is a list of files, folders or globs, local or on s3, plain or .gz,
    with an entry a line; what follows a `#` at the start of a line or after a blank is a remark.
    """

    enabled: bool = True
    """Whether these rules are applied."""
    domains: list[str] = field(default_factory=list)
    """Files of domains, such as `example.com`, whose pages go, those of their subdomains included."""
    urls: list[str] = field(default_factory=list)
    """Files of addresses of single pages that go; the scheme, `www.`, a fragment and a last slash do not matter."""
    hard_words: list[str] = field(default_factory=list)
    """Files of words of which an address may hold no one."""
    soft_words: list[str] = field(default_factory=list)
    """Files of words of which an address may hold a few."""
    max_soft_words: int = 1
    """How many different soft words an address may hold."""
    parts: list[str] = field(default_factory=list)
    """Files of strings that may stand nowhere in the letters and digits of an address, not even within a word."""
    allow: list[str] = field(default_factory=list)
    """Files of domains whose pages stay whatever the other lists say."""

    def validate(self) -> None:
        """Raise ValueError for limits that cannot be."""
        if self.max_soft_words < 0:
            raise ValueError(f"max_soft_words is {self.max_soft_words}, must be at least 0")

    def fingerprint(self) -> str:
        """Changes when a file of the lists does; also reads them, so that a bad line is told before any task starts.

        Raises:
            FileNotFoundError: a list is not there.
            InputError: a line of a list cannot be what the list is of; the message names it.
        """
        files = [
            (entry.name, path, file.size, xxhash.xxh3_128_hexdigest(storage.read_bytes(file.uri)))
            for entry in fields(self)
            if isinstance(paths := getattr(self, entry.name), list)
            for path in paths
            for file in storage.list_files(path)
        ]
        made = xxhash.xxh3_128_hexdigest(repr(files).encode()) if files else ""
        self._lists(made)
        return made

    def apply(self, batch: Batch) -> Applied:
        """Measure the addresses; a document without one, or with one that is allowed, is not judged.

        Raises:
            FileNotFoundError: a list is not there.
            InputError: a line of a list cannot be what the list is of; the message names it.
        """
        lists = self._lists()
        column = pc.fill_null(batch.table["url"], "")
        addresses = [split(url) for url in column.to_pylist()]
        hosts = [address.host for address in addresses]
        exempt = np.array([not host for host in hosts], bool)
        if lists.allow is not None:
            exempt |= lists.allow.longest(hosts) >= 0
        measures: list[Measure] = []

        def measure(reason: str, maximum: int, values: np.ndarray, details: list[str | None]) -> None:
            measures.append(Measure(reason, np.where(exempt, np.nan, values), maximum=maximum, details=details))

        if lists.domains is not None:
            starts = lists.domains.longest(hosts)
            details = [host[at:] if at >= 0 else None for host, at in zip(hosts, starts.tolist(), strict=True)]
            measure("url: listed domain", 0, (starts >= 0).astype(np.float64), details)
        if lists.urls is not None:
            pages = [_page(address) for address in addresses]
            listed = lists.urls.has(pages)
            details = [page if yes else None for page, yes in zip(pages, listed, strict=True)]
            measure("url: listed address", 0, listed.astype(np.float64), details)
        if not (lists.hard_words or lists.soft_words or lists.parts):
            return Applied(measures)
        readable = _readable(column)
        spaced = pc.binary_join_element_wise("", pc.replace_substring_regex(readable, _GAPS, " "), "", " ")
        if lists.hard_words:
            measure("url: hard words", 0, *_count(lists.hard_words, spaced))
        if lists.soft_words:
            measure("url: soft words", self.max_soft_words, *_count(lists.soft_words, spaced))
        if lists.parts:
            joined = pc.replace_substring_regex(readable, _GAPS, "")
            measure("url: parts", 0, *_count(lists.parts, joined))
        return Applied(measures)

    def _lists(self, version: str = "") -> _Lists:
        return _load(*(tuple(getattr(self, name)) for name in _Lists._fields), version)


class Address(NamedTuple):
    """A URL's host, in lower case and in ASCII, and what follows it but for a fragment and a last slash."""

    host: str
    rest: str


def split(url: str) -> Address:
    """Cut a URL; one without a scheme is taken to begin with its host."""
    scheme, separator, after = url.partition("#")[0].partition("://")
    address = (
        after if separator and "/" not in scheme and "?" not in scheme else f"{scheme}{separator}{after}"
    ).lstrip("/")
    end = len(address)
    for sign in "/?":
        if (at := address.find(sign, 0, end)) >= 0:
            end = at
    host = address[:end].rpartition("@")[2]
    if not host.startswith("["):  # an IPv6 address has colons of its own
        host = host.partition(":")[0]
    return Address(_plain(host), address[end:].rstrip("/"))


def _plain(host: str) -> str:
    host = host.strip(". ").lower()
    if not host.isascii():
        try:
            return host.encode("idna").decode()
        except UnicodeError:
            return host
    return host


class _Set:
    """Strings by their hash, 8 bytes each, so that lists of millions of domains fit into every worker."""

    def __init__(self, entries: Iterator[str]) -> None:
        self.hashes = np.unique(np.fromiter(map(_hash, entries), np.uint64))

    def has(self, strings: list[str]) -> np.ndarray:
        """Which of the strings are in the set, (strings,), bool."""
        wanted = np.fromiter(map(_hash, strings), np.uint64, len(strings))
        if not len(self.hashes):
            return np.zeros(len(wanted), bool)
        at = np.minimum(np.searchsorted(self.hashes, wanted), len(self.hashes) - 1)
        return self.hashes[at] == wanted

    def longest(self, hosts: list[str]) -> np.ndarray:
        """Where in each host the longest domain starts that is in the set, -1 when none is, (hosts,), int64."""
        owners, starts, domains = [], [], []
        for number, host in enumerate(hosts):
            at = 0
            while True:
                owners.append(number)
                starts.append(at)
                domains.append(host[at:])
                at = host.find(".", at) + 1
                if not at:
                    break
        found = np.flatnonzero(self.has(domains))[::-1]  # the longest of a host, its first, is written last
        longest = np.full(len(hosts), -1, np.int64)
        longest[np.array(owners, np.int64)[found]] = np.array(starts, np.int64)[found]
        return longest


def _hash(string: str) -> int:
    return xxhash.xxh3_64_intdigest(string.encode("utf-8", "surrogatepass"))


class _Lists(NamedTuple):
    domains: _Set | None
    urls: _Set | None
    hard_words: Phrases | None
    soft_words: Phrases | None
    parts: Phrases | None
    allow: _Set | None


@functools.lru_cache(maxsize=4)
def _load(
    domains: tuple[str, ...],
    urls: tuple[str, ...],
    hard: tuple[str, ...],
    soft: tuple[str, ...],
    parts: tuple[str, ...],
    allow: tuple[str, ...],
    version: str,  # of what the files hold: files that changed since are read again
) -> _Lists:
    return _Lists(_domains(domains), _pages(urls), _words(hard), _words(soft), _words(parts, ""), _domains(allow))


def _domains(paths: tuple[str, ...]) -> _Set | None:
    def entries() -> Iterator[str]:
        for place, line in _lines(paths):
            domain = _plain(line.removeprefix("*."))
            if not domain or any(sign in domain for sign in "/:@ \t"):
                raise InputError(f"{place}: {line!r} is not a domain, such as example.com")
            yield domain

    return _Set(entries()) if paths else None


def _pages(paths: tuple[str, ...]) -> _Set | None:
    def entries() -> Iterator[str]:
        for place, line in _lines(paths):
            address = split(line)
            if not address.host or " " in address.host:
                raise InputError(f"{place}: {line!r} is not the address of a page")
            yield _page(address)

    return _Set(entries()) if paths else None


def _words(paths: tuple[str, ...], around: str = " ") -> Phrases | None:
    from pipelines.filters.phrases import Phrases

    if not paths:
        return None
    words = pc.replace_substring_regex(_readable(pa.array([line for _, line in _lines(paths)], pa.string())), _GAPS, "")
    return Phrases.of(f"{around}{word}{around}" for word in words.to_pylist() if word)


def _lines(paths: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """The entries of lists, each with the file and line it stands in."""
    for path in paths:
        for file in storage.list_files(path):
            data = storage.read_bytes(file.uri)
            if data.startswith(b"\x1f\x8b"):
                data = gzip.decompress(data)
            try:
                text = data.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise InputError(f"{file.uri}: not UTF-8 ({error})") from None
            for number, line in enumerate(text.splitlines(), 1):
                entry = f" {line}".partition(" #")[0].strip()
                if entry:
                    yield f"{file.uri}, line {number}", entry


def _page(address: Address) -> str:
    return f"{address.host.removeprefix('www.')}{address.rest}"


def _readable(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Strings in lower case, with escapes such as %C3%BC as the letters they stand for."""
    if pc.any(pc.match_substring(column, "%")).as_py():
        column = pa.array([unquote(string) if "%" in string else string for string in column.to_pylist()], pa.string())
    return pc.utf8_lower(column)


def _count(phrases: Phrases, column: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, list[str | None]]:
    """How many different phrases each string holds, and which."""
    counts = np.zeros(len(column), np.float64)
    details: list[str | None] = [None] * len(column)
    for at, number in zip(*(array.tolist() for array in phrases.find(column)), strict=True):
        word = phrases.phrases[number].strip()
        details[at] = f"{details[at]}, {word}" if details[at] else word
        counts[at] += 1
    return counts, details
