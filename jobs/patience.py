"""A run's storage as workers need it: one that fails is waited for, one that others have taken over is left alone."""

from __future__ import annotations

import os
import socket
import uuid
from typing import Any

from jobs.run_folder import StoredRun
from models.training.run_folder import patiently

GROUP = "group.json"  # of which workers the run is


class OvertakenError(RuntimeError):
    """Another group of workers trains this run now."""


class PatientRun(StoredRun):
    """A run's folder for those who train it.

    Readers wait for a storage that fails: what cannot be reached is not what is not there. Writing is left to the
    callers, who know what can wait; but it is refused once another group of workers has taken the run over, as it may
    after the driver was killed or the network was cut, while workers that nobody needs any more have not noticed yet.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.mark: str | None = None

    def take_over(self) -> None:
        """From now on refuse the others."""
        self.mark = uuid.uuid4().hex
        patiently(super().write_json, GROUP, {"mark": self.mark, "host": socket.gethostname(), "pid": os.getpid()})

    def read_json(self, name: str) -> Any | None:
        """Content of a JSON file, None when it is not there."""
        return patiently(super().read_json, name)

    def checksums(self, folder: str, part: int, of: int) -> dict[str, list]:
        """Size and hash of every ``of``-th file below ``folder`` from the ``part``-th on, by name."""
        return patiently(super().checksums, folder, part, of)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file whole or not at all."""
        self._check()
        super().write_json(name, value)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file whole or not at all."""
        self._check()
        super().write_text(name, text)

    def append_line(self, name: str, line: str) -> None:
        """Add a line to a small text file."""
        self._check()
        super().append_line(name, line)

    def delete(self, name: str) -> None:
        """Delete a file or folder; nothing happens when it is not there."""
        self._check()
        super().delete(name)

    def _check(self) -> None:
        if self.mark is not None and (now := StoredRun.read_json(self, GROUP)) is not None and now["mark"] != self.mark:
            raise OvertakenError(f"{self.folder}: process {now['pid']} on {now['host']} has taken this run over")
