"""A thousand damaged files: no good record is lost, and each bad one is named with its file and offset.

Each input is made with a seed by a maker, which knows from the file's making, not from the reader, which records must
come out whatever the damage, and where the damage lies.
"""

import bisect
import gzip
import io
import json
import os
import random
import re
import tarfile
import zlib
from collections import Counter
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from test_books import CONTAINER, epub
from test_code_sources import pack
from test_sources import warc_record

from pipelines.documents import BadRecord
from pipelines.sources import Source, discover, read

LIMIT = 60_000  # bytes of a record
PEAK = 120 << 20  # bytes of memory on top of what is there before


class Plan(NamedTuple):
    """A damaged file.

    Attributes:
        data: its bytes.
        survivors: texts that must come out.
        damage: ranges of offsets, one of which each bad record must lie in.
        bad: how many bad records there are at least, unless all that may come came.
        maybe: texts that may come beside the survivors; None when damage may make any.
    """

    data: bytes
    survivors: list[str]
    damage: list[tuple[int, int]]
    bad: int = 1
    maybe: list[str] | None = []  # noqa: RUF012 (never changed)


def texts(rng, count=12):
    """Texts that are hard to compress, some long."""
    return [f"{i} é {rng.randbytes(rng.choice((10, 200, 3000))).hex()}" for i in range(count)]


def ends(parts):
    return [sum(map(len, parts[: i + 1])) for i in range(len(parts))]


# records in parts of the file that do not depend on each other: members of web archives and of JSON Lines


def zeros(rng, size):
    return b"\0" * size


def damage_parts(rng, parts, records, flip_from):
    """Damage to a file of independent parts, each with its records; returns a Plan."""
    stops = ends(parts)
    starts = [0, *stops[:-1]]
    data = bytearray(b"".join(parts))
    how = rng.choice(("cut", "flip", "flip", "flips", "zeros", "rubbish", "gap"))
    if how == "cut":
        at = rng.randrange(1, len(data))
        victim = bisect.bisect_right(stops, at)
        lost, data = set(range(victim, len(parts))), data[:at]
        spans = [(starts[victim], at)]
        if starts[victim] == at:  # between two parts: nothing tells that there were more
            return Plan(bytes(data), flat(records[:victim]), spans, 0)
    elif how in ("flip", "flips"):
        lost = set(rng.sample(range(len(parts)), 1 if how == "flip" else 3))
        for victim in lost:
            at = rng.randrange(starts[victim] + flip_from, stops[victim])
            data[at] ^= 1 << rng.randrange(8)
        spans = [(starts[victim], stops[victim]) for victim in lost]
    elif how == "zeros":
        size = rng.randrange(20, 4000)
        at = rng.randrange(0, len(data) - size)
        data[at : at + size] = bytes(size)
        lost = {i for i in range(len(parts)) if starts[i] < at + size and stops[i] > at}
        spans = [(starts[min(lost)], stops[max(lost)])]
    elif how == "rubbish":
        before = rng.randrange(len(parts) - 1)
        extra = rng.randbytes(rng.randrange(10, 3000))
        data[stops[before] : stops[before]] = extra
        lost, spans = set(), [(stops[before], stops[before] + len(extra))]
    else:  # bytes are missing from the middle of a part
        victim = rng.randrange(len(parts) - 1)
        at = rng.randrange(starts[victim] + flip_from, stops[victim] - 1)
        size = rng.randrange(1, stops[victim] - at)
        del data[at : at + size]
        lost, spans = {victim}, [(starts[victim], stops[victim] - size)]
    kept = [records[i] for i in range(len(parts)) if i not in lost]
    return Plan(bytes(data), flat(kept), spans, 1, maybe=None)


def flat(lists):
    return [item for inner in lists for item in inner]


