"""Books in text files of any charset, of Project Gutenberg, and as EPUB."""

# ruff: noqa: RUF001 (letters of other scripts that look like Latin ones)

import gzip
import io
import zipfile

import pytest
from test_sources import read_all

PARAGRAPHS = {
    "utf-8": "Fünf Äpfel fielen über die Straße – größer als je zuvor; schön war es.\n" * 30,
    "cp1252": "L'été dernier, nous étions à la plage où les élèves mangeaient des pâtes.\n" * 30,
    "cp1251": "Все счастливые семьи похожи друг на друга, каждая несчастливая несчастлива по-своему.\n" * 30,
    "koi8-r": "Все счастливые семьи похожи друг на друга, каждая несчастливая несчастлива по-своему.\n" * 30,
    "shift_jis": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n" * 30,
    "gb18030": "道可道，非常道。名可名，非常名。无名天地之始；有名万物之母。\n" * 30,
    "euc_kr": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.\n" * 30,
    "iso8859-2": "Zażółć gęślą jaźń, a potem pójdź kińże tę chmurność w głąb flaszy.\n" * 30,
    "utf-16": "The whale, the white whale, said Ahab.\n" * 30,
    "utf-16-be": "The whale, the white whale, said Ahab.\n" * 30,
    "utf-32": "The whale, the white whale, said Ahab.\n" * 30,
}


