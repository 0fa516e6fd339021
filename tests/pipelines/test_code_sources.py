"""Source code from trees and tar archives."""

import gzip
import io
import random
import tarfile

import pytest
import zstandard
from test_sources import read_all

from pipelines.sources import Source, discover

FILES = {
    "src/a.py": b"def f():\n    return 1\n",
    "src/_private/b.rs": b"fn main() {}\n",
    "src/Makefile": b"all:\r\n\ttrue\r\n",
    "src/nul.c": b"int a;\0" + b"x" * 900,
    "src/noise.go": bytes(range(256)),
    "src/latin.c": "// déjà vu, très tôt à l'école\nint main;\n".encode("latin-1"),
    "src/notes.unknown": b"not code",
    "src/empty.py": b"",
    "src/.git/c.py": b"x = 1\n",
    "src/node_modules/d.js": b"x\n",
    "src/__pycache__/e.py": b"x\n",
    "src/deep/" + "long/" * 60 + "name.py": b"deep = 1\n",
}
TEXTS = {
    "a.py": "def f():\n    return 1\n",
    "_private/b.rs": "fn main() {}\n",
    "Makefile": "all:\n\ttrue\n",
    "latin.c": "// déjà vu, très tôt à l'école\nint main;\n",
    "deep/" + "long/" * 60 + "name.py": "deep = 1\n",
}


def test_a_tree_is_read_with_the_languages_of_its_files_and_binary_ones_are_named(tmp_path):
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    documents, bad = read_all("code", tmp_path / "src")
    assert {d["metadata"]["file"]: d["text"] for d in documents} == TEXTS
    assert {d["metadata"]["file"]: d["language"] for d in documents if "deep" not in d["metadata"]["file"]} == {
        "a.py": "python",
        "_private/b.rs": "rust",
        "Makefile": "make",
        "latin.c": "c",
    }
    assert next(d for d in documents if d["language"] == "c")["metadata"]["charset"] == "cp1252"
    assert read_all("code", f"{tmp_path}/src/**/*")[0] == documents
    assert {b.path.rpartition("/")[2]: b.reason for b in bad} == {
        "nul.c": "code: binary",
        "noise.go": "code: binary",
        "empty.py": "empty file",
    }


def pack(files, format_=tarfile.PAX_FORMAT):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format_) as archive:
        folder = tarfile.TarInfo("src")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("src/link.py")
        link.type, link.linkname = tarfile.SYMTYPE, "a.py"
        archive.addfile(link)
    return out.getvalue()


@pytest.mark.parametrize("format_", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.zst"])
def test_a_tar_archive_is_read_as_the_tree_that_it_packs(tmp_path, suffix, format_):
    data = pack(FILES, format_)
    data = gzip.compress(data) if "gz" in suffix else zstandard.compress(data) if "zst" in suffix else data
    (tmp_path / f"a{suffix}").write_bytes(data)
    documents, bad = read_all("code", f"{tmp_path}/*{suffix}")
    assert {d["metadata"]["file"].removeprefix("src/"): d["text"] for d in documents} == TEXTS
    assert {b.detail.partition(":")[0]: b.reason for b in bad} == {
        "src/nul.c": "code: binary",
        "src/noise.go": "code: binary",
    }
    assert len({d["id"] for d in documents}) == len(documents)


NAMES = [f"f{i:02d}.py" for i in range(20)]
PLAIN = {name: f"# {name}\n".encode() * (50 + i * 7) for i, name in enumerate(NAMES)}


def names_of(documents):
    return [d["metadata"]["file"] for d in documents]


@pytest.mark.parametrize("victim", [0, 7, 19])
def test_a_damaged_header_costs_its_own_file_alone(tmp_path, victim):
    data = bytearray(pack(PLAIN))
    at = data.index(NAMES[victim].encode() + b"\0")
    data[at] ^= 4
    (tmp_path / "a.tar").write_bytes(data)
    documents, bad = read_all("code", tmp_path / "a.tar")
    assert names_of(documents) == NAMES[:victim] + NAMES[victim + 1 :]
    assert [(b.offset, b.reason) for b in bad] == [(at, "tar: broken header")]


def test_an_archive_that_is_cut_short_keeps_what_is_whole(tmp_path):
    data = pack(PLAIN)
    rng = random.Random(0)
    for _ in range(20):
        cut = rng.randrange(600, len(data) - 10_300)
        (tmp_path / "a.tar").write_bytes(data[:cut])
        documents, bad = read_all("code", tmp_path / "a.tar")
        whole = [name for name in NAMES if data.index(name.encode() + b"\0") + 512 + len(PLAIN[name]) <= cut]
        assert names_of(documents) == whole
        assert [b.reason for b in bad] == ["tar: cut short"]


def test_a_damaged_member_of_a_compressed_archive_costs_the_files_in_it(tmp_path):
    data = pack(PLAIN)
    members = [gzip.compress(data[i : i + 4096]) for i in range(0, len(data), 4096)]
    offset = len(members[0]) + len(members[1])
    broken = bytearray(members[2])
    broken[len(broken) // 2] ^= 8
    (tmp_path / "a.tar.gz").write_bytes(b"".join([*members[:2], bytes(broken), *members[3:]]))
    documents, bad = read_all("code", tmp_path / "a.tar.gz")
    sound = [
        name
        for name in NAMES
        if (at := data.index(name.encode() + b"\0")) + 512 + len(PLAIN[name]) <= 8192 or at >= 3 * 4096
    ]
    assert set(names_of(documents)) >= set(sound)
    assert len(sound) >= 14
    assert ("tar: damaged compression", offset) in [(b.reason, b.offset) for b in bad]


def test_a_file_that_is_too_long_is_passed_over(tmp_path):
    (tmp_path / "a.tar").write_bytes(pack({"a.py": b"a = 1\n", "b.py": b"b" * 5_000_000, "c.py": b"c = 1\n"}))
    documents, bad = read_all("code", tmp_path / "a.tar", max_record_bytes=1000)
    assert names_of(documents) == ["a.py", "c.py"]
    assert [b.reason for b in bad] == ["tar: too long"]


def test_a_folder_without_source_files_says_how_archives_are_named(tmp_path):
    (tmp_path / "a.tar").write_bytes(pack(PLAIN))
    with pytest.raises(FileNotFoundError, match=r"named by a glob, such as"):
        discover([Source("code", str(tmp_path))])
