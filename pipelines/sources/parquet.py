"""Parquet files with a column of texts, read row group by row group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.documents import BadRecord
from pipelines.sources import Record, Source, columns

_ROWS = 256


def read(uri: str, source: Source, start: int = 0, end: int | None = None) -> Iterator[Record | BadRecord]:
    """The documents of a file; columns of numbers and strings that the source's mapping does not name are metadata.

    A row group that cannot be read is a BadRecord with the offset of the group in the file, and so is a row of it.

    Args:
        uri: the file.
        source: whose mapping is taken.
        start: the first row group.
        end: the row group to stop before, None for all.
    """
    file = open_file(uri)
    if isinstance(file, BadRecord):
        yield file
        return
    schema = file.schema_arrow
    if (fault := missing_text(schema, source)) is not None:
        yield BadRecord(uri, 0, "parquet: no text", fault)
        return
    names = list(_columns(schema, source))
    row = sum(file.metadata.row_group(group).num_rows for group in range(start))
    for group in range(start, file.num_row_groups if end is None else end):
        first, rows = row, file.metadata.row_group(group).num_rows
        try:
            for batch in file.iter_batches(_ROWS, row_groups=[group], columns=names):
                yield from _documents(uri, row, batch, source, _offset(file, group))
                row += len(batch)
        except (pa.ArrowException, OSError) as error:
            if storage.failed(error):
                raise
            offset = _offset(file, group)
            yield BadRecord(uri, offset, "parquet: damaged row group", f"rows {row} to {first + rows - 1}: {error}")
        row = first + rows


def open_file(uri: str) -> pq.ParquetFile | BadRecord:
    """The file, or a BadRecord when it is damaged."""
    try:
        return storage.open_parquet(uri)
    except (ValueError, OSError) as error:
        if storage.failed(error):
            raise
        return BadRecord(uri, 0, "parquet: not readable", str(error))


def missing_text(schema: pa.Schema, source: Source) -> str | None:
    """What is wrong with the column that should hold the text, None when nothing is."""
    name = columns.mapping(source)["text"]
    kind = _type_of(schema, name)
    if kind is not None and (_is_string(kind) or _is_binary(kind)):
        return None
    return f"no column of strings {name}; there are {', '.join(schema.names)}"


def ranges(file: storage.FileInfo, size: int) -> list[tuple[int, int]]:
    """Ranges of row groups that hold some ``size`` bytes of the file each; one with all of a damaged file."""
    opened = open_file(file.uri)
    if isinstance(opened, BadRecord):
        return [(0, 0)]
    out, first, total = [], 0, 0
    for group in range(opened.num_row_groups):
        row_group = opened.metadata.row_group(group)
        stored = sum(row_group.column(i).total_compressed_size for i in range(row_group.num_columns))
        if total and total + stored > size:
            out.append((first, group))
            first, total = group, 0
        total += stored
    return [*out, (first, opened.num_row_groups)]


def _documents(uri: str, row: int, batch: pa.RecordBatch, source: Source, offset: int) -> Iterator[Record | BadRecord]:
    """Rows as documents; their offset is that of their row group."""
    for i, fields in enumerate(_rows(batch), row):
        if isinstance(fields, UnicodeDecodeError):
            yield BadRecord(uri, offset, "parquet: bad UTF-8", f"row {i}: {fields}")
            continue
        found = columns.document(fields, source, uri, i)
        if isinstance(found, str):
            yield BadRecord(uri, offset, "parquet: no text", f"row {i}: {found}")
        elif len(found["text"].encode()) > source.max_record_bytes:
            yield BadRecord(uri, offset, "parquet: too long", f"row {i} has more than {source.max_record_bytes} bytes")
        else:
            found["metadata"] = {"row": i} | found["metadata"]
            yield found | {"offset": offset}


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """Rows as dicts, or why one is none: Arrow does not check that strings are UTF-8."""
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        rows = [batch.slice(i, 1) for i in range(len(batch))]
    for row in rows:
        try:
            fields = row if isinstance(row, dict) else row.to_pylist()[0]
            yield {name: value.decode() if isinstance(value, bytes) else value for name, value in fields.items()}
        except UnicodeDecodeError as error:
            yield error


def _columns(schema: pa.Schema, source: Source) -> Iterator[str]:
    """What is worth reading: what the mapping names, and all scalars at most one level deep."""
    wanted = set(columns.mapping(source).values())
    for field in schema:
        if field.name in wanted or _is_scalar(field.type):
            yield field.name
        elif pa.types.is_struct(field.type):
            for inner in field.type:
                name = f"{field.name}.{inner.name}"
                if _is_scalar(inner.type) or any(w == name or w.startswith(f"{name}.") for w in wanted):
                    yield name


def _type_of(schema: pa.Schema, name: str) -> pa.DataType | None:
    """Type of a column, or of a part of one by its dotted name."""
    if name in schema.names:
        return schema.field(name).type
    head, *rest = name.split(".")
    kind = schema.field(head).type if head in schema.names else None
    for part in rest:
        if kind is None or not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
            return None
        kind = kind.field(part).type
    return kind


def _offset(file: pq.ParquetFile, group: int) -> int:
    column = file.metadata.row_group(group).column(0)
    return column.dictionary_page_offset or column.data_page_offset


def _is_string(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_scalar(kind: pa.DataType) -> bool:
    return _is_string(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
