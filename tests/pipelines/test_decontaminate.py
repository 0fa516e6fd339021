import csv
import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.decontaminate import Decontamination, Decontaminator, EvaluationSet, ngram_table, prepare
from pipelines.documents import SCHEMA, InputError, to_table
from pipelines.filters import Batch
from pipelines.overlap import Table, matches
from pipelines.words import normal, normal_words

QUESTION = "Which of these two trains, leaving at nine and at ten, is the first to arrive in the town?"
SHORT = "What is the boiling point of water at sea level?"  # 10 words


def prose(words, seed=0):
    """Random words, of which no n-gram repeats."""
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(words))


@pytest.fixture
def rules(tmp_path):
    """Rules against a set of some texts."""

    def rules(*items, **values):
        path = tmp_path / "set.jsonl"
        path.write_text("".join(json.dumps({"question": item}) + "\n" for item in items))
        chosen = Decontamination(sets=[EvaluationSet(str(path))], **values)
        chosen.validate()
        table = ngram_table(chosen)
        pq.write_table(table, tmp_path / "ngrams.parquet")
        return Decontaminator(chosen, str(tmp_path / "ngrams.parquet"))

    return rules


def applied(rules, *texts):
    result = rules.apply(Batch(to_table([{"text": text} for text in texts])))
    return result, {measure.reason.partition(": ")[2]: measure.values.tolist() for measure in result.measures}


def test_planted_items_are_found_whatever_their_case_and_punctuation(rules):
    drop = rules(QUESTION, SHORT, action="drop")
    hidden = (
        f"{prose(50)} WHICH of these two trains -- leaving at nine, and\nat ten -- is the first to ARRIVE {prose(9)}"
    )
    texts = [prose(200), hidden, f"So: what is the boiling point of water, at sea level; {prose(3)}", "", SHORT]
    result, values = applied(drop, *texts)
    # 16 words of the question stand in the second: 4 n-grams of 13.
    assert values == {"overlap": [0, 4, 1, 0, 1]}
    assert result.text is None
    assert result.measures[0].maximum == 0
    assert result.measures[0].details[1] == "overlaps set.jsonl, record 1, question"
    assert result.measures[0].details[2] == "overlaps set.jsonl, record 2, question"


def test_less_than_an_ngram_is_no_overlap(rules):
    drop = rules(QUESTION, "one two three four five six seven", action="drop")
    twelve = " ".join(QUESTION.split()[:12])
    parted = f"{twelve} or {' '.join(QUESTION.split()[12:])}"
    assert applied(drop, twelve, parted, "one two three four five six seven")[1] == {"overlap": [0, 0, 0]}


def test_the_stretch_around_an_overlap_is_cut_out(rules):
    cut = rules(SHORT)
    before, after = prose(60, 1), prose(60, 2)  # 479 characters each
    result, values = applied(cut, f"{before} {SHORT} {after}", before)
    text, untouched = result.text.to_pylist()
    first, second = text.split("\n\n")
    assert before.startswith(first)
    assert after.endswith(second)
    # 200 characters to each side, and on to the end of a word.
    assert 200 <= len(before) - len(first) <= 210
    assert 200 <= len(after) - len(second) <= 210
    assert not set(text.split()) - set(f"{before} {after}".split())
    assert untouched == before
    assert values == {
        "cuts": [1, 0],
        "nothing left": [len(first) + len(second), pytest.approx(float("nan"), nan_ok=True)],
    }
    assert result.counts == {"decontaminate: document cut": 1, "decontaminate: cut": 1}


def test_characters_are_counted_not_bytes(rules):
    cut = rules(SHORT, window=20, min_piece=1)
    before, after = "é世" * 30 + " " + "é" * 20, "世" * 19 + " " + "ü" * 40
    text = applied(cut, f"{before} {SHORT} {after}")[0].text[0].as_py()
    assert text == "é世" * 30 + "\n\n" + "ü" * 40


def test_short_pieces_go_and_what_is_all_overlap_is_dropped(rules):
    cut = rules(SHORT)
    short, long = prose(40, 3), prose(100, 4)  # 319 and 799 characters: 119 and 599 are left
    result, values = applied(cut, f"{short} {SHORT} {long}", f"{short} {SHORT}")
    assert len(result.text[0].as_py().split("\n\n")) == 1
    assert long.endswith(result.text[0].as_py())
    assert values["nothing left"][1] == 0
    assert result.measures[1].minimum == 1


def test_cuts_are_counted_and_near_ones_are_one(rules):
    cut = rules(SHORT, max_cuts=2)
    far = f" {prose(80)} {SHORT}" * 3
    near = f" {prose(10)} {SHORT}" * 3
    result, values = applied(cut, far, near)
    assert values["cuts"] == [3, 1]
    assert result.measures[0].maximum == 2


