"""JSON Lines and Parquet by a mapping of their columns, and large files of them in parts."""

import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_sources import read_all

from pipelines import sources
from pipelines.documents import BadRecord
from pipelines.sources import Source, discover, read

FINEWEB = {
    "text": "A page.",
    "id": "<urn:uuid:a>",
    "dump": "CC-MAIN-2024-10",
    "url": "http://example.com/a",
    "date": "2024-02-24T07:00:00Z",
    "file_path": "s3://commoncrawl/a.warc.gz",
    "language": "en",
    "language_score": 0.93,
    "token_count": 3,
}
STACK = {
    "hexsha": "00ff",
    "size": 10,
    "ext": "py",
    "lang": "Python",
    "max_stars_repo_path": "src/a.py",
    "max_stars_repo_name": "me/it",
    "max_stars_repo_licenses": ["MIT", "Apache-2.0"],
    "max_stars_count": None,
    "content": "x = 1\n",
    "avg_line_length": 5.0,
}
RED_PAJAMA = {"text": "A paper.", "meta": {"url": "http://arxiv.org/1", "timestamp": "2020", "yymm": "2001", "n": 3}}
RED_PAJAMA_2 = {"url": "http://b", "raw_content": "More.", "digest": "sha1:x", "quality_signals": "{" * 5000}


def write(path, row, rows=3):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row] * rows), path)
    else:
        path.write_text(f"{json.dumps(row)}\n" * rows)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_published_corpora_load_unchanged(tmp_path, suffix):
    def first(name, row, kind=suffix, **columns):
        write(tmp_path / f"{name}.{suffix}", row)
        documents, bad = read_all(kind, tmp_path / f"{name}.{suffix}", columns=columns)
        assert not bad
        assert len({d["id"] for d in documents}) == (1 if "id" in columns else 3)
        documents[0]["metadata"].pop("row", None)
        return documents[0]

    page = first("fineweb", FINEWEB, language="language", language_score="language_score", id="id")
    assert (page["text"], page["url"], page["language"]) == ("A page.", "http://example.com/a", "en")
    assert page["language_score"] == pytest.approx(0.93)
    assert page["metadata"] == {k: FINEWEB[k] for k in ("dump", "date", "file_path", "token_count")}

    code = first(
        "stack",
        STACK,
        "code",
        text="content",
        language="lang",
        file="max_stars_repo_path",
        license="max_stars_repo_licenses",
    )
    assert (code["text"], code["language"], code["source"]) == ("x = 1\n", "python", "code")
    assert code["metadata"]["file"] == "src/a.py"
    assert code["metadata"]["license"] == ["MIT", "Apache-2.0"]
    assert code["metadata"]["avg_line_length"] == 5.0

    paper = first("red", RED_PAJAMA, url="meta.url", year="meta.yymm")
    assert (paper["text"], paper["url"]) == ("A paper.", "http://arxiv.org/1")
    assert paper["metadata"] == {"meta.timestamp": "2020", "meta.n": 3, "year": "2001"}

    page = first("red2", RED_PAJAMA_2, text="raw_content")
    assert (page["text"], page["url"], page["metadata"]) == ("More.", "http://b", {"digest": "sha1:x"})


