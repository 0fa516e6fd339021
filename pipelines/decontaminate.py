"""Removes what overlaps the sets a model will be scored on, by word 13-grams (Brown et al. 2020, appendix C).

Words are compared without case and punctuation. As for GPT-3, an n-gram that occurs in more than ten documents is a
phrase, a quotation or a licence and not counted; and the stretch around an overlap is cut out with 200 characters on
either side, pieces shorter than 200 characters go, and so does a document that would be cut more than ten times. An
item of a set that is shorter than an n-gram counts as a whole, down to eight words. Unlike there, the pieces of a
document stay one document.
"""

from __future__ import annotations

import csv
import functools
import gzip
import io
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipelines import storage
from pipelines.documents import InputError
from pipelines.filters import Applied, Batch, Measure
from pipelines.stage import Unit, for_each, read_part

if TYPE_CHECKING:
    from pipelines.overlap import Table

log = logging.getLogger("ingot")

_SCHEMA = pa.schema([("hash", pa.uint64()), ("words", pa.int32()), ("item", pa.string())])


@dataclass
class EvaluationSet:
    """Texts that must not be trained on."""

    path: str
    """A file, folder or glob, local or on s3, plain or .gz: .jsonl, .json (a list), .csv and .tsv (with a header) and
    .parquet with an item a record; .txt with items parted by blank lines."""
    fields: list[str] = field(default_factory=list)
    """Which fields of a record are looked for, each on its own; empty takes all that hold text."""
    name: str = ""
    """What it is called in reports; the file's name by default."""


