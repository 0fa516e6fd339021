"""Lines or paragraphs that many documents share, such as menus, notices and licence texts (as in CCNet, Wenzek 2020).

Two phases. ``find`` hashes the spans of every document, counts by a shuffle in how many documents each occurs, and
writes for every part which spans to cut. ``work`` then edits one part. A span stays in the first document that has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipelines import storage
from pipelines.dedup import column, compact, for_parts, map_blocks, nodes, partitions_for, published, shuffle, total
from pipelines.dedup.groups import ordered
from pipelines.dedup.rows import attach, begin
from pipelines.filters import Verdict
from pipelines.stage import Output, read_part, text_bytes

if TYPE_CHECKING:
    from pipelines.words.lines import Spans

UNITS = ("line", "paragraph")

CUTS_SCHEMA = pa.schema([("hash", pa.int64()), ("keep", pa.int64())])
"""Hash of a span to cut from a part, and the row of the document that keeps it there, -1 for none; by hash."""

_SPANS_SCHEMA = pa.schema([("hash", pa.int64()), ("row", pa.int64()), ("documents", pa.int64())])
_SPANS = 1 << 20  # spans whose counts are held at a time


@dataclass
class LineDedup:
    """Cuts lines or paragraphs that many documents share from all but the first of them."""

    enabled: bool = False
    """Whether they are cut."""
    unit: str = "line"
    """What is compared: each `line`, or each `paragraph` (between empty lines)."""
    min_characters: int = 50
    """Shorter ones are never cut."""
    max_documents: int = 5
    """Documents that may share one; if more do, it stays in the first of them only."""

    def validate(self) -> None:
        """Raises ValueError for values outside their range."""
        if self.unit not in UNITS:
            raise ValueError(f"unit is {self.unit}, must be one of {', '.join(UNITS)}")
        for name in ("min_characters", "max_documents"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be 1 or more")


def find(parts: list[str], output: str, settings: LineDedup, partitions: int | None = None) -> int:
    """Write which spans are to be cut from each part.

    The result does not depend on the number of partitions. An earlier result in ``output`` is deleted; the hashes that
    a search which was killed made of the same parts are used again.

    Args:
        parts: URIs of the corpus parts in order (Parquet, documents.SCHEMA).
        output: folder for the files of CUTS_SCHEMA, one for each part from which something is to be cut.
        settings: what is compared.
        partitions: blocks to shuffle into; by default one for each 128 MB of hashes.

    Returns:
        How many entries these files have.
    """
    settings.validate()
    made = begin(parts, output)
    if not settings.enabled:
        return 0

    def hash_part(index: int, part: str) -> Iterator[pa.Table]:
        for table in _spans_of_part(part, made[index], settings):
            node = nodes(index, column(table, "row"))
            yield pa.table({"hash": table["hash"], "node": node, "documents": table["documents"]})

    def common(table: pa.Table) -> pa.Table:
        return _common(settings.max_documents, table)

    def write(file: int, table: pa.Table, rows: np.ndarray) -> pa.Table:
        found = table.select(CUTS_SCHEMA.names).cast(CUTS_SCHEMA).sort_by("hash")
        with storage.parquet_writer(storage.join(output, storage.file_name(parts[file])), CUTS_SCHEMA) as out:
            out.write_table(found)
        return pa.table({"written": pa.array([len(rows)], pa.int64())})

    spans = for_parts(parts, hash_part)
    cuts = spans
    if spans.count():
        cuts = compact(map_blocks(shuffle(spans, "hash", partitions_for(spans, partitions)), common))
    written = attach(cuts, "node", len(parts), partitions, write)
    storage.delete(storage.join(output, published.FOLDER))
    return total(written, "written") if written.count() else 0


def work(part: str, cuts: str, settings: LineDedup) -> Iterator[Output]:
    """Work of a stage: a part's documents without the spans that ``find`` listed; set aside where nothing is left.

    Args:
        part: URI of the part.
        cuts: its file of CUTS_SCHEMA, which need not be there.
        settings: those of ``find``.
    """
    hashes = keep = np.empty(0, np.int64)
    if storage.exists(cuts):
        listed = storage.open_parquet(cuts).read()
        hashes, keep = column(listed, "hash"), column(listed, "keep")
    row = 0
    for table in read_part(part):
        size = text_bytes(table)
        if len(hashes):
            yield _edited(table, row, hashes, keep, settings, size)
        else:
            yield Output(table, None, table.num_rows, size)
        row += table.num_rows


def _edited(table: pa.Table, row: int, hashes: np.ndarray, keep: np.ndarray, settings: LineDedup, size: int) -> Output:
    from pipelines.dedup import kernels
    from pipelines.filters.chain import set_aside
    from pipelines.words.columns import buffers
    from pipelines.words.lines import BLANK

    data, offsets = buffers(table["text"])
    spans = _spans(data, offsets, settings.unit)
    document = np.repeat(np.arange(table.num_rows), spans.last - spans.first)
    hashed = spans.hashes.view(np.int64)
    at = np.minimum(np.searchsorted(hashes, hashed), len(hashes) - 1)
    cut = (hashes[at] == hashed) & (keep[at] != row + document) & (spans.lengths >= settings.min_characters)
    if not cut.any():
        return Output(table, None, table.num_rows, size)
    text, ranges = kernels.cut_out(data, offsets, spans.starts, spans.ends, spans.first, spans.last, cut)
    edited = pa.LargeStringArray.from_buffers(table.num_rows, pa.py_buffer(ranges), pa.py_buffer(text))
    cuts = np.bincount(document[cut], minlength=table.num_rows)
    left = np.bincount(document[~cut & (spans.flags & BLANK == 0)], minlength=table.num_rows)
    gone = (cuts > 0) & (left == 0)
    verdicts = [Verdict(f"{settings.unit} duplicates: nothing left", float(n), None) for n in cuts[gone]]
    index = table.schema.get_field_index("text")
    kept = table.set_column(index, table.schema.field(index), edited).filter(pa.array(~gone))
    counts = {
        f"{settings.unit} duplicates: cut": int(cuts.sum()),
        f"{settings.unit} duplicates: characters": int(spans.lengths[cut].sum()),
        f"{settings.unit} duplicates: documents edited": int(np.count_nonzero((cuts > 0) & ~gone)),
    }
    return Output(kept, set_aside(table.filter(pa.array(gone)), verdicts), table.num_rows, size, counts)


def _spans(data: np.ndarray, offsets: np.ndarray, unit: str) -> Spans:
    from pipelines.words.lines import lines

    found, paragraphs, _ = lines(data, offsets)
    return found if unit == "line" else paragraphs


def _spans_of_part(part: str, uri: str, settings: LineDedup) -> Iterator[pa.Table]:
    """Hashes of a part's spans, each with the first row that has it and the number of documents, chunk by chunk.

    A hash may occur in several chunks, which are of different documents. Chunks are the same whether they are made or
    read back, since a task that Ray repeats has to yield what it yielded before.
    """
    schema = published.marked(_SPANS_SCHEMA, part, [settings.unit, settings.min_characters])
    if published.is_current(uri, schema):
        with storage.open_parquet(uri) as file:
            yield from map(file.read_row_group, range(file.num_row_groups))
        return
    with storage.parquet_writer(uri, schema, compression="none") as out:
        for hashes, rows in _chunks(part, settings):
            table = _count(hashes, rows)
            out.write_table(table.cast(schema), row_group_size=max(1, table.num_rows))
            yield table


def _chunks(part: str, settings: LineDedup) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    from pipelines.words.columns import buffers

    held: list[tuple[np.ndarray, np.ndarray]] = []
    row = 0
    for batch in read_part(part, columns=["text"]):
        spans = _spans(*buffers(batch["text"]), settings.unit)
        document = np.repeat(np.arange(row, row + batch.num_rows), spans.last - spans.first)
        long = spans.lengths >= settings.min_characters
        held.append((spans.hashes.view(np.int64)[long], document[long]))
        row += batch.num_rows
        if sum(len(rows) for _, rows in held) >= _SPANS:
            yield tuple(np.concatenate(arrays) for arrays in zip(*held, strict=True))
            held = []
    if held:
        yield tuple(np.concatenate(arrays) for arrays in zip(*held, strict=True))


def _count(hashes: np.ndarray, rows: np.ndarray) -> pa.Table:
    order = np.lexsort((rows, hashes))
    hashes, rows = hashes[order], rows[order]
    opens, again = np.ones(len(hashes), bool), np.zeros(len(hashes), bool)
    opens[1:] = hashes[1:] != hashes[:-1]
    again[1:] = ~opens[1:] & (rows[1:] == rows[:-1])
    documents = np.bincount(np.cumsum(opens)[~again] - 1, minlength=np.count_nonzero(opens)).astype(np.int64)
    return pa.table({"hash": hashes[opens], "row": rows[opens], "documents": documents})


def _common(most: int, table: pa.Table) -> pa.Table:
    """Every part that has to cut a span, with its hash and the row that keeps it in this part."""
    table, opens = ordered(table, ["hash", "node"], 1)
    hashes, node, documents = (column(table, name) for name in ("hash", "node", "documents"))
    group = np.cumsum(opens) - 1
    common = np.bincount(group, documents)[group] > most
    starts = np.ones(len(node), bool)  # of the rows of one part
    starts[1:] = opens[1:] | (node[1:] >> 32 != node[:-1] >> 32)
    of_part = np.bincount(np.cumsum(starts) - 1, documents)
    keeps = opens[starts]
    some = common[starts] & ~(keeps & (of_part == 1))  # a part with the first document only has nothing to cut
    part = node[starts] >> 32 << 32
    keep = np.where(keeps, node[starts] & 0xFFFFFFFF, -1)
    return pa.table({"hash": hashes[starts][some], "node": part[some], "keep": keep[some]})
