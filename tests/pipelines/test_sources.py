import gzip
import io
import json
import os
import random
import tracemalloc
import zlib

import brotli
import pytest
import zstandard
from fastwarc.warc import ArchiveIterator

from pipelines.documents import BadRecord
from pipelines.sources import Source, discover, read


def read_all(kind, path, **settings):
    """Documents and bad records of everything that a source names."""
    found = [item for unit in discover([Source(kind, str(path), **settings)]) for item in read(unit)]
    return [i for i in found if not isinstance(i, BadRecord)], [i for i in found if isinstance(i, BadRecord)]


# web archives


def warc_record(i, kind="response", status="200 OK", content_type="text/html; charset=utf-8", body=None):
    body = f"<p>page {i}</p>".encode() * 20 if body is None else body
    if kind == "response":
        body = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\n\r\n".encode() + body
    type_of_block = "application/http; msgtype=response" if kind == "response" else "text/plain"
    header = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:{i}>\r\nWARC-Date: 2024-05-18T01:58:10Z\r\n"
        f"WARC-Target-URI: http://site/{i}\r\nContent-Type: {type_of_block}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return header.encode() + body + b"\r\n\r\n"


def numbers(documents):
    return [int(d["url"].rpartition("/")[2]) for d in documents]


def write_members(path, records):
    """A file of one gzip member a record; returns where each starts."""
    members = [gzip.compress(r, 6, mtime=0) for r in records]
    path.write_bytes(b"".join(members))
    return [sum(map(len, members[:i])) for i in range(len(members))]


def test_html_responses_become_documents_and_other_records_are_counted_or_passed_over(tmp_path):
    path = tmp_path / "a.warc.gz"
    records = [
        warc_record(0, "warcinfo"),
        warc_record(1, "request"),
        warc_record(2),
        warc_record(3, status="404 Not Found"),
        warc_record(4, content_type="image/png"),
        warc_record(5, content_type="application/xhtml+xml"),
    ]
    offsets = write_members(path, records)
    documents, bad = read_all("warc", path, name="web")
    assert numbers(documents) == [2, 5]
    assert documents[0]["html"] == b"<p>page 2</p>" * 20
    assert documents[0]["content_type"] == "text/html; charset=utf-8"
    assert documents[0]["source"] == "web"
    assert documents[0]["metadata"] == {"date": "2024-05-18T01:58:10Z", "record": "<urn:uuid:2>"}
    assert [(b.reason, b.offset) for b in bad] == [("warc: HTTP status", offsets[3]), ("warc: not HTML", offsets[4])]


def test_chunked_and_compressed_bodies_are_decoded(tmp_path):
    page = b"<p>hello</p>" * 50
    packed = gzip.compress(page)
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(packed), packed)
    header = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nTransfer-Encoding: chunked\r\nContent-Encoding: gzip\r\n\r\n"
    )
    record = warc_record(1, kind="response", body=b"")
    block = header + chunked
    record = record[: record.index(b"Content-Length")] + b"Content-Length: %d\r\n\r\n%s\r\n\r\n" % (len(block), block)
    (tmp_path / "a.warc").write_bytes(record)
    documents, bad = read_all("warc", tmp_path / "a.warc")
    assert not bad
    assert documents[0]["html"] == page


