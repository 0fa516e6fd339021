import gzip
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.documents import InputError, to_table
from pipelines.filters import Batch, judge
from pipelines.filters.phrases import Phrases
from pipelines.filters.url import Address, UrlRules, split


def reasons(rules, urls):
    """The reason for which each address goes, None when it stays."""
    batch = Batch(to_table([{"id": str(i), "text": "t", "url": url} for i, url in enumerate(urls)]))
    measures = rules.apply(batch).measures
    broken = judge(measures, len(batch))[0]
    return [None if i < 0 else (measures[i].reason, measures[i].details[at]) for at, i in enumerate(broken)]


@pytest.fixture
def write(tmp_path):
    def write(name, *lines):
        data = "\n".join(lines).encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return [str(tmp_path / name)]

    return write


@pytest.mark.parametrize(
    ("url", "host", "rest"),
    [
        ("http://example.com", "example.com", ""),
        ("https://user:secret@WWW.Example.com:8080/a/b/?q=1#top", "www.example.com", "/a/b/?q=1"),
        ("//example.com/a/", "example.com", "/a"),
        ("example.com/http://other.example/", "example.com", "/http://other.example"),
        ("http://[2001:db8::1]:80/x", "[2001:db8::1]:80", "/x"),
        ("http://example.com?q=a/b", "example.com", "?q=a/b"),
        ("http://bücher.example/ü", "xn--bcher-kva.example", "/ü"),
        ("http://example.com./", "example.com", ""),
        ("", "", ""),
    ],
)
def test_addresses_are_cut_into_host_and_rest(url, host, rest):
    assert split(url) == Address(host, rest)


def test_a_listed_domain_stands_for_its_subdomains_only(write):
    rules = UrlRules(domains=write("d.txt", "# remark", "", "bad.example  # why", "*.wild.example", "BÜCHER.example"))
    urls = [
        "http://bad.example/x",
        "https://www.a.bad.example:443/",
        "http://notbad.example/",
        "http://bad.example.org/",
        "http://example/",
        "http://wild.example/",
        "http://xn--bcher-kva.example/",
        None,
    ]
    found = reasons(rules, urls)
    bad, wild, punycode = "bad.example", "wild.example", "xn--bcher-kva.example"
    assert [r and r[1] for r in found] == [bad, bad, None, None, None, wild, punycode, None]
    assert found[0][0] == "url: listed domain"


def test_a_listed_address_is_that_page_only(write):
    rules = UrlRules(urls=write("u.txt.gz", "http://www.a.example/x/", "a.example/y?q=1"))
    urls = ["https://a.example/x", "http://a.example/x/y", "http://a.example/y", "http://a.example/y?q=1#z"]
    assert [r is not None for r in reasons(rules, urls)] == [True, False, False, True]


def test_words_count_whole_and_parts_anywhere(write):
    rules = UrlRules(
        hard_words=write("h.txt", "poker"),
        soft_words=write("s.txt", "free", "Bonus", "größe"),
        parts=write("p.txt", "ca-si-no"),
    )
    urls = {
        "http://a.example/POKER-night": ("url: hard words", "poker"),
        "http://pokerface.example/": None,
        "http://a.example/free": None,
        "http://free.example/free/free": None,  # one word, however often
        "http://free.example/bonus_x": ("url: soft words", "free, bonus"),
        "http://a.example/gr%C3%B6%C3%9Fe/bonus": ("url: soft words", "bonus, größe"),
        "http://a.example/mycas-inos": ("url: parts", "casino"),
    }
    assert dict(zip(urls, reasons(rules, urls), strict=True)) == urls
    rules.max_soft_words = 0
    assert reasons(rules, ["http://a.example/free"]) == [("url: soft words", "free")]


def test_an_allowed_domain_is_not_judged(write):
    rules = UrlRules(domains=write("d.txt", "example"), allow=write("a.txt", "good.example"))
    assert [r is None for r in reasons(rules, ["http://www.good.example/", "http://other.example/"])] == [True, False]


def test_measures_hold_every_value_and_nan_where_there_is_no_address(write):
    rules = UrlRules(soft_words=write("s.txt", "a", "b", "c"))
    batch = Batch(to_table([{"text": "t", "url": url} for url in ("http://a.b/c", "http://x.y/", None)]))
    values = rules.apply(batch).measures[0].values
    assert values[:2].tolist() == [3, 0]
    assert math.isnan(values[2])


def test_without_lists_nothing_is_measured():
    assert UrlRules().apply(Batch(to_table([{"text": "t", "url": "http://a.example/"}]))).measures == []


def test_lists_that_are_not_lists_are_named(write, tmp_path):
    batch = Batch(to_table([{"text": "t", "url": "http://a.example/"}]))
    with pytest.raises(InputError, match=r"d.txt, line 2: 'http://bad.example/' is not a domain"):
        UrlRules(domains=write("d.txt", "ok.example", "http://bad.example/")).apply(batch)
    with pytest.raises(InputError, match=r"u.txt, line 1: '\?page' is not the address"):  # before any task starts
        UrlRules(urls=write("u.txt", "?page")).fingerprint()
    assert UrlRules(urls=write("u.txt", "a.example/page")).fingerprint()
    with pytest.raises(InputError, match=r"u.txt, line 1: '\?other' is not the address"):
        UrlRules(urls=write("u.txt", "?other")).fingerprint()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        UrlRules(domains=[str(tmp_path / "nowhere")]).apply(batch)
    with pytest.raises(ValueError, match="max_soft_words is -1"):
        UrlRules(max_soft_words=-1).validate()


def test_the_fingerprint_follows_what_the_files_hold(write):
    rules = UrlRules(domains=write("d.txt", "a.example"))
    before = rules.fingerprint()
    assert rules.fingerprint() == before
    write("d.txt", "b.example")
    assert rules.fingerprint() != before
    assert UrlRules().fingerprint() == ""


@settings(deadline=None)  # the first call compiles
@given(st.lists(st.text("abcé", max_size=4), max_size=8), st.lists(st.text("abcé", max_size=30), max_size=5))
def test_phrases_are_found_as_by_looking_for_each(phrases, texts):
    automaton = Phrases.of(phrases)
    owners, found = automaton.find(pa.array(texts, pa.large_string()))
    expected = [(i, n) for i, text in enumerate(texts) for n, phrase in enumerate(automaton.phrases) if phrase in text]
    assert list(zip(owners.tolist(), found.tolist(), strict=True)) == expected
    assert set(automaton.phrases) == set(phrases) - {""}
    assert np.all(np.diff(owners) >= 0)
