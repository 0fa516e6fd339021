"""A chain of rule sets over the documents of a part: what goes and why, what is edited, what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import statistics
from pipelines.documents import SCHEMA, SET_ASIDE_SCHEMA
from pipelines.filters import Applied, Batch, Verdict, judge
from pipelines.stage import Output, read_part, text_bytes

_BATCH_DOCUMENTS = 1024


def filter_part(part: str, chain: list[Any]) -> Iterator[Output]:
    """Work of a stage: the first rule that a document breaks sets it aside, as its text was when it was judged.

    Args:
        part: URI of a part of the stage before.
        chain: rule sets in order; each has ``apply(batch) -> Applied``.
    """
    for table in read_part(part, rows=_BATCH_DOCUMENTS):
        yield filter_table(table, chain)


def filter_table(table: pa.Table, chain: list[Any]) -> Output:
    """One batch through the chain."""
    batch = Batch(table)
    aside: list[pa.Table] = []
    counts: dict[str, int] = {}
    measured: dict[str, Any] = {}
    for rules in chain:
        if not len(batch):
            break
        applied: Applied = rules.apply(batch)
        statistics.add(counts, applied.counts)
        statistics.add(measured, statistics.of_measures(applied.measures))
        broken, values, thresholds = judge(applied.measures, len(batch))
        text, columns = applied.text, applied.columns
        if columns:
            batch = batch.with_columns(columns)
        gone = np.flatnonzero(broken >= 0)
        if len(gone):
            rows = zip(broken[gone].tolist(), values[gone].tolist(), thresholds[gone].tolist(), strict=True)
            verdicts = [Verdict(applied.measures[i].reason, value, threshold) for i, value, threshold in rows]
            details = [
                None if (told := applied.measures[i].details) is None else told[document]
                for i, document in zip(broken[gone].tolist(), gone.tolist(), strict=True)
            ]
            aside.append(set_aside(batch.table.take(pa.array(gone)), verdicts, details))
            mask = broken < 0
            batch = batch.filter(mask)
            text = None if text is None else text.filter(pa.array(mask))
        if text is not None:
            batch = batch.with_text(text)
            blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(batch.table["text"])), 0)
            if pc.any(blank).as_py():
                gone = batch.table.filter(blank)
                aside.append(set_aside(gone, [Verdict("empty: nothing left", 0.0, 1.0)] * gone.num_rows))
                batch = batch.filter(~blank.to_numpy(zero_copy_only=False))
    dropped = pa.concat_tables(aside) if aside else None
    return Output(batch.table, dropped, table.num_rows, text_bytes(table), counts, {"measures": measured})


def set_aside(table: pa.Table, verdicts: list[Verdict], details: list[str | None] | None = None) -> pa.Table:
    """Dropped documents as rows of SET_ASIDE_SCHEMA, each with its verdict."""
    n = table.num_rows
    columns = [
        pa.array([v.reason for v in verdicts], pa.string()),
        pa.array([v.value for v in verdicts], pa.float64()),
        pa.array([v.threshold for v in verdicts], pa.float64()),
        pa.nulls(n, pa.int64()),
        pa.array(details, pa.string()) if details is not None else pa.nulls(n, pa.string()),
    ]
    return pa.table([*table.select(SCHEMA.names).columns, *columns], schema=SET_ASIDE_SCHEMA)
