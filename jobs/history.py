"""A run's metrics as columns: read again cheaply while they grow, and what of them counts."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json as pj

from jobs.run_folder import StoredRun
from pipelines import storage

_COLUMNS = (
    "step", "time", "data_step", "data_steps", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "mfu",
    "seconds", "memory_gb", "skipped", "validation_loss", "validation_bits_per_byte", "undone_after",
)  # fmt: skip
_SCHEMA = pa.schema([(name, pa.bool_() if name == "skipped" else pa.float64()) for name in _COLUMNS])

Columns = dict[str, np.ndarray]
"""float64 columns of the same length by name; NaN where a row has no such number."""


class History:
    """All metrics rows of a run in the order of their time.

    Attributes:
        steps: the rows of training steps, those included that were undone.
        counts: which of them count: no rollback or restart has undone them, (n,) bool.
        validation: the rows of validations that count, by step.
    """

    def __init__(self, folder: StoredRun) -> None:
        self.folder = folder
        self._files: dict[str, tuple[Any, Columns]] = {}
        self._arrange()

    def update(self) -> bool:
        """Read what was written since the last time; False when there is nothing new.

        Raises:
            OSError: storage fails.
        """
        try:
            files = storage.list_files(self.folder.uri("metrics"))
        except FileNotFoundError:  # nothing was written yet
            files = []
        changed = len(files) != len(self._files)
        kept = {}
        for file in files:
            stamp = (file.size, file.mtime)
            known = self._files.get(file.uri)
            if known is None or known[0] != stamp:
                known, changed = (stamp, parse(storage.read_bytes(file.uri))), True
            kept[file.uri] = known
        self._files = kept
        if changed:
            self._arrange()
        return changed

    def _arrange(self) -> None:
        parts = [columns for _, columns in self._files.values()] or [parse(b"")]
        rows = {name: np.concatenate([part[name] for part in parts]) for name in _COLUMNS}
        if np.any(np.diff(rows["time"]) < 0):
            order = np.argsort(rows["time"], kind="stable")
            rows = {name: column[order] for name, column in rows.items()}
        valid = counting(rows["step"], rows["undone_after"])
        is_step = np.isfinite(rows["lr"])  # also one whose loss is not finite
        self.steps = {name: column[is_step] for name, column in rows.items()}
        self.counts = _newest_of_each(self.steps["step"], valid[is_step])
        measured = np.isfinite(rows["validation_loss"]) & valid
        self.validation = by_step({name: column[measured] for name, column in rows.items()})

    def valid(self) -> Columns:
        """The training steps that count, by step."""
        return by_step({name: column[self.counts] for name, column in self.steps.items()})


def counting(step: np.ndarray, undone_after: np.ndarray) -> np.ndarray:
    """Which rows nothing has undone: not those that a later row with ``undone_after`` lies before, (n,) bool."""
    valid = np.isnan(undone_after)
    limit, before = np.inf, len(step)
    for place in np.flatnonzero(~valid)[::-1]:  # from the last on, each stretch once
        valid[place:before] &= step[place:before] <= limit
        limit, before = min(limit, undone_after[place]), place
    valid[:before] &= step[:before] <= limit
    return valid


def _newest_of_each(step: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """``valid`` without the rows whose step a later valid row has too: a crash can leave some."""
    if np.all(np.diff(step[valid]) > 0):
        return valid.copy()
    places = np.flatnonzero(valid)[::-1]
    _, first = np.unique(step[places], return_index=True)
    newest = np.zeros(len(step), bool)
    newest[places[first]] = True
    return newest


def runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """First place, and the one after the last, of each run of places that are set."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def by_step(columns: Columns) -> Columns:
    """The rows sorted by step, the newest of each."""
    newest = _newest_of_each(columns["step"], np.ones(len(columns["step"]), bool))
    order = np.argsort(columns["step"][newest], kind="stable")
    return {name: column[newest][order] for name, column in columns.items()}


def parse(text: bytes) -> Columns:
    """The rows of a metrics file; a line that a crash cut short is left out."""
    if not text.strip():
        return {name: np.empty(0) for name in _COLUMNS}
    options = pj.ParseOptions(explicit_schema=_SCHEMA, unexpected_field_behavior="ignore")
    try:
        table = pj.read_json(pa.BufferReader(text), parse_options=options)
    except pa.ArrowInvalid:
        table = pa.Table.from_pylist(_readable(text), _SCHEMA)
    return {name: _numbers(table[name]) for name in _COLUMNS}


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return column.cast(pa.float64()).to_numpy()


def _readable(text: bytes) -> list[dict[str, Any]]:
    rows = []
    for line in text.decode(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append({name: row.get(name) for name in _COLUMNS})
    return rows
