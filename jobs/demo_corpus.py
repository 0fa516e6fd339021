"""Raw text for the demo from what every Python installation has, with no network.

Web pages are the modules and classes of the standard library (and numpy) as pydoc renders them, written as gzip WARC
files. Books are the language reference that ships as ``pydoc_data.topics`` and the long descriptions of installed
packages; the shorter descriptions are a JSON Lines file. Code is the standard library's own source without its test
suite, which not every installation has; it is read where it is installed, through links.

So that every part of the pipeline has something to do, some pages are there twice (exactly, or with a few words
changed), the last WARC file ends within a record, and one JSON line is broken. ``planted.json`` says which.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib.metadata
import importlib.util
import io
import json
import os
import pkgutil
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import uuid
from collections.abc import Iterator

from pipelines.documents import InputError
from pipelines.sources import Source

VERSION = 1
"""Raised when the files below would come out differently."""

# They open windows, browsers or sockets, print, or are the test suite.
SKIPPED = {"antigravity", "this", "idlelib", "turtledemo", "test", "tests", "lib2to3", "pydoc_data", "__main__"}
NO_CODE = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
PAGES_OF_PACKAGES = ("numpy",)  # a dependency, so it is there; 6 MB of prose about arrays
RENDERERS = 2
RENDER_SECONDS = 180
WARC_BYTES = 6_000_000  # of pages before compression
CHAPTER_BYTES = 30_000
BOOK_CHARACTERS = 12_000  # package descriptions at least this long are books
PLANTED_PAGES = 60  # of each kind
REPLACEMENTS = ("amber", "basalt", "cinder", "dolomite", "ember", "feldspar", "garnet", "hematite")


def make_corpus(folder: str, seed: int = 0) -> list[Source]:
    """Write the demo's raw text below ``folder``, unless it is there already, and name its sources.

    The same Python, packages and seed give the same bytes. The folder appears whole or not at all.

    Args:
        folder: a local path that does not exist yet, is empty, or was made by this function.
        seed: decides the order of the pages and which are repeated.

    Raises:
        ValueError: the folder holds something else.
    """
    folder = os.path.abspath(folder)
    made_from = {
        "version": VERSION,
        "seed": seed,
        "python": sys.version,
        "packages": [f"{name} {importlib.metadata.version(name)}" for name in PAGES_OF_PACKAGES],
    }
    marker = f"{folder}/made-from.json"
    if os.path.exists(marker):
        with open(marker, encoding="utf-8") as file:
            if json.load(file) == made_from:
                return _sources(folder)
    elif os.path.isdir(folder) and os.listdir(folder):
        raise InputError(f"{folder}: holds files that the demo did not make; give the demo a folder of its own")

    unfinished = f"{os.path.dirname(folder)}/.{os.path.basename(folder)}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    for name in ("web", "books"):
        os.makedirs(f"{unfinished}/{name}")
    planted = _write_web(f"{unfinished}/web", _render_pages(unfinished), random.Random(seed))
    _link_code(f"{unfinished}/code")
    _write_reference(f"{unfinished}/books")
    planted |= _write_descriptions(f"{unfinished}/books", f"{unfinished}/descriptions.jsonl")
    for name, value in (("planted", planted), ("made-from", made_from)):
        with open(f"{unfinished}/{name}.json", "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(unfinished, folder)
    return _sources(folder)


def _sources(folder: str) -> list[Source]:
    return [
        # C4's rules would drop every page with a curly bracket, which manuals of a programming language hold.
        Source(
            kind="warc", path=f"{folder}/web", name="web", rules=["language", "gopher_repetition", "gopher_quality"]
        ),
        Source(kind="books", path=f"{folder}/books", name="books"),
        Source(kind="jsonl", path=f"{folder}/descriptions.jsonl", name="descriptions"),
        Source(kind="code", path=f"{folder}/code", name="code"),
    ]


def _modules() -> list[str]:
    """Names of the modules to render, found without importing any of them."""
    stdlib = sysconfig.get_paths()["stdlib"]
    names = []
    for top in sorted(name for name in sys.stdlib_module_names if not name.startswith("_") and name not in SKIPPED):
        names += [top, *_submodules(f"{stdlib}/{top}", f"{top}.")]
    for package in PAGES_OF_PACKAGES:
        spec = importlib.util.find_spec(package)
        for place in spec.submodule_search_locations if spec else ():
            names += [package, *_submodules(place, f"{package}.")]
    return names


def _submodules(folder: str, prefix: str) -> Iterator[str]:
    if not os.path.isfile(f"{folder}/__init__.py"):
        return
    for module in pkgutil.iter_modules([folder]):
        if not module.name.startswith("_") and module.name not in SKIPPED:
            yield prefix + module.name
            if module.ispkg:
                yield from _submodules(f"{folder}/{module.name}", f"{prefix}{module.name}.")


def _render_pages(folder: str) -> dict[str, str]:
    """HTML pages of modules and classes, by name; modules that cannot be imported here are left out."""
    names = _modules()
    shares = [names[i::RENDERERS] for i in range(RENDERERS)]
    outputs = [f"{folder}/pages-{i}.jsonl" for i in range(RENDERERS)]
    running = [_start_renderer(share, out, folder) for share, out in zip(shares, outputs, strict=True)]
    pages: dict[str, dict[str, str] | None] = {}
    for share, out, renderer in zip(shares, outputs, running, strict=True):
        pages |= _pages_of(renderer, out)
        while missing := [name for name in share if name not in pages]:
            # The first module without a page took the process down with it: pass over it and go on.
            pages[missing[0]] = None
            pages |= _pages_of(_start_renderer(missing[1:], out, folder), out)
        os.unlink(out)
    return {page: html for name in names for page, html in (pages[name] or {}).items()}


def _pages_of(renderer: subprocess.Popen, out: str) -> dict[str, dict[str, str] | None]:
    """What one renderer wrote before it ended, or was ended because a module hangs."""
    try:
        renderer.wait(RENDER_SECONDS)
    except subprocess.TimeoutExpired:
        renderer.kill()
        renderer.wait()
    with open(out, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file if line.endswith("\n")]
    return {line["name"]: line["pages"] for line in lines}


def _start_renderer(names: list[str], out: str, folder: str) -> subprocess.Popen:
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "demo_pages.py")
    # A bare environment: modules show it, write to HOME, and order their sets by the hash seed.
    # -P: this folder's tokenize.py must not stand before the standard library's.
    env = {"PATH": os.defpath, "HOME": folder, "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "TZ": "UTC"}
    env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    if "PYTHONPATH" in os.environ:
        env["PYTHONPATH"] = os.environ["PYTHONPATH"]
    with open(out, "w", encoding="utf-8"):
        pass  # there even if the renderer dies at once
    process = subprocess.Popen(
        [sys.executable, "-P", "-s", "-B", script, out],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env=env,
    )
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write("\n".join(names).encode())
    return process


def _write_web(folder: str, pages: dict[str, str], rng: random.Random) -> dict:
    """Pages and planted duplicates in seeded order over several WARC files; what was planted."""
    web = [(f"https://docs.example.org/python/{name}.html", html) for name, html in pages.items()]
    middling = [page for page in web if 4_000 < len(page[1]) < 150_000]
    chosen = rng.sample(middling, min(2 * PLANTED_PAGES, len(middling) // 2 * 2))
    exact, near = chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]
    copies = [(url.replace("docs.", "mirror."), html) for url, html in exact]
    edits = [(url.replace("docs.", "fork."), _change_words(html, rng)) for url, html in near]
    web += copies + edits
    rng.shuffle(web)

    bodies = [(url, html.encode("utf-8", "xmlcharrefreplace")) for url, html in web]
    count = max(1, round(sum(len(body) for _, body in bodies) / WARC_BYTES))
    info = warc_member("warcinfo", "", b"software: Ingot demo\r\nformat: WARC File Format 1.1\r\n")
    files = [[info, *(warc_member("response", *page) for page in bodies[i::count])] for i in range(count)]
    torn_url = "https://docs.example.org/python/torn.html"
    torn = warc_member("response", torn_url, bodies[-1][1])
    torn_at = sum(map(len, files[-1]))
    files[-1].append(torn[: len(torn) // 2])
    for number, members in enumerate(files):
        with open(f"{folder}/pages-{number:02d}.warc.gz", "wb") as file:
            file.writelines(members)
    return {
        "exact": [[url, copy] for (url, _), (copy, _) in zip(exact, copies, strict=True)],
        "near": [[url, copy] for (url, _), (copy, _) in zip(near, edits, strict=True)],
        "torn": {"file": f"web/pages-{len(files) - 1:02d}.warc.gz", "offset": torn_at, "url": torn_url},
    }


def warc_member(kind: str, url: str, body: bytes) -> bytes:
    """One WARC record as a gzip member of its own, as crawlers write them so that one can be read alone."""
    from fastwarc.warc import WarcRecord, WarcRecordType

    record = WarcRecord()
    record.init_headers(record_type=getattr(WarcRecordType, kind))
    record.headers["WARC-Record-ID"] = f"<urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, url or kind)}>"
    record.headers["WARC-Date"] = "2026-01-01T00:00:00Z"
    if url:
        record.headers["WARC-Target-URI"] = url
        record.headers["Content-Type"] = "application/http; msgtype=response"
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: {len(body)}\r\n\r\n"
        body = head.encode() + body
    else:
        record.headers["Content-Type"] = "application/warc-fields"
    record.set_bytes_content(body)
    plain = io.BytesIO()
    record.write(plain)
    return gzip.compress(plain.getvalue(), compresslevel=6, mtime=0)


def _change_words(html: str, rng: random.Random) -> str:
    """The page with about one word in 300 of its text replaced, two at the least: word 5-gram Jaccard near 0.97."""
    words = [match.span() for match in re.finditer(r"(?<![&#\w])[a-z]{4,}(?![;\w])(?=[^<>]*<)", html)]
    changed = sorted(rng.sample(words, min(len(words), max(2, len(words) // 300))), reverse=True)
    for start, end in changed:
        html = html[:start] + rng.choice(REPLACEMENTS) + html[end:]
    return html


def _link_code(folder: str) -> None:
    """A tree of links to the standard library's source files."""
    stdlib = sysconfig.get_paths()["stdlib"]
    for place, folders, files in os.walk(stdlib):
        folders[:] = sorted(name for name in folders if name not in NO_CODE)
        target = os.path.normpath(os.path.join(folder, os.path.relpath(place, stdlib)))
        os.makedirs(target)
        for name in files:
            if name.endswith(".py"):
                os.symlink(os.path.join(place, name), os.path.join(target, name))


