"""The folder that a run is kept in, as training sees it, and how a storage that fails is waited for.

Without torch, so that whoever only starts a run can use it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, BinaryIO, ParamSpec, Protocol, TypeVar

log = logging.getLogger("ingot")

P = ParamSpec("P")
T = TypeVar("T")

SECONDS = 120.0  # clients of object stores, which wait by themselves, give up after about as much
_LONGEST_PAUSE = 5.0


class RunFolder(Protocol):
    """Where a run keeps its files: a local folder or an object store, handed in by whoever starts the loop."""

    def uri(self, name: str) -> str:
        """Full path or URI of a file or folder of the run."""

    def read_json(self, name: str) -> Any | None:
        """Content of a JSON file, None when it is not there."""

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file whole or not at all."""

    def write_text(self, name: str, text: str) -> None:
        """Write a text file whole or not at all."""

    def append_line(self, name: str, line: str) -> None:
        """Add a line to a small text file."""

    def delete(self, name: str) -> None:
        """Delete a file or folder; nothing happens when it is not there."""

    def open_input(self, name: str) -> BinaryIO:
        """A file opened for reading in bytes, with random access."""

    def open_stream(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A large file to write bytes into; a part of it may stay when that fails."""

    def checksums(self, folder: str, part: int, of: int) -> dict[str, list]:
        """Size and hash of every ``of``-th file below ``folder`` from the ``part``-th on, by name."""


def patiently(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """``call`` with its arguments, again and again while the storage fails, for ``SECONDS``.

    Raises:
        FileNotFoundError: of the call; to wait for what was never there would be in vain.
        OSError: of the last call.
    """
    deadline, pause = time.monotonic() + SECONDS, 0.1
    while True:
        try:
            return call(*args, **kwargs)
        except FileNotFoundError:
            raise
        except OSError as error:
            if time.monotonic() + pause > deadline:
                raise
            if pause >= 1:
                log.warning("storage: %s; tried again for %.0f s more", error, deadline - time.monotonic())
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