def bad_record(rng, kind, i):
    """A record that is broken by itself, as bytes of an archive."""
    body = b"<p>x</p>" * 9
    if kind == "wet":
        choices = {
            "charset": warc_record(i, "conversion", body="Größe".encode("latin-1")),
            "long": warc_record(i, "conversion", body=b"x" * (LIMIT + 1)),
        }
    else:
        packed = gzip.compress(b"\0" * 3_000_000)
        choices = {
            "bomb": warc_record(i, content_type="text/html\r\nContent-Encoding: gzip", body=packed),
            "long": warc_record(i, body=b"x" * (LIMIT + 1)),
            "status": warc_record(i, status="503 Slow Down"),
            "body": warc_record(i, content_type="text/html\r\nContent-Encoding: gzip", body=packed[:500] + body),
            "not http": warc_record(i, body=body).replace(b"HTTP/1.1", b"SPDY/9.9"),
        }
    choices["length"] = warc_record(i, "response" if kind == "warc" else "conversion", body=body).replace(
        b"Content-Length: ", b"Content-Length: 7"
    )
    choices["type"] = warc_record(i, body=body).replace(b"WARC-Type", b"WARC-Tipe")
    return choices[rng.choice(list(choices))]


def archive(rng, kind, pack_member, flip_from):
    """A web archive of one member a record."""
    content = texts(rng)
    record_type = "response" if kind == "warc" else "conversion"
    records = [warc_record(i, record_type, body=text.encode()) for i, text in enumerate(content)]
    if rng.random() < 0.4:
        victim = rng.randrange(len(records))
        records[victim] = bad_record(rng, kind, victim)
        members = [pack_member(record) for record in records]
        span = ([0, *ends(members)][victim], ends(members)[victim])
        return Plan(b"".join(members), content[:victim] + content[victim + 1 :], [span])
    return damage_parts(rng, [pack_member(r) for r in records], [[t] for t in content], flip_from)


def pack_gzip(data):
    return gzip.compress(data, 1, mtime=0)


def pack_zstd(data):
    return zstandard.ZstdCompressor(level=1, write_checksum=True).compress(data)


def warc_gz(rng):
    return archive(rng, "warc", pack_gzip, 10)


def wet_gz(rng):
    return archive(rng, "wet", pack_gzip, 10)


def warc_zst(rng):
    return archive(rng, "warc", pack_zstd, 4)


def warc(rng):
    """A plain archive with one record that is broken or cut."""
    content = texts(rng)
    records = [warc_record(i, body=text.encode()) for i, text in enumerate(content)]
    victim = rng.randrange(len(records))
    start = len(b"".join(records[:victim]))
    if rng.random() < 0.4:
        at = start + rng.randrange(1, len(records[victim]) - 4)  # the last four bytes are no part of what it says
        return Plan(b"".join(records)[:at], content[:victim], [(start, at)])
    records[victim] = bad_record(rng, "warc", victim)
    return Plan(b"".join(records), content[:victim] + content[victim + 1 :], [(start, start + len(records[victim]))])


# JSON Lines


def line(text):
    return json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"


BAD_LINES = {
    "charset": lambda rng: '{"text": "Größe"}\n'.encode("latin-1"),
    "utf-16": lambda rng: '{"text": "a"}'.encode("utf-16-be") + b"\n",
    "long": lambda rng: line("x" * LIMIT),
    "text": lambda rng: b'{"txt": "a"}\n',
    "number": lambda rng: b'{"text": 1}\n',
    "list": lambda rng: b"[1]\n",
    "deep": lambda rng: b"[" * 50_000 + b"\n",
    "cut": lambda rng: line("abcdef")[:-4] + b"\n",
    "noise": lambda rng: b"\xff" + rng.randbytes(300).replace(b"\n", b"") + b"\n",
}


