"""A run's folder on storage, as the training loop wants it; and what is read from it afterwards."""

from __future__ import annotations

import contextlib
import heapq
import json
from collections.abc import Iterable
from typing import Any, BinaryIO

import xxhash

from pipelines import storage


class StoredRun:
    """``runs/<name>/`` of a workspace, local or on an object store (``models.training.run_folder.RunFolder``)."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def uri(self, name: str) -> str:
        """Full path or URI of a file or folder of the run."""
        return storage.join(self.folder, name)

    def read_json(self, name: str) -> Any | None:
        """Content of a JSON file, None when it is not there."""
        return storage.json_if_there(self.uri(name))

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file whole or not at all."""
        storage.write_json(self.uri(name), value)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file whole or not at all."""
        storage.write_bytes(self.uri(name), text.encode())

    def append_line(self, name: str, line: str) -> None:
        """Add a line to a small text file."""
        storage.append_line(self.uri(name), line)

    def delete(self, name: str) -> None:
        """Delete a file or folder; nothing happens when it is not there."""
        storage.delete(self.uri(name))

    def open_input(self, name: str) -> BinaryIO:
        """A file opened for reading in bytes, with random access."""
        return storage.open_input(self.uri(name))

    def open_stream(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """A large file to write bytes into; a part of it may stay when that fails."""
        return storage.open_stream(self.uri(name))

    def checksums(self, folder: str, part: int, of: int) -> dict[str, list]:
        """Size and xxh3-64 of every ``of``-th file below ``folder`` from the ``part``-th on, by name."""
        sums = {}
        for file in storage.list_files(self.uri(folder), hidden=True)[part::of]:
            digest = xxhash.xxh3_64()
            with storage.open_input(file.uri) as data:
                while chunk := data.read(1 << 24):
                    digest.update(chunk)
            sums[storage.file_name(file.uri)] = [file.size, digest.hexdigest()]
        return sums

    def events(self) -> list[dict[str, Any]]:
        """The run's events in the order of their time; a line cut short by a crash is left out."""
        return self.lines("events.jsonl")

    def lines(self, name: str) -> list[dict[str, Any]]:
        """What stands in a file with a JSON object on each line; nothing when it is not there.

        On object stores, where each process has a part of it, in the order of their ``time``.
        """
        parts = [_rows(lines) for lines in storage.read_lines(self.uri(name))]
        return list(heapq.merge(*parts, key=lambda row: row.get("time", 0)))

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of all metrics files in the order of their time, undone steps included."""
        rows = [row for uri in self._metrics_files() for row in _read(uri)]
        return sorted(rows, key=lambda row: row["time"])

    def newest_metrics(self) -> list[dict[str, Any]]:
        """The rows of the metrics file that was begun last, in the order of their time."""
        return [row for uri in self._metrics_files()[-1:] for row in _read(uri)]

    def _metrics_files(self) -> list[str]:
        try:
            return [file.uri for file in storage.list_files(self.uri("metrics"))]
        except FileNotFoundError:  # nothing was written yet
            return []


def valid_steps(rows: list[dict[str, Any]], key: str = "loss") -> dict[int, dict[str, Any]]:
    """The rows that have ``key``, by step, without those that a rollback or a resume has undone."""
    valid: dict[int, dict[str, Any]] = {}
    for row in rows:
        if "undone_after" in row:
            valid = {step: kept for step, kept in valid.items() if step <= row["undone_after"]}
        elif row.get(key) is not None:
            valid[row["step"]] = row
    return dict(sorted(valid.items()))


def _read(uri: str) -> list[dict[str, Any]]:
    return _rows(storage.read_bytes(uri).decode().splitlines())


def _rows(lines: Iterable[str]) -> list[dict[str, Any]]:
    """What of the lines is whole."""
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
