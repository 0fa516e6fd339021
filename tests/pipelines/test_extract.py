import importlib.util
import textwrap
import threading

import pytest

from pipelines.extract import ExtractionError, Extractor, ExtractSettings, charset, extract_text

SENTENCE = "Die Bürger von Köln grüßen herzlich, und das schon seit vielen Jahren an jedem Morgen."
PAGE = f"""<html><head><title>t</title>{{meta}}<script>var hidden = 1;</script></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/a">About us</a></li></ul></nav>
<main><article><h1>Gruß</h1><p>{SENTENCE}</p><p>{SENTENCE}</p></article></main>
<footer>Copyright</footer></body></html>"""


@pytest.mark.parametrize(
    ("encoding", "header", "meta"),
    [
        ("utf-8", None, ""),
        ("utf-8", "text/html; charset=UTF-8", ""),
        ("cp1252", "text/html;charset='ISO-8859-1'", ""),
        ("cp1252", None, '<meta charset="windows-1252">'),
        ("cp1252", "text/html", '<meta http-equiv="Content-Type" content="text/html; charset=iso-8859-1">'),
        ("cp1252", None, ""),  # by its bytes
        ("utf-8-sig", "text/html; charset=iso-8859-1", ""),  # a byte order mark beats the header
        ("utf-16", None, ""),
        ("utf-8", "text/html; charset=no-such-charset", '<meta charset="utf-8">'),
        ("utf-8", "text/html; charset=utf-8", '<meta charset="iso-8859-1">'),  # the header beats the page
    ],
)
def test_text_comes_out_right_whatever_the_charset(encoding, header, meta):
    text = extract_text(PAGE.replace("{meta}", meta).encode(encoding), header)
    assert text.count(SENTENCE) == 2
    assert "\ufffd" not in text


def test_navigation_scripts_and_footers_are_left_out_and_paragraphs_parted():
    text = extract_text(PAGE.replace("{meta}", "").encode())
    assert text == f"Gruß\n\n{SENTENCE}\n\n{SENTENCE}"


def test_bytes_outside_the_charset_are_marked_and_the_rest_stays():
    text = extract_text(b"<p>good \xff\xfe\x80 text</p>", "text/html; charset=utf-8")
    assert text.startswith("good ")
    assert text.endswith(" text")
    assert "\ufffd" in text


@pytest.mark.parametrize("html", [b"", b"\x00\x01\x02", b"<", b"<html><body><script>x", b"<!-- \xff", b"<p>" * 20000])
def test_damaged_pages_give_no_text_and_no_error(html):
    assert extract_text(html).strip("<\ufffd") == ""


def test_hard_spaces_and_controls_become_plain():
    assert extract_text(b"<p>a&nbsp;b\x01\x85c</p>", "text/html; charset=utf-8").startswith("a b")


def test_a_meta_charset_of_utf_16_means_utf_8():
    assert charset(b'<meta charset="utf-16">') == "utf-8"


NESTED = b"<div>" * 100_000 + b"text"
"""A page that takes resiliparse minutes: its search for the main content takes time with the square of the depth."""


def test_pages_come_back_in_order_as_the_parser_alone_reads_them():
    pages = [(f"<p>Page {i} says {'much ' * 10_000 * (i % 3)}</p>".encode(), None) for i in range(300)]
    pages.append(("<p>Grüße</p>".encode("cp1252"), "text/html; charset=cp1252"))
    with Extractor(ExtractSettings()) as extract:
        assert extract(pages) == [extract_text(*page) for page in pages]
        assert extract([]) == []


def test_a_page_without_end_is_given_up_and_its_neighbours_are_read():
    settings = ExtractSettings(timeout_s=0.2)
    with Extractor(settings) as extract:
        before, slow, after = extract([(b"<p>before", None), (NESTED, None), (b"<p>after", None)])
        assert (before, after) == ("before", "after")
        assert slow == ExtractionError("html: too slow", "more than 0.2 s of CPU time")
        assert extract([(b"<p>later", None)]) == ["later"]