def jsonl(rng):
    """A plain file with some lines that are broken, or cut, or with a flipped bit."""
    content = texts(rng)
    lines = [line(text) for text in content]
    starts = [0, *ends(lines)]
    how = rng.choice(("lines", "lines", "cut", "flip"))
    if how == "cut":
        victim = rng.randrange(len(lines))
        at = starts[victim] + rng.randrange(1, len(lines[victim]) - 2)
        return Plan(b"".join(lines)[:at], content[:victim], [(starts[victim], at)])
    if how == "flip":
        victim = rng.randrange(len(lines))
        data = bytearray(b"".join(lines))
        at = starts[victim] + rng.randrange(len(lines[victim]))
        data[at] ^= 1 << rng.randrange(8)
        # Without its newline, a line takes the next one with it.
        lost = {victim, victim + 1} if at == starts[victim + 1] - 1 else {victim}
        return Plan(
            bytes(data),
            [text for i, text in enumerate(content) if i not in lost],
            [(starts[victim], starts[victim + 1])],
            0,
            maybe=None,
        )
    for victim in rng.sample(range(len(lines)), 4):
        lines[victim] = BAD_LINES[rng.choice(list(BAD_LINES))](rng)
        content[victim] = None
    starts = [0, *ends(lines)]
    spans = [(starts[i], starts[i] + 1) for i, text in enumerate(content) if text is None]
    return Plan(b"".join(lines), [text for text in content if text is not None], spans, 4)


def jsonl_members(rng):
    """Lines in members, as files that were compressed piece by piece and joined."""
    groups = [texts(rng, 4) for _ in range(8)]
    return damage_parts(rng, [pack_gzip(b"".join(map(line, group))) for group in groups], groups, 10)


def jsonl_stream(rng, packed, decoder):
    """Lines in one compressed stream: those that can be decompressed before the damage are good."""
    at = rng.randrange(20, len(packed) - 8)
    cut = rng.random() < 0.5
    given = b""
    for i in range(at):  # byte by byte, so that nothing of a call that fails is missing
        given += decoder(packed[i : i + 1])
    survivors = [json.loads(part)["text"] for part in given.split(b"\n")[:-1]]
    if cut:
        return Plan(packed[:at], survivors, [(0, 1)], 1, maybe=None)
    data = bytearray(packed)
    data[at] ^= 1 << rng.randrange(8)
    return Plan(bytes(data), survivors, [(0, len(data))], 1, maybe=None)


def jsonl_gz(rng):
    data = b"".join(map(line, texts(rng, 30)))
    return jsonl_stream(rng, pack_gzip(data), zlib.decompressobj(31).decompress)


def jsonl_zst(rng):
    data = b"".join(map(line, flat(texts(rng, 30) for _ in range(8))))
    return jsonl_stream(rng, pack_zstd(data), zstandard.ZstdDecompressor().decompressobj().decompress)


# tables


