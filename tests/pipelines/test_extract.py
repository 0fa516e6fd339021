import pytest

from pipelines.extract import charset, extract_text

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


def test_elements_nested_without_end_are_refused_at_once():
    with pytest.raises(ValueError, match="nested 100000 deep"):
        extract_text(b"<DIV>" * 100_000 + b"text")
    assert "text" in extract_text(b"<div>a</div>" * 100_000 + b"text")


def test_hard_spaces_and_controls_become_plain():
    assert extract_text(b"<p>a&nbsp;b\x01\x85c</p>", "text/html; charset=utf-8").startswith("a b")


def test_a_meta_charset_of_utf_16_means_utf_8():
    assert charset(b'<meta charset="utf-16">') == "utf-8"
