"""Common Crawl's layout, served by a web server on the loopback that is not always there."""

import gzip
import io
import random

import pytest
from test_sources import numbers, read_all, warc_record

from jobs.cli import parse
from pipelines import download, storage
from pipelines.documents import BadRecord
from pipelines.sources import Source, common_crawl, discover, read

CRAWL = "CC-MAIN-2026-04"
PAGES = 30  # in an archive


def layout(archives=6, kind="warc"):
    """Files of a crawl by their path on the server, records in members of incompressible content."""
    rng = random.Random(1)
    record_type = "response" if kind == "warc" else "conversion"
    files, paths = {}, []
    for a in range(archives):
        path = f"crawl-data/{CRAWL}/segments/1.{a}/{kind}/{CRAWL}-{a:05d}.{kind}.gz"
        bodies = [rng.randbytes(9000).hex().encode() for _ in range(PAGES)]
        files[f"/{path}"] = b"".join(
            gzip.compress(warc_record(a * PAGES + i, record_type, body=body), 1) for i, body in enumerate(bodies)
        )
        paths.append(path)
    files[f"/crawl-data/{CRAWL}/{kind}.paths.gz"] = gzip.compress("".join(f"{path}\n" for path in paths).encode())
    return files


def source(base, **settings):
    return Source("common-crawl", crawl=CRAWL, base=base, delay=0, **settings)


def everything(wanted):
    found = [item for unit in discover([wanted]) for item in read(unit)]
    return [i for i in found if not isinstance(i, BadRecord)], [i for i in found if isinstance(i, BadRecord)]


@pytest.mark.parametrize("kind", ["warc", "wet"])
def test_a_crawl_is_read_by_its_name_alike_from_a_web_server_and_a_folder(server, tmp_path, kind):
    server.files = layout(kind=kind)
    for path, data in server.files.items():
        storage.write_bytes(f"{tmp_path}/cc{path}", data)
    documents, bad = everything(source(server.uri, archives=kind))
    assert not bad
    assert numbers(documents) == list(range(6 * PAGES))
    local, _ = everything(source(f"{tmp_path}/cc/", archives=kind))
    drop = ("path",)
    assert [{k: v for k, v in d.items() if k not in drop} for d in documents] == [
        {k: v for k, v in d.items() if k not in drop} for d in local
    ]
    assert {d["source"] for d in documents} == {"common-crawl"}


def test_archives_of_a_limit_are_spread_evenly_over_the_listing(server):
    server.files = layout()
    taken = [unit.files[0][-13:-8] for unit in discover([source(server.uri, limit=3)])]
    assert taken == ["00000", "00002", "00004"]
    assert len(discover([source(server.uri, limit=100)])) == 6


def test_a_server_that_throttles_and_breaks_off_loses_and_doubles_no_record(server, monkeypatch):
    rng = random.Random(2)
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    server.files = layout()
    units = discover([source(server.uri)])
    documents = []
    for i, unit in enumerate(units):
        server.ranges = i % 2 == 0
        cuts = sorted(rng.sample(range(len(server.files[unit.files[0].removeprefix(server.uri)])), 3))
        sizes = cuts if not server.ranges else [b - a for a, b in zip([0, *cuts], cuts, strict=False)]
        server.faults = [("status", 503), *(("cut", size) for size in sizes), ("status", 429, {"Retry_After": 7})]
        documents += list(read(unit))
        assert not server.faults
    assert numbers(documents) == list(range(6 * PAGES))
    assert any(7 <= wait < 8 for wait in waits)


def test_an_archive_that_is_listed_but_not_there_is_counted_and_the_others_are_read(server):
    server.files = layout()
    gone = next(path for path in server.files if "-00002" in path)
    del server.files[gone]
    documents, bad = everything(source(server.uri))
    assert len(documents) == 5 * PAGES
    assert [(b.path, b.reason) for b in bad] == [(server.uri + gone, "common-crawl: no such archive")]


def test_an_unknown_crawl_and_a_damaged_listing_are_named(server):
    with pytest.raises(FileNotFoundError, match=rf"there is no crawl {CRAWL} with warc archives at {server.uri}"):
        discover([source(server.uri)])
    path = f"/crawl-data/{CRAWL}/warc.paths.gz"
    server.files[path] = layout()[path][:30]
    with pytest.raises(ValueError, match=r"warc.paths.gz: damaged"):
        discover([source(server.uri)])
    server.files[path] = gzip.compress(b"\n")
    with pytest.raises(ValueError, match=r"warc.paths.gz: lists no archives"):
        discover([source(server.uri)])


def test_a_task_waits_before_it_asks_a_server_for_an_archive_but_not_before_a_local_one(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(common_crawl.time, "sleep", waits.append)
    server.files = layout(2)
    polite = Source("common-crawl", crawl=CRAWL, base=server.uri, delay=2.5)
    everything(polite)
    assert waits == [2.5, 2.5]
    for path, data in server.files.items():
        storage.write_bytes(f"{tmp_path}{path}", data)
    everything(Source("common-crawl", crawl=CRAWL, base=str(tmp_path), delay=2.5))
    assert len(waits) == 2


def test_the_command_line_names_a_crawl_in_short():
    line = f"--source common-crawl --crawl {CRAWL} --kind wet --limit 8 --workspace w --set_aside_share 0.5"
    settings = parse("curate", line.split())
    assert settings.sources == [Source("common-crawl", crawl=CRAWL, archives="wet", limit=8)]
    assert (settings.workspace, settings.set_aside_share) == ("w", 0.5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "common-crawl"}, "crawl is empty in the source common-crawl"),
        ({"kind": "common-crawl", "crawl": CRAWL, "path": "x"}, "path is 'x' in the source common-crawl"),
        ({"kind": "common-crawl", "crawl": CRAWL, "limit": 0}, "limit is 0, must be at least 1"),
        ({"kind": "common-crawl", "crawl": CRAWL, "delay": -1.0}, "delay is -1.0, must be at least 0"),
        ({"kind": "warc", "path": "x", "limit": 3}, "limit is for sources of the kind common-crawl, not for warc"),
        ({"kind": "warc", "path": "x", "crawl": CRAWL}, "crawl is for sources of the kind common-crawl"),
        ({"kind": "wet", "path": "x", "archives": "wet"}, "archives is for sources of the kind common-crawl"),
        ({"kind": "jsonl", "path": "x", "base": "s3://b"}, "base is for sources of the kind common-crawl"),
        ({"kind": "warc", "path": "x", "delay": 2.0}, "delay is for sources of the kind common-crawl"),
        ({"kind": "code", "path": "x", "strip_gutenberg": False}, "strip_gutenberg is for sources of the kind books"),
        ({"kind": "books", "path": "x", "columns": {"text": "a"}}, "sources of the kind books have none"),
    ],
)
def test_a_source_that_cannot_work_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Source(**wrong).validate()


def test_a_web_archive_is_read_by_its_address(server):
    buffer = io.BytesIO()
    for i in range(3):
        buffer.write(gzip.compress(warc_record(i)))
    server.files["/a.warc.gz"] = buffer.getvalue()
    assert numbers(read_all("warc", f"{server.uri}/a.warc.gz")[0]) == [0, 1, 2]
