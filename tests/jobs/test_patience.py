"""A run's storage as workers need it: waited for when it fails, left alone when others have it, believed if intact."""

import pytest

from jobs import patience
from jobs.patience import OvertakenError, PatientRun, patiently


def test_a_storage_that_fails_is_waited_for_and_what_is_not_there_is_not(monkeypatch):
    pauses = []
    monkeypatch.setattr(patience.time, "sleep", pauses.append)
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
    monkeypatch.setattr(patience, "SECONDS", 0.0)
    failures.append(OSError("for good"))
    with pytest.raises(OSError, match="for good"):
        patiently(call, 7)


def test_whoever_was_overtaken_writes_no_more(tmp_path):
    old, new = PatientRun(str(tmp_path)), PatientRun(str(tmp_path))
    old.take_over()
    old.write_json("ledger.json", {"by": "old"})
    new.take_over()
    new.write_json("ledger.json", {"by": "new"})
    for write in (
        lambda: old.write_json("ledger.json", {"by": "old"}),
        lambda: old.append_line("events.jsonl", "{}"),
        lambda: old.write_text("metrics/1.jsonl", "{}"),
        lambda: old.delete("ledger.json"),
    ):
        with pytest.raises(OvertakenError, match="has taken this run over"):
            write()
    assert old.read_json("ledger.json") == {"by": "new"}


def test_a_receipt_with_any_flipped_bit_is_no_receipt(tmp_path):
    run = PatientRun(str(tmp_path))
    name = "checkpoints/step-00000010/checkpoint.json"
    receipt = {"state": {"step": 10, "skips": [[3, 5]]}, "loss": 0.1 + 0.2, "files": {"a": [1, "ff"]}}
    run.write_json(name, receipt)
    assert run.read_json(name) == receipt
    path = tmp_path / name
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        # Or nothing was changed: white space, or a digit that a float is too short for.
        assert run.read_json(name) in (None, receipt), content[place - 10 : place + 10]
    path.write_bytes(content[: len(content) // 2])
    assert run.read_json(name) is None
    assert run.read_json("checkpoints/step-00000020/checkpoint.json") is None