@settings(deadline=None)  # the first call compiles
@given(
    st.lists(st.lists(st.sampled_from("abc"), max_size=12).map(" ".join), max_size=5),
    st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(" ".join), max_size=5),
)
def test_matches_are_those_of_a_plain_search(texts, items):
    items = list(dict.fromkeys(items))
    words = normal_words(pa.array(items, pa.large_string()))
    hashes, _ = normal.ngram_hashes(words, 4)
    found = matches(pa.array(texts, pa.large_string()), Table.of(hashes, [len(item.split()) for item in items]))
    expected = [
        (document, 2 * at, item)
        for document, text in enumerate(texts)
        for item, wanted in enumerate(items)
        for at in range(len(text.split()))
        if text.split()[at : at + len(wanted.split())] == wanted.split()
    ]
    assert sorted(zip(found.documents.tolist(), found.starts.tolist(), found.ngrams.tolist(), strict=True)) == sorted(
        expected
    )
    assert all(e - s == len(items[n]) for s, e, n in zip(found.starts, found.ends, found.ngrams, strict=True))


def test_sets_of_every_kind_are_read(tmp_path):
    rows = [{"question": QUESTION, "choices": [SHORT, "short"], "answer": 1}]
    files = {
        "a.jsonl": json.dumps(rows[0]).encode() + b"\n\n",
        "b.json": json.dumps(rows).encode(),
        "c.jsonl.gz": gzip.compress(json.dumps(rows[0]).encode()),
        "d.txt": f"{QUESTION}\n\n{SHORT}\n".encode(),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "e.parquet")
    for name, delimiter in (("f.csv", ","), ("g.tsv", "\t")):
        with open(tmp_path / name, "w", newline="") as out:
            csv.writer(out, delimiter=delimiter).writerows([["question", "choice"], [QUESTION, SHORT]])
    expected = {*ngram_table(Decontamination(sets=[EvaluationSet(str(tmp_path / "a.jsonl"))]))["hash"].to_pylist()}
    assert len(expected) == (19 - 12) + 1  # n-grams of the question, and the short item
    for name in (*files, "e.parquet", "f.csv", "g.tsv"):
        found = ngram_table(Decontamination(sets=[EvaluationSet(str(tmp_path / name))]))
        assert {*found["hash"].to_pylist()} == expected, name
    everything = ngram_table(Decontamination(sets=[EvaluationSet(str(tmp_path))]))
    assert everything.num_rows == len(expected)
    named = Decontamination(sets=[EvaluationSet(str(tmp_path / "a.jsonl"), ["choices"], "water")])
    assert ngram_table(named)["item"].to_pylist() == ["water, record 1, choices"]


def test_sets_that_are_not_what_they_say_are_named(tmp_path):
    def error(name, data, fields=()):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError) as caught:
            ngram_table(Decontamination(sets=[EvaluationSet(str(tmp_path / name), list(fields))]))
        return str(caught.value)

    assert "x.jsonl: not readable as jsonl" in error("x.jsonl", b"{")
    assert "x.json: not a list of records" in error("x.json", b"3")
    assert "x.csv: not readable as csv" in error("x.csv", b"\xff\xfe")
    assert "x.doc: an evaluation set is" in error("x.doc", b"")
    assert "record 1: no field text; there are a, b" in error("y.jsonl", b'{"a": "x", "b": 1}', ["text"])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ngram_table(Decontamination(sets=[EvaluationSet(str(tmp_path / "nowhere"))]))


def test_ngrams_of_many_documents_are_phrases_and_not_counted(tmp_path, ray_session):
    (tmp_path / "set.jsonl").write_text("".join(json.dumps({"q": text}) + "\n" for text in (QUESTION, SHORT)))
    texts = [f"{SHORT} {SHORT} {prose(5, i)}" for i in range(4)] + [QUESTION] * 2
    for part, some in enumerate((texts[:3], texts[3:], [prose(40, 9)])):  # the last part holds none
        pq.write_table(to_table([{"text": text} for text in some], SCHEMA), tmp_path / f"{part}.parquet")
    parts = [str(tmp_path / f"{part}.parquet") for part in range(3)]
    chosen = Decontamination(sets=[EvaluationSet(str(tmp_path / "set.jsonl"))], max_documents=3, action="drop")
    uri = prepare(chosen, str(tmp_path / "index"), parts)
    rules = Decontaminator(chosen, uri)
    assert applied(rules, *texts)[1] == {"overlap": [0, 0, 0, 0, 7, 7]}
    before = (tmp_path / "index/ngrams.parquet").stat().st_mtime_ns
    assert prepare(chosen, str(tmp_path / "index"), parts) == uri
    assert (tmp_path / "index/ngrams.parquet").stat().st_mtime_ns == before
    chosen.max_documents = 0
    rules = Decontaminator(chosen, prepare(chosen, str(tmp_path / "other"), []))
    assert applied(rules, texts[0])[1] == {"overlap": [2]}


def test_the_fingerprint_follows_what_the_files_hold(tmp_path):
    (tmp_path / "set.txt").write_text(SHORT)
    chosen = Decontamination(sets=[EvaluationSet(str(tmp_path / "set.txt"))])
    before = chosen.fingerprint()
    assert chosen.fingerprint() == before
    (tmp_path / "set.txt").write_text(QUESTION)
    assert chosen.fingerprint() != before


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="min_words is 14, must lie between 1 and ngram 13"):
        Decontamination(min_words=14).validate()
    with pytest.raises(ValueError, match="window is -1"):
        Decontamination(window=-1).validate()