def test_wet_records_become_texts_and_bad_utf8_is_set_aside(tmp_path):
    path = tmp_path / "a.warc.wet.gz"
    records = [
        warc_record(0, "conversion", body="grün".encode()),
        warc_record(1, "conversion", body=b"\xff\xfe bad"),
        warc_record(2, "conversion", body=b"last"),
    ]
    offsets = write_members(path, records)
    documents, bad = read_all("wet", path)
    assert [d["text"] for d in documents] == ["grün", "last"]
    assert [(b.reason, b.offset) for b in bad] == [("wet: bad UTF-8", offsets[1])]


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_bit_costs_no_other_record_than_its_own(tmp_path, seed):
    rng = random.Random(seed)
    path = tmp_path / "a.warc.gz"
    # incompressible bodies make large members, so that a flip often hits data rather than headers
    records = [warc_record(i, body=rng.randbytes(rng.randrange(10, 20_000))) for i in range(20)]
    offsets = write_members(path, records)
    data = bytearray(path.read_bytes())
    victim = rng.randrange(20)
    end = offsets[victim + 1] if victim < 19 else len(data)
    data[rng.randrange(offsets[victim] + 10, end)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    documents, bad = read_all("warc", path)
    assert numbers(documents) == [i for i in range(20) if i != victim]
    assert (bad[0].path, bad[0].offset, bad[0].reason) == (str(path), offsets[victim], "warc: damaged compression")
    assert len(bad) == 1


def test_a_truncated_member_at_the_end_is_named_and_all_before_it_is_read(tmp_path):
    path = tmp_path / "a.warc.gz"
    offsets = write_members(path, [warc_record(i) for i in range(5)])
    path.write_bytes(path.read_bytes()[:-20])
    documents, bad = read_all("warc", path)
    assert numbers(documents) == [0, 1, 2, 3]
    assert [(b.offset, b.reason) for b in bad] == [(offsets[4], "warc: damaged compression")]


def test_a_member_cut_short_in_the_middle_costs_itself_alone(tmp_path):
    path = tmp_path / "a.warc.gz"
    offsets = write_members(path, [warc_record(i, body=random.Random(i).randbytes(4000)) for i in range(5)])
    data = path.read_bytes()
    path.write_bytes(data[: offsets[3] - 1000] + data[offsets[3] :])
    documents, bad = read_all("warc", path)
    assert numbers(documents) == [0, 1, 3, 4]
    assert [b.offset for b in bad] == [offsets[2]]


def test_rubbish_between_members_and_zeros_behind_them(tmp_path):
    path = tmp_path / "a.warc.gz"
    offsets = write_members(path, [warc_record(i) for i in range(3)])
    data = path.read_bytes()
    path.write_bytes(data[: offsets[1]] + b"rubbish \x1f\x8b\x08\x00 rubbish" + data[offsets[1] :] + b"\0" * 700_000)
    documents, bad = read_all("warc", path)
    assert numbers(documents) == [0, 1, 2]
    assert [b.offset for b in bad] == [offsets[1]]


BROKEN_HEADERS = {
    "first line": lambda r: b"WURC" + r[4:],
    "no length": lambda r: r.replace(b"Content-Length", b"Content-Longth"),
    "length of letters": lambda r: r.replace(b"Content-Length: ", b"Content-Length: x"),
    "length too small": lambda r: r.replace(b"Content-Length: ", b"Content-Length: 1#").replace(b"#", b"\r\nX: "),
    "length too large": lambda r: r.replace(b"Content-Length: ", b"Content-Length: 9"),
    "no type": lambda r: r.replace(b"WARC-Type", b"WARC-Tipe"),
    "no end": lambda r: r.replace(b"\r\n\r\n", b"\r\nX", 1),
}


@pytest.mark.parametrize("how", BROKEN_HEADERS)
@pytest.mark.parametrize("suffix", [".warc", ".warc.gz", "-one-member.warc.gz"])
def test_a_broken_header_costs_no_other_record_than_its_own(tmp_path, how, suffix):
    path = tmp_path / f"a{suffix}"
    records = [warc_record(i, body=b"<p>x</p>" * 100) for i in range(6)]
    records[2] = BROKEN_HEADERS[how](records[2])
    position = len(b"".join(records[:2]))
    if suffix == ".warc":
        path.write_bytes(b"".join(records))
        offset = position
    elif suffix == ".warc.gz":
        offset = write_members(path, records)[2]
    else:
        path.write_bytes(gzip.compress(b"".join(records)))
        offset = 0
    documents, bad = read_all("warc", path)
    assert numbers(documents) == [0, 1, 3, 4, 5]
    assert [b.offset for b in bad] == [offset]
    assert bad[0].reason in ("warc: broken header", "warc: record cut short")
    if offset == 0:
        assert f"{position} bytes into the member" in bad[0].detail


def test_a_record_that_is_too_long_is_passed_over(tmp_path):
    path = tmp_path / "a.warc"
    records = [warc_record(0), warc_record(1, body=b"x" * 300_000), warc_record(2)]
    path.write_bytes(b"".join(records))
    documents, bad = read_all("warc", path, max_record_bytes=100_000)
    assert numbers(documents) == [0, 2]
    assert [(b.reason, b.offset) for b in bad] == [("warc: record too long", len(records[0]))]


def test_a_compressed_body_that_is_too_long_is_named_and_not_held(tmp_path):
    body = gzip.compress(b"a" * 3_000_000)
    page = warc_record(1, content_type="text/html\r\nContent-Encoding: gzip", body=body)
    (tmp_path / "a.warc").write_bytes(page + warc_record(2))
    documents, bad = read_all("warc", tmp_path / "a.warc", max_record_bytes=1_000_000)
    assert numbers(documents) == [2]
    assert [b.reason for b in bad] == ["warc: record too long"]


PAGE = b"<p>h\xc3\xa9llo</p>" * 50


def raw_deflate(data):
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(data) + stream.flush()


def chunked(data, size=100):
    parts = [data[i : i + size] for i in range(0, len(data), size)]
    return b"".join(b"%x;ext=1\r\n%s\r\n" % (len(p), p) for p in parts) + b"0\r\nTrailer: x\r\n\r\n"


BODIES = {
    "gzip": ("Content-Encoding: gzip", gzip.compress(PAGE), PAGE),
    "x-gzip in members": ("Content-Encoding: x-GZIP", gzip.compress(PAGE[:100]) + gzip.compress(PAGE[100:]), PAGE),
    "deflate": ("Content-Encoding: deflate", zlib.compress(PAGE), PAGE),
    "deflate without its frame": ("Content-Encoding: deflate", raw_deflate(PAGE), PAGE),
    "brotli": ("Content-Encoding: br", brotli.compress(PAGE), PAGE),
    "zstd": ("Content-Encoding: zstd", zstandard.compress(PAGE), PAGE),
    "two codings": ("Content-Encoding: gzip, deflate", zlib.compress(gzip.compress(PAGE)), PAGE),
    "chunks": ("Transfer-Encoding: chunked", chunked(PAGE), PAGE),
    "compressed chunks": (
        "Transfer-Encoding: chunked\r\nContent-Encoding: br",
        chunked(brotli.compress(PAGE), 7),
        PAGE,
    ),
    "gzip that is none": ("Content-Encoding: gzip", PAGE, PAGE),
    "deflate that is none": ("Content-Encoding: deflate", PAGE, PAGE),
    "brotli that is none": ("Content-Encoding: br", PAGE, PAGE),
    "zstd that is none": ("Content-Encoding: zstd", PAGE, PAGE),
    "chunks that are none": ("Transfer-Encoding: chunked", PAGE, PAGE),
    "chunks that look like some": ("Transfer-Encoding: chunked", b"5\n" + PAGE, b"5\n" + PAGE),
    "a coding of its own": ("Content-Encoding: UTF-8", PAGE, PAGE),
    "a folded header": ("X-Long: a\r\n b: c\r\nContent-Encoding:\r\n gzip", gzip.compress(PAGE), PAGE),
    "chunks cut short": ("Transfer-Encoding: chunked", chunked(PAGE)[:333], None),
    "gzip cut short": ("Content-Encoding: gzip", gzip.compress(PAGE)[:-12], None),
    "brotli cut short": ("Content-Encoding: br", brotli.compress(PAGE * 99)[:-9], None),
}


@pytest.mark.parametrize("how", BODIES)
def test_bodies_are_decoded_as_they_are_whatever_their_headers_say(tmp_path, how):
    header, body, page = BODIES[how]
    (tmp_path / "a.warc").write_bytes(warc_record(1, content_type=f"text/html\r\n{header}", body=body) + warc_record(2))
    documents, bad = read_all("warc", tmp_path / "a.warc")
    assert not bad
    assert numbers(documents) == [1, 2]
    html = documents[0]["html"]
    assert html == page if page is not None else PAGE.startswith(html) or (PAGE * 99).startswith(html)


def test_a_damaged_body_costs_its_own_page_alone_and_a_page_that_was_cut_says_so(tmp_path):
    packed = bytearray(gzip.compress(random.Random(0).randbytes(3000)))
    packed[1500] ^= 1
    bad_body = warc_record(1, content_type="text/html\r\nContent-Encoding: gzip", body=bytes(packed))
    cut = warc_record(2).replace(b"WARC-Date", b"WARC-Truncated: length\r\nWARC-Date")
    (tmp_path / "a.warc").write_bytes(bad_body + cut)
    documents, bad = read_all("warc", tmp_path / "a.warc")
    assert numbers(documents) == [2]
    assert documents[0]["metadata"]["truncated"] == "length"
    assert [(b.reason, b.offset) for b in bad] == [("warc: damaged body", 0)]


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd"])
def test_bodies_that_expand_a_thousandfold_are_named_and_not_held(tmp_path, coding):
    zeros = b"\0" * 60_000_000
    body = {"gzip": gzip.compress, "deflate": zlib.compress, "zstd": zstandard.compress, "br": brotli_fast}[coding](
        zeros
    )
    page = warc_record(1, content_type=f"text/html\r\nContent-Encoding: {coding}", body=body)
    (tmp_path / "a.warc").write_bytes(page + warc_record(2))
    tracemalloc.start()
    documents, bad = read_all("warc", tmp_path / "a.warc", max_record_bytes=500_000)
    assert tracemalloc.get_traced_memory()[1] < 8_000_000
    tracemalloc.stop()
    assert numbers(documents) == [2]
    assert [b.reason for b in bad] == ["warc: record too long"]


def brotli_fast(data):
    return brotli.compress(data, quality=1)


@pytest.mark.parametrize("packed", [False, True])
def test_zstd_frames_are_read_with_the_dictionary_at_the_start_of_the_file(tmp_path, packed):
    records = [warc_record(i, body=f"<p>{random.Random(i).randbytes(60).hex()}</p>".encode()) for i in range(200)]
    dictionary = zstandard.train_dictionary(8000, records)
    compressor = zstandard.ZstdCompressor(dict_data=dictionary, write_checksum=True)
    stored = dictionary.as_bytes()
    stored = zstandard.compress(stored) if packed else stored
    frames = [compressor.compress(record) for record in records]
    note = b"\x50\x2a\x4d\x18\x03\0\0\0abc"  # a frame that is to be skipped
    start = b"\x5d\x2a\x4d\x18" + len(stored).to_bytes(4, "little") + stored
    path = tmp_path / "a.warc.zst"
    path.write_bytes(start + b"".join(frames[:100]) + note + b"".join(frames[100:]))
    assert numbers(read_all("warc", path)[0]) == list(range(200))
    broken = bytearray(frames[50])
    broken[-10] ^= 16
    at = len(start) + sum(map(len, frames[:50]))
    path.write_bytes(start + b"".join([*frames[:50], bytes(broken), *frames[51:]]))
    documents, bad = read_all("warc", path)
    assert numbers(documents) == [i for i in range(200) if i != 50]
    assert [(b.offset, b.reason) for b in bad] == [(at, "warc: damaged compression")]
    path.write_bytes(start[:4] + b"\xff\xff\xff\x7f" + start[8:])
    assert read_all("warc", path)[1][0].offset == 0


def test_an_archive_of_zstd_frames_is_read(tmp_path):
    path = tmp_path / "a.warc.zst"
    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(warc_record(i)) for i in range(3)))
    assert numbers(read_all("warc", path)[0]) == [0, 1, 2]


