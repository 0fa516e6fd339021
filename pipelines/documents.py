"""The document table: its schema, stable ids, and the rows that were set aside with their reason."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import xxhash

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.large_string()),
        ("url", pa.string()),
        ("path", pa.string()),
        ("source", pa.string()),
        ("language", pa.string()),
        ("language_score", pa.float32()),
        ("metadata", pa.string()),  # a JSON object; sources differ too much for columns
    ]
)

SET_ASIDE_SCHEMA = pa.schema(
    [
        *SCHEMA,
        ("reason", pa.string()),
        ("value", pa.float64()),
        ("threshold", pa.float64()),
        ("offset", pa.int64()),
        ("detail", pa.string()),
    ]
)


class InputError(ValueError):
    """Files or a corpus that a job cannot go on with; the message names them and says what to do."""


class BadRecord(NamedTuple):
    """A record that could not become a document.

    Attributes:
        path: file that holds it.
        offset: byte offset of the record in that file, -1 when unknown.
        reason: short and countable, such as ``json: invalid line``.
        detail: the error's own words.
    """

    path: str
    offset: int
    reason: str
    detail: str


def document_id(source: str, path: str, record: str | int) -> str:
    """Stable id of a record: 32 hexadecimal digits of xxh3-128 over source, file and record.

    The same record gets the same id in every run, so that later stages, token shards and error reports can name it.
    """
    return xxhash.xxh3_128_hexdigest(f"{source}\0{path}\0{record}".encode("utf-8", "surrogatepass"))


def copy_id(document: str, copy: int) -> str:
    """Id of the copy of a document that a mix repeats; copy 0 is the document itself."""
    return f"{document}#{copy + 1}" if copy else document


def original_id(document: str) -> str:
    """Id of the document that an id of ``copy_id`` is a copy of."""
    original, _, number = document.rpartition("#")
    return original if original and number.isdecimal() else document


def to_table(rows: Iterable[Mapping[str, Any]], schema: pa.Schema = SCHEMA) -> pa.Table:
    """Rows (missing keys become null, ``metadata`` dicts become JSON) as a table of ``schema``."""
    rows = list(rows)
    columns = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        if field.name == "metadata":
            values = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
        columns.append(pa.array(values, field.type))
    return pa.table(columns, schema=schema)


def set_aside_bad_records(bad: Iterable[BadRecord], source: str) -> pa.Table:
    """Malformed records as rows of SET_ASIDE_SCHEMA; they have a file and an offset, but no id and no text."""
    return to_table(
        [
            {"path": b.path, "offset": b.offset, "reason": b.reason, "detail": b.detail[:2000], "source": source}
            for b in bad
        ],
        SET_ASIDE_SCHEMA,
    )
