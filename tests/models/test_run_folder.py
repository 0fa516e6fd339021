"""A storage that fails is waited for."""

import pytest

from models.training import run_folder
from models.training.run_folder import patiently


def test_a_storage_that_fails_is_waited_for_and_what_is_not_there_is_not(monkeypatch):
    pauses = []
    monkeypatch.setattr(run_folder.time, "sleep", pauses.append)
    failures = [OSError("away"), PermissionError("no"), OSError("still away")]

    def call(value):
        if failures:
            raise failures.pop(0)
        return value

    assert patiently(call, 7) == 7
    assert pauses == sorted(pauses)
    assert len(pauses) == 3
    failures.append(FileNotFoundError("never was"))
    with pytest.raises(FileNotFoundError):
        patiently(call, 7)
    monkeypatch.setattr(run_folder, "SECONDS", 0.0)
    failures.append(OSError("for good"))
    with pytest.raises(OSError, match="for good"):
        patiently(call, 7)
