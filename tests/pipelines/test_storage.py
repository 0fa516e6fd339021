import logging
import os
import random
import subprocess
import sys
import threading

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


class Faults:
    """What a real S3 endpoint on the loopback does to its next requests, and which there were."""

    def __init__(self):
        self.uri, self.coming, self.requests = "s3://bucket", [], []

    def wrap(self, app):
        def wrapped(environ, start):
            fault = self.coming.pop(0) if self.coming else None
            self.requests.append(environ["REQUEST_METHOD"])
            socket = environ["werkzeug.socket"]
            if fault == "throttle":
                start("503 Slow Down", [("Content-Type", "application/xml")])
                return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]
            answer = app(environ, start)
            return self._cut(b"".join(answer), socket) if fault == "cut" else answer

        return wrapped

    def _cut(self, data, socket):
        yield data[: len(data) // 2]
        socket.shutdown(2)


@pytest.fixture
def store(monkeypatch):
    pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    faults = Faults()
    server = make_server("127.0.0.1", 0, faults.wrap(DomainDispatcherApplication(create_backend_app)), threaded=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield faults
    server.shutdown()
    boto3.resource("s3").meta.client.close()


@pytest.fixture
def bucket(store):
    return store.uri


def test_throttling_and_broken_connections_of_an_object_store_are_waited_out(store):
    data = random.Random(0).randbytes(300_000)
    uri = f"{store.uri}/folder/a.bin"
    store.coming += ["throttle", "cut", "throttle"]
    storage.write_bytes(uri, data)
    store.coming += ["throttle", "cut", "throttle"]
    assert storage.read_bytes(uri) == data
    store.coming += ["throttle"]
    assert storage.exists(uri)
    store.coming += [None, None, "cut"]
    assert [f.uri for f in storage.list_files(f"{store.uri}/folder")] == [uri]
    assert not store.coming
    store.coming += ["throttle"]
    storage.delete(uri)
    assert not storage.exists(uri)


def test_a_large_file_is_sent_in_parts_while_it_is_written(store):
    data = random.Random(0).randbytes(11_000_000)
    uri = f"{store.uri}/large.bin"
    store.coming += ["throttle", "cut", "throttle", "cut", None, "cut"]  # to begin the upload, its parts, to end it
    with storage.open_stream(uri) as out:
        for at in range(0, len(data), 3_000_000):
            out.write(data[at : at + 3_000_000])
        assert not storage.exists(uri)
    assert not store.coming
    assert storage.read_bytes(uri) == data


def test_lines_that_several_processes_add_to_a_file_of_an_object_store_are_all_there(store, monkeypatch):
    uri = f"{store.uri}/run/events.jsonl"
    for number, process in enumerate("abacba"):
        monkeypatch.setattr(storage, "_writer", lambda _, process=process: process)
        storage.append_line(uri, f"{number} of {process}")
    assert storage.read_lines(uri) == [["0 of a", "2 of a", "5 of a"], ["1 of b", "4 of b"], ["3 of c"]]


def test_a_store_that_refuses_for_good_is_an_error_of_the_storage(store, monkeypatch):
    monkeypatch.setattr(storage, "_S3_ATTEMPTS", 2)
    store.coming += ["throttle"] * 20
    with pytest.raises(OSError, match="AWS Error") as error:
        storage.read_bytes(f"{store.uri}/a")
    assert storage.failed(error.value)
    assert len(store.coming) == 18


@pytest.mark.parametrize("size", [10, 40_000_000])
def test_a_file_of_an_object_store_stays_as_it_was_when_writing_it_anew_fails(store, size):
    uri = f"{store.uri}/a.bin"
    storage.write_bytes(uri, b"the good one")

    def killed_in_between():
        with storage.open_output(uri) as out:
            for _ in range(10):
                out.write(b"x" * (size // 10))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed_in_between()
    assert storage.read_bytes(uri) == b"the good one"
    with storage.open_output(uri) as out:
        for _ in range(10):
            out.write(b"y" * (size // 10))
    assert storage.read_bytes(uri) == b"y" * size


def test_file_names_that_are_no_utf8_and_links_do_not_stop_a_listing(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "wb") as file:
        file.write(b"x")
    storage.write_bytes(str(tmp_path / "deep" / "a.txt"), b"xy")
    os.symlink("nowhere", tmp_path / "broken.txt")
    os.symlink(tmp_path, tmp_path / "deep" / "up")
    os.symlink("deep", tmp_path / "link")
    names = [os.fsencode(os.path.relpath(f.uri, tmp_path)) for f in storage.list_files(str(tmp_path))]
    assert names == [b"caf\xe9.txt", b"deep/a.txt", b"link/a.txt"]


def test_an_unknown_scheme_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ftp://host: paths may be local or start with s3://"):
        storage.exists("ftp://host/a")


def test_an_object_store_behaves_like_a_folder(bucket):
    root = f"{bucket}/project"
    storage.write_bytes(f"{root}/a.txt", b"hello")
    storage.append_line(f"{root}/deep/events.jsonl", "one")
    storage.append_line(f"{root}/deep/events.jsonl", "two")
    storage.write_bytes(f"{root}/deep/b.txt", b"hello")
    assert [f.uri for f in storage.list_files(root)][:2] == [f"{root}/a.txt", f"{root}/deep/b.txt"]
    assert [(f.uri, f.size) for f in storage.list_files(f"{root}/**/b.*")] == [(f"{root}/deep/b.txt", 5)]
    assert storage.read_lines(f"{root}/deep/events.jsonl") == [["one", "two"]]

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


@pytest.fixture
def google(monkeypatch):
    """A Google Cloud Storage of our own that throttles requests and drops connections."""
    program = [sys.executable, os.path.join(os.path.dirname(__file__), "google_storage.py")]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as server:
        port = server.stdout.readline().strip()
        monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", f"http://127.0.0.1:{port}")
        yield "gs://bucket/project"
        server.terminate()


def test_google_s_object_store_behaves_like_a_folder_and_is_waited_for(google):
    names = ["a.txt", "100%25 é.txt", "deep/a?b#c.txt"]
    for name in names:
        storage.write_bytes(f"{google}/{name}", name.encode() * 100_000)
    assert sorted(f.uri for f in storage.list_files(google)) == sorted(f"{google}/{name}" for name in names)
    assert [f.uri for f in storage.list_files(f"{google}/**/a?b*.txt")] == [f"{google}/deep/a?b#c.txt"]
    for name in names:
        assert storage.read_bytes(f"{google}/{name}") == name.encode() * 100_000

    def killed_in_between():
        with storage.open_output(f"{google}/a.txt") as out:
            out.write(b"half of")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        killed_in_between()
    assert storage.read_bytes(f"{google}/a.txt").startswith(b"a.txta.txt")
    with storage.parquet_writer(f"{google}/part.parquet", pa.schema([("n", pa.int64())])) as writer:
        writer.write_table(pa.table({"n": [1, 2, 3]}))
    assert storage.open_parquet(f"{google}/part.parquet").read()["n"].to_pylist() == [1, 2, 3]
    for line in ("one", "two"):
        storage.append_line(f"{google}/events.jsonl", line)
    assert storage.read_lines(f"{google}/events.jsonl") == [["one", "two"]]
    with storage.open_stream(f"{google}/large.bin") as out:
        for _ in range(3):
            out.write(b"x" * 6_000_000)
    assert storage.read_bytes(f"{google}/large.bin") == b"x" * 18_000_000
    with pytest.raises(FileNotFoundError, match=f"{google}/none"):
        storage.read_bytes(f"{google}/none")
    storage.delete(f"{google}/a.txt")
    assert not storage.exists(f"{google}/a.txt")
    storage.delete(google)
    assert not storage.exists(google)