def test_pages_are_the_same_as_fastwarc_reads_from_a_sound_archive(tmp_path):
    path = tmp_path / "a.warc.gz"
    rng = random.Random(1)
    write_members(path, [warc_record(i, body=rng.randbytes(rng.randrange(0, 200_000))) for i in range(10)])
    with path.open("rb") as file:
        expected = [r.reader.read() for r in ArchiveIterator(file)]
    assert [d["html"] for d in read_all("warc", path)[0]] == expected


# JSON Lines


def compress(data, how):
    if how == "gz":
        return gzip.compress(data)
    if how == "gz-members":  # cut anywhere, as block-gzip does
        return b"".join(gzip.compress(data[i : i + 1000]) for i in range(0, len(data), 1000))
    return zstandard.ZstdCompressor().compress(data) if how == "zst" else data


@pytest.mark.parametrize("how", ["plain", "gz", "gz-members", "zst"])
def test_bad_lines_are_named_with_their_offset_and_all_others_are_read(tmp_path, how):
    good = [json.dumps({"text": f"täxt {i}", "url": f"http://x/{i}", "n": i}).encode() for i in range(200)]
    broken = {
        50: (b'{"text": "bad \xff"}', "jsonl: bad UTF-8"),
        60: (b'{"text": ', "jsonl: invalid JSON"),
        70: (b'{"no text": 1}', "jsonl: no text"),
        80: (b'{"text": null}', "jsonl: no text"),
        90: (b"[1, 2]", "jsonl: no text"),
    }
    lines = [broken[i][0] if i in broken else line for i, line in enumerate(good)]
    offsets = [sum(len(line) + 1 for line in lines[:i]) for i in range(200)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(compress(b"\n".join(lines), how))
    documents, bad = read_all("jsonl", path)
    assert [d["metadata"]["n"] for d in documents] == [i for i in range(200) if i not in broken]
    assert [(b.offset, b.reason) for b in bad] == [(offsets[i], reason) for i, (_, reason) in broken.items()]
    assert all(("decompressed" in b.detail) == (how != "plain") for b in bad)
    assert documents[0]["text"] == "täxt 0"
    assert documents[0]["url"] == "http://x/0"
    assert documents[199 - 5]["offset"] == offsets[199]


def test_a_truncated_gzip_keeps_every_line_that_can_be_decompressed(tmp_path):
    rng = random.Random(0)
    lines = [json.dumps({"text": rng.randbytes(60).hex()}) for _ in range(2000)]
    whole = gzip.compress("\n".join(lines).encode())
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    recovered = zlib.decompressobj(wbits=31).decompress(whole[: len(whole) // 2]).count(b"\n")
    documents, bad = read_all("jsonl", path)
    assert [d["text"] for d in documents] == [json.loads(line)["text"] for line in lines[:recovered]]
    assert recovered > 900
    assert [(b.offset, b.reason) for b in bad] == [(0, "jsonl: damaged compression")]


@pytest.mark.parametrize("seed", range(5))
def test_a_damaged_member_of_a_json_lines_file_leaves_the_others(tmp_path, seed):
    rng = random.Random(seed)
    groups = [[f"{g}-{i}-{rng.randbytes(40).hex()}" for i in range(50)] for g in range(8)]
    members = [gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in group).encode()) for group in groups]
    offset = sum(map(len, members[:3]))
    damaged = bytearray(members[3])
    damaged[rng.randrange(20, len(damaged))] ^= 1 << rng.randrange(8)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b"".join([*members[:3], bytes(damaged), *members[4:]]))
    documents, bad = read_all("jsonl", path)
    texts = {d["text"] for d in documents}
    assert texts >= {t for g, group in enumerate(groups) if g != 3 for t in group}
    assert [b.offset for b in bad if b.reason == "jsonl: damaged compression"] == [offset]


