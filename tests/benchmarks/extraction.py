"""How well and how fast do extractors find the main content of a page?

    python -m tests.benchmarks.extraction --peer /path/to/datatrove/bin/python \\
        --documentation FOLDER --pairs FOLDER [--each 40] [--rounds 3]

Pages whose text is known come from two places. Documentation that Debian packages, each unpacked (`dpkg-deb -x`) into a
folder of its own below --documentation, is made by generators whose templates say where the content is (SITES); the
text of that element is the reference. --pairs is a folder with html/NAME.html and txt/NAME.txt of the same names, such
as tests/data of the source of newspaper4k, where people wrote down the text of pages of newspapers.

Quality is the overlap of word 4-grams with the reference (a character is a word in scripts without spaces), as mean
over the pages of a site and then over the sites. Speed is pages a CPU second, of all processes that an extractor needs;
the rounds of all extractors take turns and the medians are compared. The peer, datatrove's default extractor, gets the
decoded page, its settings, and no sandbox; Ingot's decode the bytes.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from statistics import fmean, median
from typing import Any, NamedTuple

PEER = "datatrove's default"

SITES = {
    "sphinx": ("python3*-doc*/**/html/**/*.html", "div.body", ".headerlink"),
    "apache": ("apache2-doc*/**/manual/en/**/*.html", "#page-content", ".toplang,.bottomlang,#comments_section"),
    "mdbook": ("rust-doc*/**/html/[bren]*/*.html", "main", ""),
    "rustdoc": ("rust-doc*/**/html/std/**/struct*.html", "#main-content", ""),
    "scribble": ("racket-doc*/usr/share/doc/racket/*/*.html", ".main", ".navsettop,.navsetbottom,.versionbox"),
    "sqlite": ("sqlite3-doc*/**/sqlite3/*.html", "body", ".nosearch,.fancy_toc"),
    "postgresql": ("postgresql-doc*/**/html/*.html", "body", ".navheader,.navfooter"),
    "gimp": ("gimp-help*/**/help/en/*.html", "body", ".navheader,.navfooter"),
    "wireshark": ("wireshark-doc*/**/wsug_html_chunked/*.html", "body", ".navheader,.navfooter"),
    "asciidoc": ("git-doc*/**/*.html", "#content", ""),
    "publican": ("debian-handbook*/**/html/en-US/*.html", "body", "#banner,.docnav,.navfooter,#title"),
    "faq": ("anarchism*/**/html/*.html", "body", ".book-navigation"),
}
"""Generators of documentation: where their pages lie, the element with the content, and what in it is none."""

_SINGLE = r"\u0e00-\u0eff\u1000-\u109f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # characters that are words
_WORD = re.compile(rf"[{_SINGLE}]|[^\W{_SINGLE}]+")
_SHORTEST = 60  # words of a reference
_LARGEST = 400_000  # bytes of a page of documentation


class Page(NamedTuple):
    """A page and what it says."""

    site: str
    html: bytes
    text: str


def documentation(root: str, each: int, seed: int = 0) -> list[Page]:
    """At most ``each`` pages of every site whose documentation lies below ``root``."""
    pages = []
    for site, (pattern, content, chrome) in SITES.items():
        files = sorted(glob.glob(os.path.join(root, pattern), recursive=True))
        random.Random(seed).shuffle(files)
        found: list[Page] = []
        for file in files:
            if len(found) == each:
                break
            if os.path.getsize(file) > _LARGEST:
                continue
            with open(file, "rb") as source:
                html = source.read()
            text = element_text(html.decode("utf-8", "replace"), content, chrome)
            if len(text.split()) >= _SHORTEST:
                found.append(Page(site, html, text))
        pages += found
    return pages


def element_text(page: str, content: str, chrome: str) -> str:
    """All text of the element that a selector names, but for scripts and what other selectors name."""
    from resiliparse.parse.html import HTMLTree

    element = HTMLTree.parse(page).document.query_selector(content)
    if element is None:
        return ""
    for selector in ["script", "style", "noscript", *filter(None, chrome.split(","))]:
        for inner in list(element.query_selector_all(selector)):
            inner.decompose()
    return element.text


def pairs(folder: str) -> list[Page]:
    """Pages and their texts that lie in two folders."""
    pages = []
    for file in sorted(glob.glob(os.path.join(folder, "html", "*.html"))):
        reference = os.path.join(folder, "txt", os.path.basename(file).replace(".html", ".txt"))
        if os.path.exists(reference):
            with open(file, "rb") as html, open(reference, encoding="utf-8") as text:
                page = Page("news", html.read(), text.read())
            if len(words(page.text)) >= _SHORTEST:
                pages.append(page)
    return pages


def words(text: str) -> list[str]:
    """Words in lower case; each character is one in scripts without spaces."""
    return _WORD.findall(text.lower())


def overlap(found: str, reference: str, n: int = 4) -> tuple[float, float, float]:
    """Precision, recall and F1 of the word n-grams, each counted as often as it occurs."""
    grams = []
    for text in (found, reference):
        some = words(text)
        grams.append(Counter(zip(*(some[i:] for i in range(n)), strict=False)) if len(some) >= n else Counter([*some]))
    both = sum((grams[0] & grams[1]).values())
    precision, recall = both / max(sum(grams[0].values()), 1), both / max(sum(grams[1].values()), 1)
    return precision, recall, 2 * precision * recall / max(precision + recall, 1e-9)


# The extractors; each returns the texts and the CPU seconds that they took


def guarded(**chosen: Any) -> Callable[[list[Page]], tuple[list[str], float]]:
    """Ingot's, in its helper process."""
    from pipelines.extract import Extractor, ExtractSettings

    def run(pages: list[Page]) -> tuple[list[str], float]:
        began = time.process_time(), resource.getrusage(resource.RUSAGE_CHILDREN)
        with Extractor(ExtractSettings(timeout_s=30, **chosen)) as extract:
            texts = [text if isinstance(text, str) else "" for text in extract([(page.html, None) for page in pages])]
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        helper = children.ru_utime + children.ru_stime - began[1].ru_utime - began[1].ru_stime
        return texts, time.process_time() - began[0] + helper

    return run


