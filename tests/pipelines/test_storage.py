import os

import pyarrow as pa
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


def test_a_folder_whose_name_looks_like_a_glob_is_listed(tmp_path):
    storage.write_bytes(str(tmp_path / "run [1]" / "a.txt"), b"x")
    assert [storage.file_name(f.uri) for f in storage.list_files(str(tmp_path / "run [1]"))] == ["a.txt"]


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
    with open(uri, "ab") as file:
        file.write(b"cut sho")
    storage.append_line(uri, "three")
    assert storage.read_bytes(uri) == b"one\ntwo\ncut sho\nthree\n"
    storage.delete(str(tmp_path / "run"))
    storage.delete(str(tmp_path / "run"))
    assert not storage.exists(uri)


@pytest.fixture
def bucket(monkeypatch):
    """A real S3 endpoint on the loopback."""
    server_module = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield "s3://bucket"
    server.stop()


def test_an_object_store_behaves_like_a_folder(bucket):
    root = f"{bucket}/project"
    storage.write_bytes(f"{root}/a.txt", b"hello")
    storage.append_line(f"{root}/deep/events.jsonl", "one")
    storage.append_line(f"{root}/deep/events.jsonl", "two")
    assert [f.uri for f in storage.list_files(root)] == [f"{root}/a.txt", f"{root}/deep/events.jsonl"]
    assert [(f.uri, f.size) for f in storage.list_files(f"{root}/**/*.jsonl")] == [(f"{root}/deep/events.jsonl", 8)]
    assert storage.read_bytes(f"{root}/deep/events.jsonl") == b"one\ntwo\n"

    def killed_in_between():
        with storage.open_output(f"{root}/half") as out:
            out.write(b"half of")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        killed_in_between()
    assert not storage.exists(f"{root}/half")
    with storage.parquet_writer(f"{root}/part.parquet", pa.schema([("n", pa.int64())])) as writer:
        writer.write_table(pa.table({"n": [1, 2, 3]}))
    assert storage.open_parquet(f"{root}/part.parquet").read()["n"].to_pylist() == [1, 2, 3]
    for name in ("Moby Dick.txt", "100%25 é.txt", "a?b#c.txt"):
        storage.write_bytes(f"{root}/books/{name}", name.encode())
    for pattern in (f"{root}/books", f"{root}/books/*.txt"):
        files = storage.list_files(pattern)
        assert sorted(storage.read_bytes(file.uri).decode() for file in files) == sorted(
            storage.file_name(file.uri) for file in files
        )
        assert len(files) == 3
    assert len(storage.list_files(f"{root}/books/[am]*.txt")) == 1
    storage.delete(root)
    assert not storage.exists(root)
