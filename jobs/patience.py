"""Waiting for a storage that fails: most of what goes wrong with one is over in a minute."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from jobs.run_folder import StoredRun

log = logging.getLogger("ingot")

P = ParamSpec("P")
T = TypeVar("T")

SECONDS = 120.0  # clients of object stores, which wait by themselves, give up after about as much
_LONGEST_PAUSE = 5.0


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


class PatientRun(StoredRun):
    """A run's folder whose operations wait for a storage that fails."""

    def read_json(self, name: str) -> Any | None:
        """Content of a JSON file, None when it is not there."""
        return patiently(super().read_json, name)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file whole or not at all."""
        patiently(super().write_json, name, value)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file whole or not at all."""
        patiently(super().write_text, name, text)

    def append_line(self, name: str, line: str) -> None:
        """Add a line to a small text file."""
        patiently(super().append_line, name, line)

    def delete(self, name: str) -> None:
        """Delete a file or folder; nothing happens when it is not there."""
        patiently(super().delete, name)

    def checksums(self, folder: str, part: int, of: int) -> dict[str, list]:
        """Size and hash of every ``of``-th file below ``folder`` from the ``part``-th on, by name."""
        return patiently(super().checksums, folder, part, of)
