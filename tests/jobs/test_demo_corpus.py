import gzip
import io
import json
import os
import sysconfig
import zlib
from pathlib import Path

import pytest

from jobs import demo_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("demo") / "raw")
    return folder, demo_corpus.make_corpus(folder, seed=3)


def members(path):
    """Every whole gzip member of a file, decompressed, and how many bytes at its end are not one."""
    data, found = Path(path).read_bytes(), []
    while data:
        decompressor = zlib.decompressobj(wbits=31)
        found.append(decompressor.decompress(data))
        if not decompressor.eof:
            return found[:-1], len(data)
        data = decompressor.unused_data
    return found, 0


@pytest.fixture(scope="module")
def pages(corpus):
    """Bodies by URL, parsed from the WARC text by hand rather than by the library that wrote it."""
    found = {}
    for name in sorted(os.listdir(f"{corpus[0]}/web")):
        for record in members(f"{corpus[0]}/web/{name}")[0][1:]:
            head, http, body = record.removesuffix(b"\r\n\r\n").split(b"\r\n\r\n", 2)
            headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
            assert headers["WARC-Type"] == "response"
            assert int(headers["Content-Length"]) == len(http) + 4 + len(body)
            assert b"200 OK" in http
            found[headers["WARC-Target-URI"]] = body.decode()
    return found


def test_at_least_20_mb_of_text_without_the_test_suite(corpus, pages):
    from resiliparse.extract.html2text import extract_plain_text

    folder, sources = corpus
    text = sum(len(extract_plain_text(page, main_content=True)) for page in pages.values())
    text += sum(os.path.getsize(f"{folder}/books/{name}") for name in os.listdir(f"{folder}/books"))
    text += os.path.getsize(f"{folder}/descriptions.jsonl")
    (code,) = [source for source in sources if source.kind == "code"]
    stdlib = sysconfig.get_paths()["stdlib"]
    for place, _, files in os.walk(code.path):
        assert not {"test", "tests", "site-packages"} & set(place.split("/code/")[-1].split("/"))
        for name in files:
            assert os.path.realpath(f"{place}/{name}").startswith(os.path.realpath(stdlib))
            text += os.path.getsize(f"{place}/{name}")
    assert text > 20_000_000


def test_planted_duplicates_are_among_the_pages(corpus, pages):
    planted = json.loads(Path(f"{corpus[0]}/planted.json").read_text())
    assert len(planted["exact"]) == len(planted["near"]) == demo_corpus.PLANTED_PAGES
    for url, copy in planted["exact"]:
        assert pages[url] == pages[copy]
    for url, copy in planted["near"]:
        before, after = pages[url], pages[copy]
        shingles = [set(zip(*(page.split()[i:] for i in range(3)), strict=False)) for page in (before, after)]
        assert 0.5 < len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1]) < 1
        # only words of the text changed: the tags are the same
        assert [part.split(">")[0] for part in before.split("<")] == [part.split(">")[0] for part in after.split("<")]


def test_the_last_web_archive_ends_within_a_record_and_one_line_is_broken(corpus):
    folder = corpus[0]
    planted = json.loads(Path(f"{folder}/planted.json").read_text())
    for name in sorted(os.listdir(f"{folder}/web")):
        whole, rest = members(f"{folder}/web/{name}")
        assert len(whole) > 20
        torn = f"web/{name}" == planted["torn"]["file"]
        assert (rest > 0) == torn
        if torn:
            assert os.path.getsize(f"{folder}/web/{name}") - rest == planted["torn"]["offset"]
            with pytest.raises(EOFError):
                gzip.GzipFile(fileobj=io.BytesIO(Path(f"{folder}/web/{name}").read_bytes())).read()
    broken = []
    for number, line in enumerate(Path(f"{folder}/descriptions.jsonl").read_text().split("\n")[:-1], 1):
        try:
            json.loads(line)
        except ValueError:
            broken.append(number)
    assert broken == [planted["broken_line"]["line"]]


def test_pages_hold_nothing_of_this_machine(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("A_SECRET", "hunter2-in-the-environment")
    monkeypatch.setattr(demo_corpus, "_modules", lambda: ["cgi", "os", "antigravity_is_absent", "sys", "textwrap"])
    pages = demo_corpus._render_pages(str(tmp_path))
    assert {"os", "sys", "textwrap", "textwrap.TextWrapper"} <= set(pages)
    assert "Wrap&nbsp;a&nbsp;single&nbsp;paragraph" in pages["textwrap"]
    text = "".join(pages.values())
    for private in ("hunter2", str(tmp_path), os.path.expanduser("~"), " at 0x"):
        assert private not in text
    assert capfd.readouterr() == ("", "")


def test_a_module_that_kills_its_process_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "deadly.py").write_text("import os\nos._exit(9)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(demo_corpus, "_modules", lambda: ["string", "os", "deadly", "sys", "textwrap", "deadly"])
    pages = demo_corpus._render_pages(str(tmp_path))
    assert {"string", "os", "sys", "textwrap"} <= set(pages)
    assert "deadly" not in pages


def test_same_seed_same_bytes_and_made_once(tmp_path, monkeypatch):
    some = demo_corpus._modules()[::30]
    monkeypatch.setattr(demo_corpus, "_modules", lambda: some)
    first, again = tmp_path / "first", tmp_path / "again"
    sources = demo_corpus.make_corpus(str(first), seed=3)
    written = {file: file.stat().st_mtime_ns for file in first.rglob("*.warc.gz")}
    assert demo_corpus.make_corpus(str(first), seed=3) == sources
    assert {file: file.stat().st_mtime_ns for file in first.rglob("*.warc.gz")} == written

    demo_corpus.make_corpus(str(again), seed=3)
    for file in (file for file in first.rglob("*") if file.is_file()):
        assert file.read_bytes() == (again / file.relative_to(first)).read_bytes(), file
    demo_corpus.make_corpus(str(again), seed=4)
    assert (first / "web/pages-00.warc.gz").read_bytes() != (again / "web/pages-00.warc.gz").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["again", "first"]  # nothing unfinished is left


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds files that the demo did not make"):
        demo_corpus.make_corpus(str(tmp_path))
    assert (tmp_path / "thesis.txt").exists()
