import os

import pytest

from pipelines import storage


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    uri = str(tmp_path / "folder" / "file.txt")

    def killed_in_between():
        with storage.open_output(uri) as out:
            out.write(b"half of")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        killed_in_between()
    assert not storage.exists(uri)
    assert os.listdir(tmp_path / "folder") == []
    storage.write_bytes(uri, b"all of it")
    assert storage.read_bytes(uri) == b"all of it"


def test_globs_match_like_a_shell_and_come_sorted(tmp_path):
    for name in ("b.txt", "a.txt", "a.csv", "deep/er/c.txt", ".hidden.txt", "_private/d.txt"):
        storage.write_bytes(str(tmp_path / name), b"x")

    def names(pattern):
        return [os.path.relpath(f.uri, tmp_path) for f in storage.list_files(f"{tmp_path}/{pattern}")]

    assert names("*.txt") == ["a.txt", "b.txt"]
    assert names("**/*.txt") == ["a.txt", "b.txt", "deep/er/c.txt"]
    assert [os.path.relpath(f.uri, tmp_path) for f in storage.list_files(str(tmp_path))] == [
        "a.csv",
        "a.txt",
        "b.txt",
        "deep/er/c.txt",
    ]
    with pytest.raises(FileNotFoundError, match="no file matches"):
        names("*.zip")


def test_a_broken_json_file_is_named(tmp_path):
    uri = str(tmp_path / "manifest.json")
    storage.write_bytes(uri, b"{")
    with pytest.raises(ValueError, match="manifest.json: not a JSON file"):
        storage.read_json(uri)


def test_lines_are_added_and_folders_deleted(tmp_path):
    uri = str(tmp_path / "run" / "events.jsonl")
    storage.append_line(uri, "one")
    storage.append_line(uri, "two")
    assert storage.read_bytes(uri) == b"one\ntwo\n"
    storage.delete(str(tmp_path / "run"))
    storage.delete(str(tmp_path / "run"))
    assert not storage.exists(uri)