def parquet(rng):
    content = texts(rng, 40)
    out = io.BytesIO()
    checked = rng.random() < 0.5
    pq.write_table(
        pa.table({"text": content}),
        out,
        row_group_size=8,
        write_page_checksum=checked,
        compression=rng.choice(("none", "snappy", "zstd")),
        use_dictionary=rng.random() < 0.5,
    )
    data = bytearray(out.getvalue())
    metadata = pq.ParquetFile(io.BytesIO(data)).metadata
    how = rng.choice(("group", "group", "cut", "footer"))
    if how == "cut":
        return Plan(bytes(data[: rng.randrange(4, len(data))]), [], [(0, 1)])
    if how == "footer":
        size = int.from_bytes(data[-8:-4], "little")
        data[-8 - size : -8] = rng.randbytes(size)
        return Plan(bytes(data), [], [(0, 1)])
    victim = rng.randrange(metadata.num_row_groups)
    column = metadata.row_group(victim).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    at = start + rng.randrange(40, column.total_compressed_size - 40)
    data[at : at + 40] = bytes(255 - byte for byte in data[at : at + 40])
    rest = [text for i, text in enumerate(content) if i // 8 != victim]
    # A page's header is not checked, and statistics in it may change unseen. Without checksums, other texts may come.
    own = [text for i, text in enumerate(content) if i // 8 == victim]
    return Plan(bytes(data), rest, [(start, start + 1)], int(checked), maybe=own if checked else None)


# books


def book(rng):
    return "The whale, the white whale, said Ahab. Größer als je. " * rng.randrange(5, 200) + str(rng.random())


def txt(rng):
    text = book(rng)
    how = rng.choice(("charset", "wide", "noise", "long", "empty", "gz", "zst"))
    if how in ("charset", "wide"):
        data = text.encode("latin-1" if how == "charset" else rng.choice(("utf-16", "utf-16-le", "utf-16-be")))
        return Plan(data, [text], [], 0)
    if how == "noise":
        return Plan(rng.randbytes(rng.randrange(200, 20_000)) + text.encode(), [], [(0, 1)], 1, maybe=None)
    if how == "long":
        return Plan(text.encode() + b"x" * LIMIT, [], [(0, 1)])
    if how == "empty":
        return Plan(rng.choice((b"", b"\n\n \n", b"\xef\xbb\xbf")), [], [(0, 1)])
    packed = bytearray(pack_gzip(text.encode()) if how == "gz" else pack_zstd(text.encode()))
    if rng.random() < 0.3:
        bomb = b"\0" * 20_000_000
        return Plan(gzip.compress(bomb, 1) if how == "gz" else zstandard.compress(bomb), [], [(0, 1)])
    if rng.random() < 0.5:
        return Plan(bytes(packed[: rng.randrange(12, len(packed))]), [], [(0, 1)])
    packed[rng.randrange(12, len(packed) - 4)] ^= 1 << rng.randrange(8)
    return Plan(bytes(packed), [], [(0, 1)])


def epub_(rng):
    page = f"<html><body><p>{rng.randbytes(2000).hex()}</p></body></html>"
    data = bytearray(epub(chapters=3, page=page, how=rng.choice((0, 8))))
    expected = "\n\n".join([page[15:-18]] * 3) + "\n"
    how = rng.choice(("cut", "page", "cover", "directory", "bomb", "encrypted", "container"))
    if how == "cut":
        return Plan(bytes(data[: rng.randrange(len(data) - 22)]), [], [(0, 1)])
    if how == "page":  # within a chapter's content
        at = data.index(b"OEBPS/text/c 1.xhtml") + 200
        data[at] ^= 1 << rng.randrange(8)
        return Plan(bytes(data), [], [(0, 1)])
    if how == "cover":  # which is not read
        at = data.index(b"OEBPS/cover.jpg") + 15
        data[at + 2] ^= 1 << rng.randrange(8)
        return Plan(bytes(data), [expected], [(0, 1)], 0)
    if how == "directory":
        at = data.index(b"PK\x01\x02")
        data[at : at + 60] = rng.randbytes(60)
        return Plan(bytes(data), [], [(0, 1)])
    if how == "bomb":
        return Plan(epub(page=page.replace("<p>", "<p>" + " " * 20_000_000)), [], [(0, 1)])
    if how == "encrypted":
        for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            for found in re.finditer(re.escape(mark), bytes(data)):
                data[found.start() + at] |= 1
        return Plan(bytes(data), [], [(0, 1)])
    return Plan(epub(container=CONTAINER[: rng.randrange(20, 150)]), [], [(0, 1)])


# archives of code


def tar(rng):
    files = {f"f{i:02d}.py": f"# {text}\n" for i, text in enumerate(texts(rng))}
    format_ = rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT))
    data = bytearray(pack({name: text.encode() for name, text in files.items()}, format_))
    starts = [data.index(name.encode() + b"\0") for name in files]
    content = list(files.values())
    stops = [start + 512 + len(text.encode()) for start, text in zip(starts, content, strict=True)]
    victim = rng.randrange(len(content))
    how = rng.choice(("cut", "header", "header", "zeros", "size"))
    if how == "cut":
        at = rng.randrange(starts[victim] + 1, stops[victim])
        return Plan(bytes(data[:at]), content[:victim], [(starts[victim], at)])
    if how == "header":
        data[starts[victim] + rng.choice((0, 5, 101, 125, 150, 260))] ^= 1 << rng.randrange(7)
    elif how == "zeros":
        data[starts[victim] + 10 : starts[victim] + 300] = bytes(290)
    else:  # a size that reaches beyond the end, with a checksum to match
        header = bytearray(data[starts[victim] : starts[victim] + 512])
        header[124:136] = b"00000777777\0"
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        data[starts[victim] : starts[victim] + 512] = header
        return Plan(bytes(data), content[:victim], [(starts[victim], len(data) + 1)])
    return Plan(bytes(data), content[:victim] + content[victim + 1 :], [(starts[victim], stops[victim])], 1, maybe=None)


