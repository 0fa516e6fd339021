import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from duplicates import write_parts

from pipelines.dedup import lines
from pipelines.dedup.lines import LineDedup, find, work


def edited(parts, output, settings, partitions=2):
    """What is left of every document by id, the ids that were set aside, and the counts."""
    find(parts, str(output), settings, partitions)
    texts, gone, counts = {}, {}, {}
    for part in parts:
        for out in work(part, str(output / part.rsplit("/", 1)[1]), settings):
            texts |= dict(zip(out.kept["id"].to_pylist(), out.kept["text"].to_pylist(), strict=True))
            if out.set_aside is not None:
                gone |= {row["id"]: row["reason"] for row in out.set_aside.to_pylist()}
            for name, count in (out.counts or {}).items():
                counts[name] = counts.get(name, 0) + count
    return texts, gone, counts


def spelled_out(texts, settings):
    """The same in plain Python."""
    split = re.compile(r"\n" if settings.unit == "line" else r"\n{2,}").split
    documents = {}
    for p, rows in enumerate(texts):
        for r, text in enumerate(rows):
            for span in set(split(text if settings.unit == "line" else text.strip())):
                if len(span) >= settings.min_characters:
                    documents.setdefault(span, []).append(f"{p}-{r}")
    common = {span: ids[0] for span, ids in documents.items() if len(ids) > settings.max_documents}
    return {
        f"{p}-{r}": [span for span in split(text) if span and common.get(span, f"{p}-{r}") == f"{p}-{r}"]
        for p, rows in enumerate(texts)
        for r, text in enumerate(rows)
    }


@pytest.mark.parametrize(("unit", "most", "partitions"), [("line", 1, 7), ("line", 4, 1), ("paragraph", 2, 2)])
def test_spans_that_too_many_documents_have_stay_in_the_first_only(ray_session, tmp_path, unit, most, partitions):
    rng = np.random.default_rng(1)
    pool = [f"{'x' * (i % 13)} span {i} ünïcode" for i in range(60)]
    gap = "\n" if unit == "line" else "\n\n"
    texts = [[gap.join(pool[i] for i in rng.zipf(1.5, 6) % 60) for _ in range(30)] for _ in range(4)]
    settings = LineDedup(unit=unit, min_characters=20, max_documents=most, enabled=True)
    kept, gone, counts = edited(write_parts(tmp_path / "in", texts), tmp_path / "out", settings, partitions)
    wanted = spelled_out(texts, settings)
    assert {i: text.split(gap) for i, text in kept.items()} == {i: spans for i, spans in wanted.items() if spans}
    assert set(gone) == {i for i, spans in wanted.items() if not spans}
    assert set(gone.values()) <= {f"{unit} duplicates: nothing left"}
    assert counts[f"{unit} duplicates: cut"] > 20


def test_what_is_not_cut_stays_as_it_is(ray_session, tmp_path):
    note = "This notice stands in every document of the site."
    texts = [[f"{note}\nfirst\n", f"one\n\n\n{note}\n\n\ntwo\n", f"\nshort\n{note}\r\n", f"last line\n{note}"]]
    kept, gone, counts = edited(
        write_parts(tmp_path / "in", texts), tmp_path / "out", LineDedup(True, min_characters=10, max_documents=1)
    )
    assert kept == {"0-0": texts[0][0], "0-1": "one\n\n\ntwo\n", "0-2": texts[0][2], "0-3": "last line"}
    assert gone == {}
    assert counts["line duplicates: cut"] == 2
    assert counts["line duplicates: characters"] == 2 * len(note)


def test_a_search_that_was_killed_goes_on_with_its_hashes(ray_session, tmp_path, monkeypatch):
    texts = [["a line that repeats\nmine", "a line that repeats\nyours"]]
    parts = write_parts(tmp_path / "in", texts)
    settings = LineDedup(True, min_characters=10, max_documents=1)
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.dedup.lines.attach", None)
        with pytest.raises(TypeError):
            find(parts, str(tmp_path / "out"), settings, 1)
    (file,) = (tmp_path / "out" / "fingerprints").glob("*")
    pq.write_table(pq.read_table(file).slice(0, 0), file)
    assert find(parts, str(tmp_path / "out"), settings, 1) == 0
    assert find(parts, str(tmp_path / "out"), settings, 1) == 1


def test_hashes_come_in_the_same_chunks_when_made_and_when_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "_SPANS", 100)
    (part,) = write_parts(tmp_path / "in", [["\n".join(f"line {i} of {n}" for i in range(17 * n)) for n in range(70)]])
    settings = LineDedup(True, min_characters=1)
    made, back = (list(lines._spans_of_part(part, str(tmp_path / "hashes"), settings)) for _ in range(2))
    assert len(made) > 3
    assert max(table.num_rows for table in made) > 100
    assert [table.to_pydict() for table in made] == [table.to_pydict() for table in back]


def test_nothing_is_cut_when_switched_off_or_when_there_is_nothing(ray_session, tmp_path):
    parts = write_parts(tmp_path / "in", [["a line that repeats"] * 3])
    assert find(parts, str(tmp_path / "a"), LineDedup()) == 0
    assert find(write_parts(tmp_path / "none", [[], ["short"]]), str(tmp_path / "b"), LineDedup(True)) == 0
    with pytest.raises(ValueError, match="unit is word, must be one of line, paragraph"):
        LineDedup(True, "word").validate()