def _write_reference(folder: str) -> None:
    """The language reference, its topics in order, in chapters of about ``CHAPTER_BYTES``."""
    from pydoc_data.topics import topics

    chapter: list[str] = []
    number = 0
    names = sorted(topics)
    for name in names:
        chapter.append(topics[name].strip())
        if sum(map(len, chapter)) >= CHAPTER_BYTES or name == names[-1]:
            number += 1
            with open(f"{folder}/language-reference-{number:02d}.txt", "w", encoding="utf-8") as file:
                file.write("\n\n\n".join(chapter) + "\n")
            chapter = []


def _write_descriptions(books: str, jsonl: str) -> dict:
    """Long descriptions of installed packages as books, the others as JSON Lines with one line cut short."""
    found: dict[str, tuple[str, str]] = {}
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata
        payload = metadata.get_payload()
        text = (payload if isinstance(payload, str) else "") or metadata.get("Description") or ""
        name = re.sub(r"[^\w.-]", "-", metadata.get("Name") or "")
        if name and len(text) > 300:
            found[name.lower()] = (f"https://pypi.org/project/{name}/", text.encode("utf-8", "replace").decode())
    lines = []
    for name, (url, text) in sorted(found.items()):
        if len(text) >= BOOK_CHARACTERS:
            with open(f"{books}/about-{name}.txt", "w", encoding="utf-8") as file:
                file.write(text)
        else:
            lines.append(json.dumps({"text": text, "url": url}, ensure_ascii=False))
    middle = len(lines) // 2
    broken = json.dumps({"text": "This line was cut short when the file was copied", "url": ""})[:-9]
    lines.insert(middle, broken)
    with open(jsonl, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    return {"broken_line": {"file": "descriptions.jsonl", "line": middle + 1}}