@dataclass
class Decontamination:
    """What is looked for, and what happens to documents that hold it."""

    enabled: bool = True
    """Whether documents are compared with the sets."""
    sets: list[EvaluationSet] = field(default_factory=list)
    """Sets to keep out, such as `[{path: mmlu/test}, {path: gsm8k/test.jsonl, fields: [question]}]`."""
    action: Literal["drop", "cut"] = "cut"
    """`drop` removes a document that overlaps, `cut` the stretch that does."""
    ngram: int = 13
    """Words of an n-gram."""
    min_words: int = 8
    """Fewest words of an item that is shorter than an n-gram; yet shorter ones are not looked for."""
    max_documents: int = 10
    """An n-gram that occurs in more documents of the corpus is not counted; 0 counts all, and saves one pass."""
    window: int = 200
    """Characters that are cut on either side of an overlap."""
    min_piece: int = 200
    """Fewest characters of what is left between two cuts; shorter pieces go as well."""
    max_cuts: int = 10
    """A document with more cuts is dropped."""

    def validate(self) -> None:
        """Raise ValueError for what cannot work."""
        if self.ngram < 1:
            raise ValueError(f"ngram is {self.ngram}, must be at least 1")
        if not 1 <= self.min_words <= self.ngram:
            raise ValueError(f"min_words is {self.min_words}, must lie between 1 and ngram {self.ngram}")
        for name in ("max_documents", "window", "min_piece", "max_cuts"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 0")

    def fingerprint(self) -> str:
        """Changes when a file of the sets does."""
        files = [
            (file.uri, xxhash.xxh3_128_hexdigest(storage.read_bytes(file.uri)))
            for source in self.sets
            for file in storage.list_files(source.path)
        ]
        return xxhash.xxh3_128_hexdigest(repr(files).encode())


def prepare(settings: Decontamination, folder: str, parts: list[str]) -> str:
    """Write the n-grams of the sets, less those that occur in too many documents of the corpus.

    Args:
        settings: sets and limits.
        folder: where the file goes; one that an earlier run finished there is taken as it is.
        parts: URIs of the corpus.

    Returns:
        URI of the file, for ``Decontaminator``.

    Raises:
        FileNotFoundError: a set is not there.
        InputError: a file of a set is not what its name says, or lacks a field; the message names it.
    """
    output = storage.join(folder, "ngrams.parquet")
    if storage.exists(output):
        return output
    table = ngram_table(settings)
    if settings.max_documents and table.num_rows:
        every = storage.join(folder, "all-ngrams.parquet")
        with storage.parquet_writer(every, _SCHEMA) as out:
            out.write_table(table)
        counts = np.zeros(table.num_rows, np.int64)
        for found in for_each([Unit(str(i), {"part": part, "index": every}) for i, part in enumerate(parts)], _count):
            counts[np.array(found["ngrams"], np.int64)] += np.array(found["documents"], np.int64)
        common = counts > settings.max_documents
        table = table.filter(pa.array(~common))
        numbers = [f"{number:,}" for number in (len(counts), np.count_nonzero(counts), np.count_nonzero(common))]
        limit = settings.max_documents
        log.info("decontaminate: of %s n-grams %s occur in the corpus, %s in more than %d documents", *numbers, limit)
    with storage.parquet_writer(output, _SCHEMA) as out:
        out.write_table(table)
    return output


def ngram_table(settings: Decontamination) -> pa.Table:
    """The n-grams of the sets, each once: its hash, its words, and the first item that holds it."""
    from pipelines.words import normal, normal_words

    tables = [_SCHEMA.empty_table()]
    for source in settings.sets:
        for file in storage.list_files(source.path):
            names, texts = [], []
            for number, record in enumerate(_records(file.uri), 1):
                for name, text in _texts(record, source.fields, f"{file.uri}, record {number}"):
                    names.append(f"{source.name or storage.file_name(file.uri)}, record {number}, {name}")
                    texts.append(text)
            words = normal_words(pa.array(texts, pa.large_string()))
            hashes, offsets = normal.ngram_hashes(words, settings.ngram)
            items = np.repeat(np.arange(len(texts)), np.diff(offsets))
            lengths = np.minimum(np.diff(words.offsets), settings.ngram)[items]
            long_enough = lengths >= settings.min_words
            columns = [
                pa.array(hashes[long_enough]),
                pa.array(lengths[long_enough].astype(np.int32)),
                pa.array(names, pa.string()).take(pa.array(items[long_enough])),
            ]
            tables.append(pa.table(columns, schema=_SCHEMA))
    table = pa.concat_tables(tables)
    _, first = np.unique(table["hash"].to_numpy(), return_index=True)
    return table.take(pa.array(np.sort(first)))


def _count(unit: Unit) -> dict[str, Any]:
    """In how many documents of a part each n-gram occurs."""
    from pipelines.overlap import matches

    index = _index(unit.arguments["index"])
    counts = np.zeros(len(index.items), np.int64)
    for table in read_part(unit.arguments["part"], columns=["text"]):
        found = matches(table["text"], index.table)
        if len(found.ngrams):
            pairs = np.unique(np.stack([found.documents, found.ngrams]), axis=1)
            counts += np.bincount(pairs[1], minlength=len(counts))
    ngrams = np.flatnonzero(counts)
    return {"ngrams": ngrams.tolist(), "documents": counts[ngrams].tolist()}


class _Index(NamedTuple):
    table: Table
    items: pa.ChunkedArray


def _index(uri: str) -> _Index:
    return _load(storage.list_files(uri)[0])


@functools.lru_cache(maxsize=2)
def _load(file: storage.FileInfo) -> _Index:
    from pipelines.overlap import Table

    rows = storage.open_parquet(file.uri).read()
    return _Index(Table.of(rows["hash"].to_numpy(), pc.unique(rows["words"]).to_pylist()), rows["item"])


@dataclass
class Decontaminator:
    """Drops or cuts what overlaps the sets; a rule set whose n-grams ``prepare`` has written.

    Attributes:
        settings: the action and its limits.
        ngrams: URI of the n-grams.
    """

    settings: Decontamination
    ngrams: str

    def apply(self, batch: Batch) -> Applied:
        """Look for the n-grams in the documents.

        The measures are, for ``drop``, the n-grams found, and, for ``cut``, the cuts and the characters that are left.
        """
        from pipelines.overlap import matches

        index = _index(self.ngrams)
        column = batch.table["text"]
        found = matches(column, index.table)
        order = np.lexsort((found.starts, found.documents))
        documents, starts, ends, ngrams = (values[order] for values in found)
        hit, first, counts = np.unique(documents, return_index=True, return_counts=True)
        details: list[str | None] = [None] * len(batch)
        for document, at in zip(hit.tolist(), first.tolist(), strict=True):
            details[document] = f"overlaps {index.items[int(ngrams[at])]}"
        if self.settings.action == "drop":
            values = np.zeros(len(batch))
            values[hit] = counts
            return Applied([Measure("decontaminate: overlap", values, maximum=0, details=details)])
        cuts, left = np.zeros(len(batch)), np.full(len(batch), np.nan)
        texts = {}
        for document, at, count in zip(hit.tolist(), first.tolist(), counts.tolist(), strict=True):
            spans = zip(starts[at : at + count].tolist(), ends[at : at + count].tolist(), strict=True)
            pieces, cuts[document] = self._cut(column[document].as_py(), list(spans))
            texts[document] = "\n\n".join(pieces)
            left[document] = sum(map(len, pieces))
        measures = [
            Measure("decontaminate: cuts", cuts, maximum=self.settings.max_cuts, details=details),
            Measure("decontaminate: nothing left", left, minimum=1, details=details),
        ]
        if not texts:
            return Applied(measures)
        edited = [texts.get(i, text) for i, text in enumerate(column.to_pylist())]
        counts = {"decontaminate: document cut": len(texts), "decontaminate: cut": int(cuts.sum())}
        return Applied(measures, pa.array(edited, pa.large_string()), counts)

    def _cut(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[str], int]:
        """What is left of a text, and the number of cuts.

        Args:
            text: the document.
            spans: overlaps as bytes of its UTF-8, by their starts.
        """
        data = text.encode("utf-8", "replace")
        pieces, cuts, kept, at, byte = [], 0, 0, 0, 0
        for start, end in spans:
            at += len(data[byte:start].decode("utf-8", "ignore"))
            byte = start
            first = max(_word_edge(text, at - self.settings.window, -1), 0)
            last = _word_edge(text, at + len(data[start:end].decode("utf-8", "ignore")) + self.settings.window, 1)
            if cuts == 0 or first > kept:
                pieces.append(text[kept:first])
                cuts += 1
            kept = max(kept, last)
        pieces.append(text[kept:])
        pieces = [piece.strip() for piece in pieces]
        return [piece for piece in pieces if piece and len(piece) >= self.settings.min_piece], cuts


def _word_edge(text: str, at: int, step: int) -> int:
    """The nearest place from ``at`` in a direction where no word is cut in two; not further than a word is long."""
    for there in range(at, at + 30 * step, step):
        if there <= 0 or there >= len(text) or text[there - 1].isspace() or text[there].isspace():
            return there
    return at


# the files of the sets


def _records(uri: str) -> Iterator[dict[str, Any]]:
    """The items of a file, by its name.

    Raises:
        InputError: it is not what its name says.
    """
    name = storage.file_name(uri).lower().removesuffix(".gz")
    kind = name.rpartition(".")[2]
    if kind == "parquet":
        yield from storage.open_parquet(uri).read().to_pylist()
        return
    if kind not in ("jsonl", "ndjson", "json", "csv", "tsv", "txt"):
        raise InputError(f"{uri}: an evaluation set is .jsonl, .json, .csv, .tsv, .txt or .parquet, by its name")
    data = storage.read_bytes(uri)
    try:
        text = (gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data).decode("utf-8-sig")
        if kind in ("jsonl", "ndjson"):
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
        elif kind == "json":
            records = json.loads(text)
        elif kind == "txt":
            records = [{"text": item} for item in re.split(r"\n\s*\n", text) if item.strip()]
        else:
            csv.field_size_limit(1 << 30)
            records = list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if kind == "tsv" else ","))
    except (ValueError, OSError, EOFError, csv.Error) as error:
        raise InputError(f"{uri}: not readable as {kind} ({error})") from None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError(f"{uri}: not a list of records")
    yield from records


def _texts(record: dict[str, Any], fields: list[str], where: str) -> Iterator[tuple[str, str]]:
    """Name and text of the fields of a record; the texts of a list are each on its own."""
    for name in fields or [name for name in record if isinstance(name, str)]:
        if name not in record:
            raise InputError(f"{where}: no field {name}; there are {', '.join(map(str, record))}")
        value = record[name]
        yield from ((name, text) for text in (value if isinstance(value, list) else [value]) if isinstance(text, str))