def test_books_are_one_document_a_file(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "Moby Dick.txt").write_bytes(b"\xef\xbb\xbfCall me\r\nIshmael.")
    (tmp_path / "b" / "zip.txt.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "long.txt").write_bytes(b"x" * 200)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    documents, bad = read_all("books", tmp_path, max_record_bytes=100)
    assert [(d["text"], d["metadata"]) for d in documents] == [
        ("Call me\nIshmael.", {"title": "Moby Dick"}),
        ("packed", {"title": "zip"}),
    ]
    assert [(b.reason, b.offset) for b in bad] == [("empty file", 0), ("book: too long", 0)]


@pytest.mark.parametrize("charset", PARAGRAPHS)
def test_a_book_in_any_charset_is_read_and_the_charset_noted(tmp_path, charset):
    (tmp_path / "a.txt").write_bytes(PARAGRAPHS[charset].encode(charset))
    documents, bad = read_all("books", tmp_path)
    assert not bad
    assert documents[0]["text"] == PARAGRAPHS[charset]
    assert ("charset" in documents[0]["metadata"]) == (charset != "utf-8")


def test_a_damaged_utf8_book_stays_utf8_and_what_is_no_text_is_set_aside(tmp_path):
    data = PARAGRAPHS["utf-8"].encode()
    at = data.index("Ä".encode())
    (tmp_path / "a.txt").write_bytes(data[:at] + b"\xff" + data[at + 1 :])
    for name, data in {
        "noise.txt": bytes(range(256)) * 20,
        "packed.txt": gzip.compress(b"")[3:] + zipfile.ZipFile.__doc__.encode("utf-32-le"),
        "zeros.txt": b"\0" * 1000,
    }.items():
        (tmp_path / name).write_bytes(data)
    documents, bad = read_all("books", tmp_path)
    assert len(documents) == 1
    assert documents[0]["text"].replace("\ufffd", "Ä", 1).replace("\ufffd", "") == PARAGRAPHS["utf-8"]
    assert documents[0]["metadata"]["lost"] == 2
    assert {b.reason for b in bad} == {"book: not text"}
    assert len(bad) == 3


GUTENBERG = """\ufeffThe Project Gutenberg EBook of A Book, by Someone

Title: A Book

*** START OF THIS PROJECT GUTENBERG EBOOK A BOOK ***

Produced by Anne and
the Proofreaders

CHAPTER I

The text. *** And stars.

{end}

*** START: FULL LICENSE ***
"""


@pytest.mark.parametrize(
    "end", ["*** END OF THE PROJECT GUTENBERG EBOOK A BOOK ***", "End of Project Gutenberg's A Book, by Someone"]
)
def test_project_gutenberg_s_frame_is_taken_off_where_it_stands(tmp_path, end):
    (tmp_path / "a.txt").write_text(GUTENBERG.format(end=end))
    assert read_all("books", tmp_path)[0][0]["text"] == "CHAPTER I\n\nThe text. *** And stars.\n"
    kept = read_all("books", tmp_path, strip_gutenberg=False)[0][0]["text"]
    assert kept == GUTENBERG.format(end=end).removeprefix("\ufeff")
    (tmp_path / "a.txt").write_text("No frame.\n" + end)
    assert read_all("books", tmp_path)[0][0]["text"] == "No frame.\n" + end


# EPUB

CONTAINER = """<?xml version="1.0"?><container xmlns="urn:oasis:names:tc:opendocument:xmlns:container" version="1.0">
<rootfiles><rootfile full-path="OEBPS/book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>"""
PACKAGE = """<?xml version="1.0"?><package xmlns="http://www.idpf.org/2007/opf" version="3.0">
<metadata xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>A  Book</dc:title><dc:creator>Some One</dc:creator>
<dc:language>en</dc:language></metadata><manifest>{items}
<item id="nav" href="nav.xhtml" media-type="application/xhtml+xml" properties="nav"/>
<item id="img" href="cover.jpg" media-type="image/jpeg"/></manifest>
<spine><itemref idref="nav"/>{refs}</spine></package>"""
PAGE = """<?xml version="1.0" encoding="utf-8"?><html xmlns="http://www.w3.org/1999/xhtml"><head><title/>
<script src="x.js"/></head><body><h1>Chapter {n}</h1><p>Grün &amp; <i>text</i> {n}.<br/>Second line.</p>
<div class="x"/><p>Last.</p></body></html>"""


def epub(chapters=3, package=PACKAGE, container=CONTAINER, page=PAGE, names=None, more=None, how=zipfile.ZIP_DEFLATED):
    names = names or [f"text/c {n}.xhtml" for n in range(chapters)]
    items = "".join(
        f'<item id="c{n}" href="{name.replace(" ", "%20")}" media-type="application/xhtml+xml"/>'
        for n, name in enumerate(names)
    )
    refs = "".join(f'<itemref idref="c{n}"/>' for n in reversed(range(len(names))))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", how) as archive:
        archive.writestr("mimetype", "application/epub+zip", zipfile.ZIP_STORED)
        archive.writestr("META-INF/container.xml", container)
        archive.writestr("OEBPS/book.opf", package.format(items=items, refs=refs))
        archive.writestr("OEBPS/nav.xhtml", PAGE.format(n="nav"))
        archive.writestr("OEBPS/cover.jpg", b"\xff\xd8" * 100)
        for n, name in enumerate(names):
            archive.writestr(f"OEBPS/{name}", page.format(n=n))
        for name, data in (more or {}).items():
            archive.writestr(name, data)
    return out.getvalue()


def read_epub(tmp_path, data, **settings):
    (tmp_path / "a.epub").write_bytes(data)
    documents, bad = read_all("books", tmp_path, **settings)
    return documents, [b.reason for b in bad], [b.detail for b in bad]


def test_an_epub_is_its_chapters_in_the_order_of_the_spine(tmp_path):
    documents, reasons, _ = read_epub(tmp_path, epub())
    assert not reasons
    assert documents[0]["metadata"] == {"title": "A Book", "author": "Some One", "language": "en"}
    chapter = "Chapter {n}\n\nGrün & text {n}.\nSecond line.\n\nLast."
    assert documents[0]["text"] == "\n\n".join(chapter.format(n=n) for n in (2, 1, 0)) + "\n"


def encryption(uri, algorithm):
    return {
        "META-INF/encryption.xml": '<encryption xmlns="urn:oasis:names:tc:opendocument:xmlns:container" '
        'xmlns:enc="http://www.w3.org/2001/04/xmlenc#"><enc:EncryptedData>'
        f'<enc:EncryptionMethod Algorithm="{algorithm}"/><enc:CipherData><enc:CipherReference URI="{uri}"/>'
        "</enc:CipherData></enc:EncryptedData></encryption>"
    }


def test_an_encrypted_epub_is_set_aside_but_not_one_with_obfuscated_fonts(tmp_path):
    aes, fonts = "http://www.w3.org/2001/04/xmlenc#aes256-cbc", "http://www.idpf.org/2008/embedding"
    _, reasons, details = read_epub(tmp_path, epub(more=encryption("OEBPS/text/c%201.xhtml", aes)))
    assert (reasons, details) == (["book: encrypted epub"], ["OEBPS/text/c 1.xhtml"])
    documents, reasons, _ = read_epub(tmp_path, epub(more=encryption("OEBPS/font.otf", fonts)))
    assert documents
    assert not reasons


LAUGHS = (
    '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a0 "ha">'
    + "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10))
    + "]><x>&a9;</x>"
)


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (epub()[:-40], "book: damaged epub", "not a zip archive"),
        (epub()[:500], "book: damaged epub", "not a zip archive"),
        (b"PK\x03\x04" + b"x" * 500, "book: damaged epub", "not a zip archive"),
        (epub(container="<container"), "book: damaged epub", "ParseError"),
        (epub(container="<container/>"), "book: damaged epub", "names no package"),
        (epub(container=LAUGHS), "book: damaged epub", "amplification"),
        (epub(package="<package/>"), "no records", ""),
        (epub(package=PACKAGE.replace("{items}", "")), "book: damaged epub", "the spine names c2"),
        (epub(names=["../../../etc/passwd"]), "book: damaged epub", "etc/passwd"),
        (epub(page="<p>" + "x" * 3_000_000), "book: too long", "left to it"),
        (epub(package=PACKAGE.replace("{items}", " " * 9_000_000 + "{items}")), "book: too long", "OEBPS/book.opf"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_epub_is_named_with_what_is_wrong(tmp_path, data, reason, detail):
    _, reasons, details = read_epub(tmp_path, data, max_record_bytes=1_000_000)
    assert reasons == [reason]
    assert detail in details[0]
