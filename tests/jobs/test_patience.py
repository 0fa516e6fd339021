"""A run's storage as workers need it: waited for when it fails, left alone when others have it, believed if intact."""

import pickle

import pytest
from pyarrow import fs

from jobs import patience
from jobs.patience import OvertakenError, PatientRun, patiently
from jobs.ray_storage import PatientStorage, _Gathered


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


def test_ray_trains_own_files_wait_for_the_storage_too(tmp_path, monkeypatch):
    """On a disk that fills up: opening succeeds, what is written does not."""
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: None)
    handler = PatientStorage(str(tmp_path))
    system = pickle.loads(pickle.dumps(fs.PyFileSystem(handler)))
    assert system == fs.PyFileSystem(PatientStorage(str(tmp_path / "elsewhere")))
    failures, write = [OSError(28, "full"), OSError(30, "read-only")], _Gathered._write

    def failing(self, content):
        if failures:
            raise failures.pop()
        write(self, content)

    monkeypatch.setattr(_Gathered, "_write", failing)
    system.create_dir(f"{tmp_path}/a/b")
    with system.open_output_stream(f"{tmp_path}/a/b/file") as out:
        out.write(b"12")
        out.write(b"3")
        assert not (tmp_path / "a/b/file").exists()
    assert not failures
    assert system.open_input_stream(f"{tmp_path}/a/b/file").read() == b"123"
    fs.copy_files(
        f"{tmp_path}/a", f"{tmp_path}/c", source_filesystem=fs.LocalFileSystem(), destination_filesystem=system
    )
    assert (tmp_path / "c/b/file").read_bytes() == b"123"
    found = system.get_file_info(fs.FileSelector(f"{tmp_path}/c", recursive=True))
    assert sorted(info.base_name for info in found) == ["b", "file"]
    with pytest.raises(FileNotFoundError):
        system.open_input_file(f"{tmp_path}/never")
