import io
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import download, storage


@pytest.fixture
def waits(monkeypatch):
    """The waits that were asked for, none of which is taken."""
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    return waits


DATA = random.Random(0).randbytes(1_500_000)


def test_a_broken_connection_is_taken_up_at_the_byte_where_it_broke(server, waits):
    server.files["/a"] = DATA
    server.faults += [("cut", 400_000), ("cut", 0), ("cut", 700_001)]
    with storage.open_input(f"{server.uri}/a") as file:
        assert file.read() == DATA
        assert file.size() == len(DATA)
    asked = [wanted for _, wanted, _ in server.requests]
    assert asked == [None, "bytes=400000-", "bytes=400000-", "bytes=1100001-"]
    assert all("ingot" in agent for _, _, agent in server.requests)
    assert len(waits) == 3


def test_a_server_that_ignores_ranges_costs_reading_up_to_there_again(server, waits):
    server.files["/a"], server.ranges = DATA, False
    server.faults += [("cut", 600_000), ("cut", 900_000)]
    assert storage.read_bytes(f"{server.uri}/a") == DATA
    assert [wanted for _, wanted, _ in server.requests] == [None, "bytes=600000-", "bytes=900000-"]


def test_throttling_is_waited_out_for_as_long_as_the_server_says_or_twice_as_long_each_time(server, waits):
    server.files["/a"] = DATA
    server.faults += [("status", 503), ("status", 503), ("status", 503), ("status", 429, {"Retry_After": 30})]
    server.faults += [("status", 503, {"Retry_After": "Fri, 31 Dec 1999 23:59:59 GMT"})]
    assert storage.read_bytes(f"{server.uri}/a") == DATA
    for wait, (least, most) in zip(waits, [(0.25, 0.5), (0.5, 1), (1, 2), (30, 30.5), (4, 8)], strict=True):
        assert least <= wait <= most


def test_what_cannot_be_had_is_an_error_that_names_the_file_and_why(server, waits):
    with pytest.raises(FileNotFoundError, match="/missing"):
        storage.open_input(f"{server.uri}/missing")
    assert not waits
    assert not storage.exists(f"{server.uri}/missing")
    server.faults.append(("status", 403))
    with pytest.raises(OSError, match="HTTP status 403") as refused:
        storage.open_input(f"{server.uri}/a")
    assert storage.failed(refused.value)
    assert not waits
    server.faults += [("status", 503)] * 100
    with pytest.raises(download.DownloadError, match=r"HTTP status 503 .* after 9 attempts.*/a"):
        storage.open_input(f"{server.uri}/a")
    assert 60 < sum(waits) < 200
    server.faults.clear()
    with pytest.raises(ValueError, match="can be read one by one, but not listed, written or deleted"):
        storage.write_bytes(f"{server.uri}/a", b"")


def test_a_file_that_changes_while_it_is_read_is_not_mixed_with_its_successor(server, waits):
    server.files["/a"] = DATA
    server.faults.append(("cut", 700_000))
    file = storage.open_input(f"{server.uri}/a")
    server.version = '"2"'
    with pytest.raises(download.DownloadError, match="changed while it was read"):
        file.read()


def test_moving_about_in_a_file_gives_what_is_there(server, waits):
    server.files["/a"] = DATA
    rng = random.Random(1)
    with storage.open_input(f"{server.uri}/a") as file, io.BytesIO(DATA) as truth:
        for _ in range(40):
            at, size = rng.randrange(len(DATA) + 10), rng.choice((1, 100, 300_000))
            file.seek(at)
            truth.seek(at)
            assert file.read(size) == truth.read(size)
    server.files["/empty"] = b""
    assert storage.read_bytes(f"{server.uri}/empty") == b""


def test_a_parquet_file_on_a_server_is_read(server, waits, tmp_path):
    pq.write_table(pa.table({"text": ["a", "b"] * 1000}), tmp_path / "a")
    server.files["/a"] = (tmp_path / "a").read_bytes()
    server.faults.append(("cut", 100))
    assert storage.open_parquet(f"{server.uri}/a").read()["text"].to_pylist() == ["a", "b"] * 1000
    assert [(f.uri, f.size) for f in storage.list_files(f"{server.uri}/a")] == [
        (f"{server.uri}/a", len(server.files["/a"]))
    ]
