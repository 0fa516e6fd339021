"""What a stage saw, in numbers that can be added: documents by source and language, lengths, values of the rules.

Statistics are nested dictionaries of counts, so that those of batches, parts and stages add up in any order. Values
fall into fixed bins: shares into hundredths, everything else into ten bins a decade.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.filters import Measure

Counts = dict[str, Any]
"""Nested dictionaries with whole numbers at their ends."""

_SHARE_BINS = 100
_DECADE_BINS = 10
_ZERO = -1000
"""Bin of zero and of what is below it, on the scale of decades."""


def add(total: Counts, more: Mapping[str, Any]) -> Counts:
    """Add ``more`` to ``total``, in place."""
    for key, value in more.items():
        if isinstance(value, Mapping):
            add(total.setdefault(key, {}), value)
        else:
            total[key] = total.get(key, 0) + value
    return total


def of_documents(table: pa.Table) -> Counts:
    """Documents and bytes by source, documents by language, and how long they are.

    Args:
        table: documents.SCHEMA.
    """
    sizes = pc.fill_null(pc.binary_length(table["text"]), 0)
    plain = pa.table({"source": table["source"], "language": table["language"], "bytes": sizes})
    found: Counts = {"sources": {}, "languages": {}, "bytes": _bins(sizes.to_numpy().astype(float), "decades")}
    for row in plain.group_by("source").aggregate([("bytes", "sum"), ("bytes", "count")]).to_pylist():
        found["sources"][row["source"] or ""] = {"documents": row["bytes_count"], "bytes": row["bytes_sum"]}
    for row in plain.group_by("language").aggregate([("bytes", "count")]).to_pylist():
        found["languages"][row["language"] or "und"] = row["bytes_count"]
    return found


def of_measures(measures: Iterable[Measure]) -> Counts:
    """Histograms of the rules' values, by reason and scale, and how many documents met which limits."""
    found: Counts = {}
    for measure in measures:
        values = measure.values[~np.isnan(measure.values)]
        if not len(values):
            continue
        limits = [limit for limit in (measure.minimum, measure.maximum) if math.isfinite(limit)]
        scale = "shares" if limits and max(map(abs, limits)) <= 1 else "decades"
        entry = found.setdefault(measure.reason, {}).setdefault(scale, {"bins": {}, "limits": {}})
        add(entry["bins"], _bins(values, scale))
        add(entry["limits"], {f"{measure.minimum:.6g} {measure.maximum:.6g}": len(values)})
    return found


def _bins(values: np.ndarray, scale: str) -> dict[str, int]:
    if scale == "shares":
        places = np.floor(np.clip(values, 0, 1) * _SHARE_BINS + 1e-9)
    else:
        places = np.full(len(values), float(_ZERO))
        some = values > 0
        places[some] = np.floor(np.log10(values[some]) * _DECADE_BINS + 1e-9)
    bins, counts = np.unique(places.astype(np.int64), return_counts=True)
    return {str(place): int(count) for place, count in zip(bins, counts, strict=True)}


def bin_range(place: int, scale: str) -> tuple[float, float]:
    """Lowest value of a bin, and the lowest above it."""
    if scale == "shares":
        return place / _SHARE_BINS, (place + 1) / _SHARE_BINS
    if place == _ZERO:
        return 0.0, 0.0
    return 10 ** (place / _DECADE_BINS), 10 ** ((place + 1) / _DECADE_BINS)
