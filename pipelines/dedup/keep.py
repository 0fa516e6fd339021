"""Which one of a set of duplicates stays: a rank for every document, so that the smallest of a set is kept.

Equal ranks fall back on the order of the corpus, so that the choice does not depend on how the work is spread.
"""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

POLICIES = ("first", "longest", "newest", "best_score")


def validate(keep: str, score_field: str | None) -> None:
    """Raises ValueError for a policy that is not known or lacks its field."""
    if keep not in POLICIES:
        raise ValueError(f"keep is {keep}, must be one of {', '.join(POLICIES)}")
    if keep == "best_score" and not score_field:
        raise ValueError("keep is best_score, which needs score_field: a field of the documents' metadata")


def columns(keep: str) -> list[str]:
    """Columns of the documents that their ranks are taken from, beside the text."""
    return ["metadata"] if keep in ("newest", "best_score") else []


def ranks(table: pa.Table, keep: str, score_field: str | None) -> np.ndarray:
    """Rank of every document, (documents,), float64: the smaller, the rather it stays; infinite if it says nothing."""
    if keep == "longest":
        return -pc.fill_null(pc.utf8_length(table["text"]), 0).to_numpy().astype(np.float64)
    if keep == "first":
        return np.zeros(table.num_rows)
    field = "date" if keep == "newest" else score_field
    value = _seconds if keep == "newest" else _number
    return np.array([-value(_field(text, field)) for text in table["metadata"].to_pylist()], np.float64)


def _field(metadata: str | None, name: str) -> Any:
    try:
        found = json.loads(metadata or "{}")
    except ValueError:
        return None
    return found.get(name) if isinstance(found, dict) else None


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return -math.inf
    return -math.inf if math.isnan(number) else number


def _seconds(value: Any) -> float:
    """Unix time of an ISO 8601 date (UTC where it names no zone) or of a number of seconds."""
    if isinstance(value, str):
        try:
            date = datetime.fromisoformat(value.strip())
        except ValueError:
            return _number(value)
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    return _number(value)