def test_a_line_that_is_too_long_is_passed_over(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = ['{"text": "a"}', json.dumps({"text": "x" * 3_000_000}), '{"text": "b"}', json.dumps({"text": "y" * 500})]
    path.write_text("\n".join(lines))
    documents, bad = read_all("jsonl", path, max_record_bytes=400)
    assert [d["text"] for d in documents] == ["a", "b"]
    assert [(b.offset, b.reason) for b in bad] == [
        (14, "jsonl: line too long"),
        (14 + len(lines[1]) + 1 + 14, "jsonl: line too long"),
    ]


def test_lone_surrogates_and_deep_nesting_do_not_stop_the_reader(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text": "a\\ud800b \\ud83d\\ude00"}\n' + "[" * 200_000 + "\n" + '\ufeff{"text": "c"}\n{"text": "d"}'
    )
    documents, bad = read_all("jsonl", path)
    assert [d["text"] for d in documents] == ["a\ufffdb \U0001f600", "d"]
    assert [b.reason for b in bad] == ["jsonl: invalid JSON"] * 2


def test_another_field_can_hold_the_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"content": "a", "text": 5, "tags": ["x"], "long": "%s"}' % ("x" * 5000))
    documents, _ = read_all("jsonl", path, columns={"text": "content"})
    assert documents[0]["text"] == "a"
    assert documents[0]["metadata"] == {"text": 5}


# units


def test_a_file_whose_name_is_no_utf8_is_set_aside_and_the_others_are_read(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jsonl", "wb") as file:
        file.write(b'{"text": "a"}')
    (tmp_path / "a.jsonl").write_text('{"text": "b"}')
    documents, bad = read_all("jsonl", tmp_path)
    assert [d["text"] for d in documents] == ["b"]
    assert [(b.path, b.reason) for b in bad] == [(f"{tmp_path}/caf\ufffd.jsonl", "file name: not UTF-8")]


def test_empty_files_of_every_kind_are_named(tmp_path):
    for kind, name in [
        ("warc", "a.warc.gz"),
        ("wet", "a.wet"),
        ("jsonl", "a.jsonl"),
        ("books", "a.txt"),
        ("code", "a.py"),
    ]:
        (tmp_path / name).write_bytes(b"")
        documents, bad = read_all(kind, tmp_path / name)
        assert documents == []
        assert [(b.path, b.offset, b.reason) for b in bad] == [(str(tmp_path / name), 0, "empty file")]
    (tmp_path / "blank.jsonl").write_text("\n\n")
    assert [b.reason for b in read_all("jsonl", tmp_path / "blank.jsonl")[1]] == ["no records"]


def test_units_are_named_uniquely_grouped_and_the_same_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.sources._UNIT_BYTES", 250)
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text("x" * 100)
        (tmp_path / f"{i}.jsonl").write_text("{}")
    (tmp_path / "more").mkdir()
    for name in ("x", "y"):
        (tmp_path / "more" / f"{name}.jsonl").write_text("{}")
    folder = str(tmp_path)
    wanted = [
        Source("books", folder),
        Source("jsonl", f"{folder}/?.jsonl", name="web"),
        Source("jsonl", f"{folder}/more/*.jsonl", name="web"),
    ]
    units = discover(wanted)
    assert [u.name for u in units] == [f"books-0000{i}" for i in range(3)] + [f"web-0000{i}" for i in range(7)]
    assert [len(u.files) for u in units] == [2, 2, 1] + [1] * 7
    assert units[0].bytes == 200
    assert discover(wanted) == units


def test_ids_stay_the_same_when_a_source_is_moved(tmp_path):
    ids = []
    for place in ("here", "there"):
        (tmp_path / place / "deep").mkdir(parents=True)
        (tmp_path / place / "deep" / "a.jsonl").write_text('{"text": "a"}\n{"text": "a"}\n')
        ids.append([d["id"] for d in read_all("jsonl", tmp_path / place)[0]])
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 2


def test_sources_whose_documents_would_share_ids_are_refused(tmp_path):
    for year in ("2023", "2024"):
        (tmp_path / year).mkdir()
        (tmp_path / year / "a.jsonl").write_text('{"text": "a"}\n')
    years = [str(tmp_path / year) for year in ("2023", "2024")]
    with pytest.raises(ValueError, match=r"2023/a.jsonl and .*2024/a.jsonl would give their documents the same ids"):
        discover([Source("jsonl", year) for year in years])
    units = discover([Source("jsonl", year, name=year[-4:]) for year in years])
    assert len({item["id"] for unit in units for item in read(unit)}) == 2
    assert len(discover([Source("jsonl", str(tmp_path))])) == 2


def test_a_file_that_was_written_anew_with_the_same_size_counts_as_another(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')
    before = discover([Source("jsonl", str(path))])
    path.write_text('{"text": "b"}\n')
    os.utime(path, (1e9, 1e9))
    assert discover([Source("jsonl", str(path))]) != before


def test_a_source_without_files_is_refused_by_its_path(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="holds no jsonl files"):
        discover([Source("jsonl", str(tmp_path))])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        discover([Source("warc", str(tmp_path / "nowhere"))])
    with pytest.raises(ValueError, match="path of the source web is empty"):
        Source("warc", "", name="web").validate()


def test_a_gzip_bomb_is_read_in_small_pieces(tmp_path):
    from pipelines.sources.compressed import pieces

    for how in (gzip.compress, zstandard.ZstdCompressor().compress):
        packed = how(b"\0" * 50_000_000)
        sizes = [len(piece.data) for piece in pieces(io.BytesIO(packed), lambda start: True)]
        assert sum(sizes) == 50_000_000
        assert max(sizes) <= 16 << 20
