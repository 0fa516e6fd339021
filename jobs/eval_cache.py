"""Finished items of evaluations on storage: an evaluation that is killed, or asked for again, repeats none of them.

An item is one log-likelihood or one generated text of one model. What it hangs on, text and sampling, is its key; the
model, with its tokenizer, precision and kind of device, is the folder, and so is ``MEANING``: what code gave that meant
something else is not taken.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pipelines import storage

if TYPE_CHECKING:
    from jobs.harness import Workers
    from jobs.local_workers import TextRequest

log = logging.getLogger("ingot")

MEANING = 2
"""Of a request: to be raised when what encodes, scores or continues texts comes to another answer than before."""

_REMOTE_EVERY = 20.0  # seconds between the objects that are written where files cannot grow
_TOLD_EVERY = 10.0


def cache_folder(folder: str, fingerprint: str) -> str:
    """Where the finished items of one model are, below the folder of what was measured of a run or model."""
    return storage.join(folder, "cache", f"{fingerprint}-{MEANING}")


class FinishedItems:
    """What a model's items came to, by key; grows by lines in a file of this process.

    Args:
        folder: of one model, local or on an object store.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.items: dict[str, Any] = {}
        self._lines: list[str] = []
        self._written = time.monotonic()
        self._out: Any = None
        for line in _lines(folder):
            try:
                key, value = json.loads(line)
            except ValueError:  # empty, or cut short when its writer was killed
                continue
            self.items[key] = value

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.flush()
        if self._out is not None:
            self._out.close()
            self._out = None

    def add(self, key: str, value: Any) -> None:
        """Remember an item, on a disk at once."""
        self.items[key] = value
        self._lines.append(json.dumps([key, value], ensure_ascii=False) + "\n")
        if not storage.is_remote(self.folder) or time.monotonic() - self._written > _REMOTE_EVERY:
            self.flush()

    def flush(self) -> None:
        """Write what is not written yet."""
        if not self._lines:
            return
        text = "".join(self._lines)
        self._lines, self._written = [], time.monotonic()
        uri = storage.join(self.folder, f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.jsonl")
        if (path := storage.local_path(uri)) is None:
            storage.write_bytes(uri, text.encode())
            return
        if self._out is None:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            self._out = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed at the end of the context
        self._out.write(text)
        self._out.flush()


def _lines(folder: str) -> Iterator[str]:
    try:
        files = storage.list_files(folder)
    except FileNotFoundError:
        return
    for file in files:
        yield from storage.read_bytes(file.uri).decode(errors="replace").split("\n")


class CachedWorkers:
    """``jobs.harness.Workers`` that asks others only for what is not finished yet, and keeps what they give.

    Args:
        workers: that do the work.
        finished: the model's items.
    """

    def __init__(self, workers: Workers, finished: FinishedItems) -> None:
        self.workers, self.finished = workers, finished
        self.asked = self.taken = 0  # items, and those of them that were finished before

    def log_likelihoods(self, requests: Sequence[tuple[str, str]]) -> Iterator[tuple[int, tuple[float, bool, bool]]]:
        """As of ``Workers``; equal requests are one."""
        key = _Keys("l")
        keys = [key(context, continuation) for context, continuation in requests]
        for index, value in self._missing(keys, requests, self.workers.log_likelihoods, "log-likelihoods"):
            yield index, tuple(value)

    def rolling_log_likelihoods(self, texts: Sequence[str]) -> Iterator[tuple[int, float]]:
        """As of ``Workers``; equal texts are one."""
        key = _Keys("r")
        keys = [key(text, "") for text in texts]
        return self._missing(keys, texts, self.workers.rolling_log_likelihoods, "texts' log-likelihoods")

    def generate(self, requests: Sequence[TextRequest]) -> Iterator[tuple[int, tuple[str, bool]]]:
        """As of ``Workers``; equal requests, seed included, are one."""
        key = _Keys("g")
        keys = [
            key(prompt, json.dumps([list(until), _plain(sampling)], sort_keys=True))
            for prompt, until, sampling in requests
        ]
        for index, value in self._missing(keys, requests, self.workers.generate, "texts"):
            yield index, tuple(value)

    def _missing(self, keys: list[str], requests: Sequence[Any], work: Any, what: str) -> Iterator[tuple[int, Any]]:
        places: dict[str, list[int]] = {}
        for index, key in enumerate(keys):
            places.setdefault(key, []).append(index)
        to_do = [key for key in places if key not in self.finished.items]
        self.asked += len(places)
        self.taken += len(places) - len(to_do)
        if len(to_do) < len(places):
            log.info("evaluate: %d of %d %s are finished already", len(places) - len(to_do), len(places), what)
        for key in places.keys() - set(to_do):
            for index in places[key]:
                yield index, self.finished.items[key]
        asked = [requests[places[key][0]] for key in to_do]
        for place, value in _told(work(asked) if asked else (), len(asked), what):
            key = to_do[place]
            self.finished.add(key, value)
            for index in places[key]:
                yield index, value


def _told(results: Iterable[tuple[int, Any]], total: int, what: str) -> Iterator[tuple[int, Any]]:
    """The same, with a line in the log every few seconds."""
    began = told = time.monotonic()
    for done, result in enumerate(results, 1):
        yield result
        now = time.monotonic()
        if now - told >= _TOLD_EVERY or (done == total and told > began):
            told = now
            speed = done / (now - began)
            left = timedelta(seconds=round((total - done) / speed))
            log.info("evaluate: %s of %s %s, %.4g/s, %s left", f"{done:,}", f"{total:,}", what, speed, left)


def _plain(sampling: Any) -> dict[str, Any]:
    """A sampling as JSON has it."""
    return {name: sorted(v) if isinstance(v, frozenset) else v for name, v in dataclasses.asdict(sampling).items()}


class _Keys:
    """16 bytes of a hash as hex digits, for each request; what follows the one before on its context is cheap."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.first: str | None = None
        self.begun: Any = None

    def __call__(self, first: str, second: str) -> str:
        if first is not self.first:
            text = first.encode(errors="surrogatepass")
            self.begun = hashlib.blake2b(f"{self.kind} {len(text)} ".encode() + text, digest_size=16)
            self.first = first
        digest = self.begun.copy()
        digest.update(second.encode(errors="surrogatepass"))
        return digest.hexdigest()
