"""A run's storage as workers need it: waited for when it fails, left alone when others have it."""

import pickle

import pytest
from pyarrow import fs

from jobs.patience import OvertakenError, PatientRun
from jobs.ray_storage import PatientStorage, _Gathered
from models.training import run_folder


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


def test_ray_trains_own_files_wait_for_the_storage_too(tmp_path, monkeypatch):
    """On a disk that fills up: opening succeeds, what is written does not."""
    monkeypatch.setattr(run_folder.time, "sleep", lambda seconds: None)
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
