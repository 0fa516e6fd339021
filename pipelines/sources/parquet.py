"""Parquet files with a column of texts, read row group by row group."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.documents import BadRecord, document_id
from pipelines.sources import Record, Source, scalars

_ROWS = 256


def read(uri: str, source: Source) -> Iterator[Record | BadRecord]:
    """The documents of a file; a column ``url`` is the address, further columns of numbers and strings are metadata.

    A row group that cannot be read is a BadRecord with the offset of the group in the file.
    """
    try:
        file = storage.open_parquet(uri)
    except ValueError as error:
        yield BadRecord(uri, 0, "parquet: not readable", str(error))
        return
    except OSError as error:
        if _from_storage(error):
            raise
        yield BadRecord(uri, 0, "parquet: not readable", str(error))
        return
    schema = file.schema_arrow
    if source.text_field not in schema.names or not _is_string(schema.field(source.text_field).type):
        detail = f"no column of strings {source.text_field}; there are {', '.join(schema.names)}"
        yield BadRecord(uri, 0, "parquet: no text", detail)
        return
    columns = [field.name for field in schema if field.name == source.text_field or _is_scalar(field.type)]
    row = 0
    for group in range(file.num_row_groups):
        start, rows = row, file.metadata.row_group(group).num_rows
        try:
            for batch in file.iter_batches(_ROWS, row_groups=[group], columns=columns):
                yield from _documents(uri, row, batch, source)
                row += len(batch)
        except (pa.ArrowException, OSError) as error:
            if _from_storage(error):
                raise
            offset = _offset(file, group)
            yield BadRecord(uri, offset, "parquet: damaged row group", f"rows {row} to {start + rows - 1}: {error}")
        row = start + rows


def _documents(uri: str, row: int, batch: pa.RecordBatch, source: Source) -> Iterator[Record | BadRecord]:
    for i in range(row, row + len(batch)):
        try:
            fields = batch.slice(i - row, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield BadRecord(uri, -1, "parquet: bad UTF-8", f"row {i}: {error}")
            continue
        text = fields.get(source.text_field)
        if text is None:
            yield BadRecord(uri, -1, "parquet: no text", f"row {i} has no {source.text_field}")
            continue
        if len(text.encode()) > source.max_record_bytes:
            yield BadRecord(uri, -1, "parquet: too long", f"row {i} has more than {source.max_record_bytes} bytes")
            continue
        url = fields.get("url")
        yield {
            "id": document_id(source.label, source.relative(uri), i),
            "text": text,
            "url": url if isinstance(url, str) else None,
            "path": uri,
            "offset": -1,
            "metadata": {"row": i, **scalars(fields, (source.text_field, "url"))},
        }


def _from_storage(error: Exception) -> bool:
    """Whether the storage failed; pyarrow raises OSError for that and for damaged content alike."""
    known = "AWS Error" in str(error) or "google::cloud" in str(error)
    return known or (isinstance(error, OSError) and error.errno is not None)


def _offset(file: pq.ParquetFile, group: int) -> int:
    column = file.metadata.row_group(group).column(0)
    return column.dictionary_page_offset or column.data_page_offset


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_scalar(kind: pa.DataType) -> bool:
    return _is_string(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
