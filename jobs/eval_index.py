"""The harness's descriptions of its tasks, read once for each version of them rather than at each start.

They are some 15,000 YAML files, which take seconds to parse; what was read lies in the user's cache, in a file that is
used as long as no description changes, comes or goes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from lm_eval import tasks
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind, TaskIndex

from pipelines import storage

log = logging.getLogger("ingot")

_one_at_a_time = threading.Lock()


def manager() -> TaskManager:
    """The harness's own, with all of its tasks."""
    with _one_at_a_time:
        return _manager()


@functools.lru_cache(maxsize=1)
def _manager() -> TaskManager:
    root = os.path.dirname(tasks.__file__)
    file, state = _file(root), _state_of(root)
    found = _read(file, state)
    if found is None:
        found = TaskIndex().build([Path(root)])
        _write(file, state, found)
    with mock.patch.object(TaskIndex, "build", return_value=found):
        return TaskManager()


def _file(root: str) -> str:
    """Where what was read of a folder lies: of each installation apart, so that two do not take turns."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(caches, "ingot", f"tasks-{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}.json")


def _state_of(root: str) -> str | None:
    """A digest of names, sizes, modes and times of the files in a folder; None where not all can be looked at."""
    try:
        found = sorted(_files(root))
    except OSError as error:
        log.debug("the harness's tasks are read, as not all of their files can be looked at: %s", error)
        return None
    return hashlib.sha256(repr(found).encode()).hexdigest()


def _files(folder: str) -> Iterator[tuple[bytes, int, int, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if entry.name != "__pycache__":
                    yield from _files(entry.path)
                continue
            try:
                stat = entry.stat()
            except OSError:  # a link to nothing
                stat = entry.stat(follow_symlinks=False)
            yield os.fsencode(entry.path), stat.st_size, stat.st_mode, stat.st_mtime_ns


def _read(file: str, state: str | None) -> dict[str, Entry] | None:
    if state is None or not os.path.isfile(file):
        return None
    try:
        kept = json.loads(storage.read_bytes(file))
        if kept["state"] != state:
            return None
        return {
            name: Entry(name, Kind[kind], path and Path(path), config, set(tags))
            for name, kind, path, config, tags in kept["tasks"]
        }
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        log.debug("%s cannot be read, so the harness's tasks are: %s", file, error)
        return None


def _write(file: str, state: str | None, found: dict[str, Entry]) -> None:
    if state is None or not os.path.isabs(file):  # a user without a home
        return
    entries = [
        (one.name, one.kind.name, one.yaml_path and str(one.yaml_path), one.cfg, sorted(one.tags))
        for one in found.values()
    ]
    try:
        storage.write_bytes(file, json.dumps({"state": state, "tasks": entries}).encode())
    except (OSError, TypeError, ValueError) as error:  # such as a home that cannot be written to
        log.debug("the harness's tasks are not kept in %s: %s", file, error)