def test_a_page_that_takes_too_much_memory_is_given_up_and_its_neighbours_are_read():
    with Extractor(ExtractSettings(memory_bytes=30_000_000)) as extract:
        before, large, after = extract([(b"<p>before", None), (b"a" * 12_000_000, None), (b"<p>after", None)])
    assert (before, after) == ("before", "after")
    assert large == ExtractionError("html: too large", "more than 30,000,000 bytes of memory")


@pytest.fixture
def fake_parser(tmp_path, monkeypatch):
    """A module in trafilatura's place that does what the page says; settings to use it with."""
    code = """
        import os, signal, time
        def extract(page, **options):
            if page == "die once" and not os.path.exists("{folder}/died"):
                open("{folder}/died", "w").close()
                page = "die"
            if page == "die":
                os.kill(os.getpid(), signal.SIGSEGV)
            if page == "sleep":
                time.sleep(60)
            if page == "raise":
                raise KeyError(page)
            print("noise")
            return page
    """
    (tmp_path / "trafilatura.py").write_text(textwrap.dedent(code).replace("{folder}", str(tmp_path)))
    monkeypatch.syspath_prepend(tmp_path)
    return ExtractSettings(extractor="trafilatura", timeout_s=0.3)


def test_a_parser_that_dies_sleeps_or_raises_costs_that_page(fake_parser):
    pages = [(page, None) for page in (b"one", b"die", b"two", b"sleep", b"three", b"raise", b"four", b"die once")]
    with Extractor(fake_parser) as extract:
        results = extract(pages)
    assert results[::2] == ["one", "two", "three", "four"]
    died, slept, raised, died_once = results[1::2]
    assert died == ExtractionError("html: parser died", "helper process ended with SIGSEGV")
    assert slept.reason == "html: too slow"
    assert raised == ExtractionError("html: not extracted", "KeyError('raise')")
    assert died_once == "die once"  # such as one that something else killed


def test_a_helper_that_does_not_start_says_why(tmp_path, monkeypatch):
    (tmp_path / "trafilatura.py").write_text("raise ImportError('libxml2 is too old')")
    monkeypatch.syspath_prepend(tmp_path)
    settings = ExtractSettings(extractor="trafilatura")
    with Extractor(settings) as extract, pytest.raises(RuntimeError, match="(?s)does not start.*libxml2 is too old"):
        extract([(b"<p>x", None)])


def test_no_helper_is_left_behind():
    def children():
        with open(f"/proc/self/task/{threading.get_native_id()}/children") as listing:
            return set(listing.read().split())

    before = children()
    with Extractor(ExtractSettings()) as extract:
        extract([(b"<p>x", None)])
        assert len(children() - before) == 1
    assert children() <= before


def test_trafilatura_reads_the_same_page():
    pytest.importorskip("trafilatura")
    text = extract_text(PAGE.replace("{meta}", "").encode(), None, ExtractSettings(extractor="trafilatura"))
    assert text.count(SENTENCE) >= 1
    assert "About us" not in text


def test_links_comments_and_navigation_stay_when_asked_for():
    page = b"""<body><nav><a href="/about">About</a></nav><main><p>See <a href="http://a.example/">this</a>.</p></main>
        <section id="comments"><p>First comment here</p></section></body>"""
    assert "http://a.example/" in extract_text(page, None, ExtractSettings(links=True))
    assert "http://a.example/" not in extract_text(page)
    assert "About" in extract_text(page, None, ExtractSettings(main_content=False))
    assert "First comment" in extract_text(page, None, ExtractSettings(comments=True))
    assert "First comment" not in extract_text(page)


def test_settings_that_cannot_work_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="timeout_s is 0"):
        ExtractSettings(timeout_s=0).validate()
    with pytest.raises(ValueError, match="memory_bytes is 5"):
        ExtractSettings(memory_bytes=5).validate()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'ingot\[trafilatura\]'"):
        ExtractSettings(extractor="trafilatura").validate()
