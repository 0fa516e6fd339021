"""The harness's descriptions of its tasks, read once for each version of them rather than at each start.

They are some 15,000 YAML files, which take seconds to parse; what was read lies in the user's cache, in a file that is
used as long as no description changes, comes or goes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from lm_eval import tasks
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind, TaskIndex

log = logging.getLogger("ingot")


@functools.lru_cache(maxsize=1)
def manager() -> TaskManager:
    """The harness's own, with all of its tasks."""
    root = os.path.dirname(tasks.__file__)
    state = _state_of(root)
    file = _file(root)
    found = _read(file, state)
    if found is None:
        found = TaskIndex().build([Path(root)])
        _write(file, state, found)
    with mock.patch.object(TaskIndex, "build", return_value=found):
        return TaskManager()


def _file(root: str) -> str:
    """Where what was read of a folder lies: of each installation apart, so that two do not take turns."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(caches, "ingot", f"tasks-{hashlib.sha256(root.encode()).hexdigest()[:16]}.json")


def _state_of(root: str) -> str:
    """A digest of names, sizes and times of the files in a folder."""
    digest = hashlib.sha256()
    for path, size, changed in sorted(_files(root)):
        digest.update(f"{path}\0{size}\0{changed}\n".encode())
    return digest.hexdigest()


def _files(folder: str) -> Iterator[tuple[str, int, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                if entry.name != "__pycache__":
                    yield from _files(entry.path)
            else:
                stat = entry.stat()
                yield entry.path, stat.st_size, stat.st_mtime_ns


def _read(file: str, state: str) -> dict[str, Entry] | None:
    try:
        with open(file, encoding="utf-8") as lines:
            kept = json.load(lines)
        if kept["state"] != state:
            return None
        return {
            name: Entry(name, Kind[kind], path and Path(path), config, set(tags))
            for name, kind, path, config, tags in kept["tasks"]
        }
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.debug("%s cannot be read, so the harness's tasks are: %s", file, error)
        return None


def _write(file: str, state: str, found: dict[str, Entry]) -> None:
    try:
        content = json.dumps({"state": state, "tasks": list(_rows(found.values()))})
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=os.path.dirname(file), delete=False) as part:
            try:
                part.write(content)
                part.close()
                os.replace(part.name, file)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(part.name)
                raise
    except (OSError, TypeError, ValueError) as error:  # such as a home that cannot be written to
        log.debug("the harness's tasks are not kept in %s: %s", file, error)


def _rows(entries: Iterable[Entry]) -> Iterator[tuple[str, str, str | None, dict[str, Any] | None, list[str]]]:
    for entry in entries:
        yield entry.name, entry.kind.name, entry.yaml_path and str(entry.yaml_path), entry.cfg, sorted(entry.tags)
