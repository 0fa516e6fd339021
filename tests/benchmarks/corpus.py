"""Real documents for the benchmarks, from files that a machine has: HTML pages, prose and source code below folders.

    python -m tests.benchmarks.corpus FOLDER... --output DIR [--each 1500] [--seed 0]

writes ``DIR/pages.warc.gz`` (the HTML files as responses of a web server), ``DIR/documents.jsonl`` (text of the pages
as Ingot extracts it, prose files, and code; fields id, text, kind), and ``DIR/code.tar``. From every folder at most
``--each`` files of each kind are drawn. Any folders will do, such as unpacked documentation packages of a Linux
distribution and a ``site-packages``; compressed text (``.gz``) is read too.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import random
import tarfile
from collections.abc import Iterator

from jobs.demo_corpus import warc_member
from pipelines.extract import extract_text
from pipelines.sources.code import language_of

PROSE = (".txt", ".rst", ".md", ".text", ".adoc")
_MOST = 2_000_000  # bytes of a file


def main() -> None:
    """Draw the files and write them in the three forms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--output", required=True)
    parser.add_argument("--each", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.makedirs(args.output, exist_ok=True)
    drawn = [item for folder in args.folders for item in draw(folder, args.each, args.seed)]
    random.Random(args.seed).shuffle(drawn)
    counts: dict[str, list[int]] = {}
    with (
        open(os.path.join(args.output, "documents.jsonl"), "w") as documents,
        open(os.path.join(args.output, "pages.warc.gz"), "wb") as warc,
        tarfile.open(os.path.join(args.output, "code.tar"), "w") as tar,
    ):
        for number, (kind, path) in enumerate(drawn):
            data = read(path)
            text = text_of(kind, data)
            if not text:
                continue
            name = f"{kind}-{number:06d}"
            if kind == "web":
                warc.write(warc_member("response", f"http://bench.example/{name}.html", data))
            elif kind == "code":
                info = tarfile.TarInfo(f"{name}{os.path.splitext(path)[1]}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            documents.write(json.dumps({"id": name, "text": text, "kind": kind}, ensure_ascii=False) + "\n")
            count = counts.setdefault(kind, [0, 0])
            count[0] += 1
            count[1] += len(text.encode())
    for kind, (count, size) in sorted(counts.items()):
        print(f"{kind}: {count:,} documents, {size / 1e6:.1f} MB")


def draw(folder: str, each: int, seed: int) -> Iterator[tuple[str, str]]:
    """At most ``each`` files of each kind below a folder: (kind, path)."""
    found: dict[str, list[str]] = {"web": [], "book": [], "code": []}
    for where, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(where, name)
            if (kind := kind_of(name)) and not os.path.islink(path) and 0 < os.path.getsize(path) < _MOST:
                found[kind].append(path)
    for kind, paths in found.items():
        random.Random(f"{seed} {kind}").shuffle(paths)
        yield from ((kind, path) for path in paths[:each])


def kind_of(name: str) -> str | None:
    """web, book or code, by a file's name."""
    stem = name.lower().removesuffix(".gz")
    if stem.endswith((".html", ".htm", ".xhtml")):
        return "web"
    if stem.endswith(PROSE):
        return "book"
    return "code" if language_of(stem) else None


def read(path: str) -> bytes:
    """A file's bytes, without its compression."""
    with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
        return file.read(8 * _MOST)


def text_of(kind: str, data: bytes) -> str:
    """The text as the pipeline would see it; empty for what it would not take."""
    if kind == "web":
        try:
            return extract_text(data)
        except ValueError:
            return ""
    try:
        return data.decode().replace("\r\n", "\n").strip()
    except UnicodeDecodeError:
        return ""


if __name__ == "__main__":
    main()