def tar_gz(rng):
    """An archive in one stream that is cut or flipped: the files that lie whole before the damage are good."""
    files = {f"f{i:02d}.py": f"# {text}\n" for i, text in enumerate(texts(rng))}
    packed = bytearray(pack_gzip(pack({name: text.encode() for name, text in files.items()})))
    at = rng.randrange(100, len(packed) - 60)
    given = zlib.decompressobj(31).decompress(bytes(packed[:at]))
    survivors = [text for text in files.values() if text.encode() in given]
    if rng.random() < 0.5:
        return Plan(bytes(packed[:at]), survivors, [(0, 1)], 1, maybe=None)
    packed[at] ^= 1 << rng.randrange(8)
    return Plan(bytes(packed), survivors, [(0, len(packed))], 1, maybe=None)


MAKERS = {
    "a.warc.gz": ("warc", warc_gz, 110),
    "a.warc.zst": ("warc", warc_zst, 80),
    "a.warc": ("warc", warc, 80),
    "a.warc.wet.gz": ("wet", wet_gz, 90),
    "a.jsonl": ("jsonl", jsonl, 110),
    "a-members.jsonl.gz": ("jsonl", jsonl_members, 60),
    "a.jsonl.gz": ("jsonl", jsonl_gz, 60),
    "a.jsonl.zst": ("jsonl", jsonl_zst, 40),
    "a.parquet": ("parquet", parquet, 110),
    "a.txt": ("books", txt, 80),
    "a.epub": ("books", epub_, 80),
    "a.tar": ("code", tar, 70),
    "a.tar.gz": ("code", tar_gz, 30),
}


def test_there_are_a_thousand_of_them():
    assert sum(count for _, _, count in MAKERS.values()) == 1000


@pytest.mark.parametrize("name", MAKERS)
def test_damaged_files_lose_no_good_record_and_each_bad_one_is_named(tmp_path, name):
    kind, make, count = MAKERS[name]
    path = tmp_path / name
    source = Source(kind, str(path), max_record_bytes=LIMIT)
    before = memory(reset=True)
    for seed in range(count):
        plan = make(random.Random(f"{name} {seed}"))
        path.write_bytes(plan.data)
        found = [item for unit in discover([source]) for item in read(unit)]
        bad = [item for item in found if isinstance(item, BadRecord)]
        came = Counter((d["html"].decode() if "html" in d else d["text"]) for d in found if d not in bad)
        missing = Counter(plan.survivors) - came
        assert not missing, f"seed {seed}: lost {[text[:20] for text in missing]}, bad {bad}"
        everything = None if plan.maybe is None else Counter(plan.survivors + plan.maybe)
        assert everything is None or not came - everything, f"seed {seed}: more than there is"
        assert len(bad) >= plan.bad or (plan.maybe and came == everything), f"seed {seed}: damage was passed over"
        for item in bad:
            assert item.path == str(path)
            # Lines of compressed files have the offset that they have when decompressed, and say so.
            inside = any(start <= item.offset < stop for start, stop in plan.damage)
            assert inside or "decompressed content" in item.detail, f"seed {seed}: {item}"
    assert memory() - before < PEAK


def memory(reset=False):
    """Bytes of memory that this process has held at most since the last reset, where the system tells."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return 0
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        return int(re.search(r"VmHWM:\s*(\d+) kB", file.read())[1]) << 10