def test_the_language_of_code_in_a_table_is_told_by_its_file_when_no_column_says_it(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x", "path": "lib/a.rs"}\n')
    documents, _ = read_all("code", tmp_path / "a.jsonl", columns={"text": "content", "file": "path"})
    assert documents[0]["language"] == "rust"


def test_ids_that_a_mapping_names_do_not_depend_on_where_the_record_stands(tmp_path):
    for name, order in (("a", "xyz"), ("b", "zyx")):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{c}", "key": "{c}"}}\n' for c in order))
    columns = {"id": "key"}
    ids = [
        {d["text"]: d["id"] for d in read_all("jsonl", tmp_path / f"{name}.jsonl", columns=columns)[0]} for name in "ab"
    ]
    assert ids[0] == ids[1]
    (tmp_path / "c.jsonl").write_text('{"text": "x"}\n')
    assert read_all("jsonl", tmp_path / "c.jsonl", columns=columns)[1][0].detail == "no id in the field key"


def test_a_text_column_that_is_not_there_is_named_with_those_that_are(tmp_path):
    write(tmp_path / "a.parquet", STACK)
    with pytest.raises(
        ValueError, match=r"a.parquet: no column of strings text; there are hexsha, .*content.* columns:"
    ):
        discover([Source("parquet", str(tmp_path))])
    write(tmp_path / "a.jsonl", STACK)
    bad = read_all("jsonl", tmp_path / "a.jsonl")[1]
    assert {b.reason for b in bad} == {"jsonl: no text"}
    assert bad[0].detail.startswith("no string in the field text; there are hexsha, size, ext")
    # one file among others that has no such column is set aside, not the corpus
    write(tmp_path / "b.parquet", FINEWEB)
    documents, bad = read_all("parquet", tmp_path)
    assert len(documents) == 3
    assert [(b.path, b.reason) for b in bad] == [(str(tmp_path / "a.parquet"), "parquet: no text")]


def test_numbers_that_json_does_not_have_are_no_metadata(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "x": NaN, "y": 1e999, "z": 1.5}\n')
    assert read_all("jsonl", tmp_path / "a.jsonl")[0][0]["metadata"] == {"z": 1.5}


@pytest.mark.parametrize("seed", range(6))
def test_a_large_json_lines_file_in_parts_gives_the_same_as_in_one(tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    lines = [json.dumps({"text": "é" * rng.choice((1, 10, 100, 3000))}, ensure_ascii=False) for _ in range(200)]
    lines[rng.randrange(200)] = "{broken"
    for at in rng.sample(range(200), 5):
        lines[at] = ""
    path = tmp_path / "a.jsonl"
    end = rng.choice(("", "\n", "\n\n"))
    path.write_bytes(("\ufeff" if seed % 2 else "").encode() + "\n".join(lines).encode() + end.encode())
    whole = [item for unit in discover([Source("jsonl", str(path))]) for item in read(unit)]
    size = rng.choice((500, 2000, 50_000))
    monkeypatch.setattr(sources, "_SPLIT_BYTES", size)
    units = discover([Source("jsonl", str(path))])
    assert len(units) == round(path.stat().st_size / size) > 1
    assert len({unit.name for unit in units}) == len(units)
    assert [item for unit in units for item in read(unit)] == whole


def test_a_compressed_json_lines_file_stays_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_SPLIT_BYTES", 10)
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(b'{"text": "a"}\n' * 100))
    (unit,) = discover([Source("jsonl", str(tmp_path))])
    assert len(list(read(unit))) == 100


def test_a_large_parquet_file_in_parts_gives_the_same_as_in_one(tmp_path, monkeypatch):
    rng = random.Random(0)
    table = pa.table({"text": [rng.randbytes(200).hex() for _ in range(60)], "n": list(range(60))})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=5)
    whole = [item for unit in discover([Source("parquet", str(path))]) for item in read(unit)]
    monkeypatch.setattr(sources, "_SPLIT_BYTES", path.stat().st_size // 4)
    units = discover([Source("parquet", str(path))])
    assert 3 <= len(units) <= 6
    assert [item for unit in units for item in read(unit)] == whole
    data = bytearray(path.read_bytes())
    data[-20:-10] = b"\xff" * 10
    path.write_bytes(data)
    (unit,) = discover([Source("parquet", str(path))])
    assert [item.reason for item in read(unit) if isinstance(item, BadRecord)] == ["parquet: not readable"]


def test_parquet_rows_become_documents_across_row_groups(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"body": ["a", None, "c", "d"], "url": ["u", "v", "w", "x"], "n": [1, 2, 3, 4], "l": [[1]] * 4})
    pq.write_table(table, path, row_group_size=2)
    documents, bad = read_all("parquet", path, columns={"text": "body"})
    assert [(d["text"], d["url"], d["metadata"]) for d in documents] == [
        ("a", "u", {"row": 0, "n": 1}),
        ("c", "w", {"row": 2, "n": 3}),
        ("d", "x", {"row": 3, "n": 4}),
    ]
    assert [(b.reason, b.detail) for b in bad] == [
        ("parquet: no text", "row 1: no string in the field body; there are body, url, n")
    ]


def test_damaged_parquet_is_named_and_sound_row_groups_are_read(tmp_path):
    path = tmp_path / "a.parquet"
    rng = random.Random(0)
    pq.write_table(pa.table({"text": [rng.randbytes(500).hex() for _ in range(30)]}), path, row_group_size=10)
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    documents, bad = read_all("parquet", path)
    assert [d["metadata"]["row"] for d in documents] == [*range(10), *range(20, 30)]
    assert [(b.reason, b.offset) for b in bad] == [("parquet: damaged row group", start)]
    path.write_bytes(b"PAR1 nothing")
    assert [b.reason for b in read_all("parquet", path)[1]] == ["parquet: not readable"]


def test_a_parquet_row_that_is_no_utf8_or_too_long_and_a_damaged_footer_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    offsets = pa.array([0, 3, 5, 15], pa.int32()).buffers()[1]
    text = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"abc\xff\xfe" + b"x" * 10)])
    pq.write_table(pa.table({"text": text}), path)
    documents, bad = read_all("parquet", path, max_record_bytes=9)
    assert [d["text"] for d in documents] == ["abc"]
    assert [b.reason for b in bad] == ["parquet: bad UTF-8", "parquet: too long"]
    data = path.read_bytes()
    footer = int.from_bytes(data[-8:-4], "little")
    path.write_bytes(data[: -8 - footer] + b"\xff" * footer + data[-8:])
    assert [b.reason for b in read_all("parquet", path)[1]] == ["parquet: not readable"]