def unguarded(pages: list[Page]) -> tuple[list[str], float]:
    """Ingot's, in this process."""
    from pipelines.extract import extract_text

    extract_text(b"<p>")  # imports
    began = time.process_time()
    return [extract_text(page.html) for page in pages], time.process_time() - began


def datatrove(python: str) -> Callable[[list[Page]], tuple[list[str], float]]:
    """The peer's, in a process of its own, where it is warm before its time is taken."""

    def run(pages: list[Page]) -> tuple[list[str], float]:
        with tempfile.TemporaryDirectory() as folder:
            source, output = os.path.join(folder, "pages.json"), os.path.join(folder, "texts.json")
            with open(source, "w") as out:
                json.dump([page.html.decode("utf-8", "replace") for page in pages], out)
            command = [python, os.path.abspath(__file__), "--as-peer", source, output]
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f"the peer failed:\n{done.stderr[-2000:]}")
            with open(output) as answer:
                found = json.load(answer)
        return found["texts"], found["seconds"]

    return run


def as_peer(source: str, output: str) -> None:
    """What the peer's Python does."""
    import logging

    from datatrove.pipeline.extractors import Trafilatura

    logging.disable()
    with open(source) as file:
        pages = json.load(file)
    extractor = Trafilatura()

    def extract(page: str) -> str:
        try:
            return extractor.extract(page) or ""
        except Exception:  # datatrove counts these and goes on
            return ""

    extract(pages[0])
    began = time.process_time()
    texts = [extract(page) for page in pages]
    with open(output, "w") as out:
        json.dump({"texts": texts, "seconds": time.process_time() - began}, out)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="a Python that has datatrove with trafilatura")
    parser.add_argument("--documentation", help="a folder of unpacked Debian packages")
    parser.add_argument("--pairs", help="a folder with html/ and txt/")
    parser.add_argument("--each", type=int, default=40, help="pages of a site")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    pages = documentation(args.documentation, args.each) if args.documentation else []
    pages += pairs(args.pairs) if args.pairs else []
    if not pages:
        parser.error("no pages: name --documentation, --pairs or both")
    extractors = {
        PEER: datatrove(args.peer),
        "resiliparse": guarded(),
        "resiliparse, no helper process": unguarded,
        "resiliparse, all text": guarded(main_content=False),
    }
    if find_spec("trafilatura"):
        extractors["trafilatura"] = guarded(extractor="trafilatura")
    seconds: dict[str, list[float]] = defaultdict(list)
    texts = {}
    for _ in range(args.rounds):
        for name, run in extractors.items():
            texts[name], taken = run(pages)
            seconds[name].append(taken)
    report(pages, texts, {name: median(taken) for name, taken in seconds.items()})


def report(pages: list[Page], texts: dict[str, list[str]], seconds: dict[str, float]) -> None:
    """Print quality and speed of every extractor, and its F1 by site."""
    sites = list(dict.fromkeys(page.site for page in pages))
    size = sum(len(page.html) for page in pages)
    print(f"{len(pages)} pages of {len(sites)} sites, {size / 1e6:.1f} MB\n")
    print(f"{'':32}{'precision':>10}{'recall':>8}{'F1':>8}{'pages/s':>10}{'ratio':>8}")
    table = {}
    for name, found in texts.items():
        scores = defaultdict(list)
        for page, text in zip(pages, found, strict=True):
            scores[page.site].append(overlap(text, page.text))
        table[name] = {site: [fmean(values) for values in zip(*scores[site], strict=True)] for site in sites}
        precision, recall, f1 = (fmean(table[name][site][i] for site in sites) for i in range(3))
        ratio = seconds[PEER] / seconds[name]
        print(f"{name:32}{precision:10.3f}{recall:8.3f}{f1:8.3f}{len(pages) / seconds[name]:10.1f}{ratio:8.1f}")
    print(f"\n{'F1':32}" + "".join(f"{site:>11}" for site in sites))
    for name in texts:
        print(f"{name:32}" + "".join(f"{table[name][site][2]:11.3f}" for site in sites))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-peer"]:
        as_peer(*sys.argv[2:])
    else:
        main()
