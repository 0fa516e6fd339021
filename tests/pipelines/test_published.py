import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from duplicates import chain_of_edits, pair_with_jaccard, read_output, write_parts

from pipelines.dedup import exact, minhash, published
from pipelines.dedup.exact import ExactDedup
from pipelines.dedup.minhash import MinHashDedup
from pipelines.documents import InputError, to_table

MODULES = {"exact": (exact, ExactDedup), "near": (minhash, MinHashDedup)}


def search(kind, parts, output, publish=None, partitions=1, **settings):
    module, make = MODULES[kind]
    module.find_duplicates(parts, str(output), make(**settings), partitions, publish=publish and str(publish))
    return read_output(output)


def crawls(rng):
    """An old and a new crawl: chains of edits that run through both, exact copies, and unrelated documents."""
    chains = [chain_of_edits(rng, 6) for _ in range(8)]
    old = [c[i] for c in chains for i in (0, 3, 1)] + [pair_with_jaccard(rng, 0.5)[0] for _ in range(5)]
    new = [c[i] for c in chains for i in (2, 5)] + [old[-1]] + [pair_with_jaccard(rng, 0.5)[0] for _ in range(5)]
    return old, new


@pytest.mark.parametrize(("kind", "keep"), [("exact", "first"), ("exact", "longest"), ("near", "longest")])
def test_a_new_crawl_loses_what_it_would_lose_together_with_the_published_one(ray_session, tmp_path, kind, keep):
    old, new = crawls(np.random.default_rng(2))
    settings = {"jaccard": 0.7} if kind == "near" else {}
    olds = write_parts(tmp_path / "old", [old[:10], old[10:]], prefix="old-")
    news = write_parts(tmp_path / "new", [new[:9], new[9:]], prefix="new-")
    kept_first = search(kind, olds, tmp_path / "a", tmp_path / "corpus" / kind / "fingerprints", **settings)
    found = search(
        kind, news, tmp_path / "b", tmp_path / "set2", against=[str(tmp_path / "corpus")], keep=keep, **settings
    )
    both = search(
        kind, write_parts(tmp_path / "all", [old[:10], old[10:], new[:9], new[9:]]), tmp_path / "c", **settings
    )
    assert set(found) == {(part - 2, row) for part, row in both if part >= 2}
    assert len(found) == (17 if kind == "near" else 1)
    dropped = {f"old-{part}-{row}" for part, row in kept_first}
    assert all(of.startswith("old-") and of not in dropped for of, _ in found.values())
    # a third crawl is compared with both sets, and finds what was dropped from the second by its likeness to the first
    third = write_parts(tmp_path / "third", [[new[0], new[-1], "nothing like it"]], prefix="third-")
    sets = [str(tmp_path / "corpus" / kind / "fingerprints"), str(tmp_path / "set2")]
    found = search(kind, third, tmp_path / "d", against=sets, **settings)
    assert {k: v[0] for k, v in found.items()} == (
        {(0, 0): "old-0-0", (0, 1): "new-1-12"} if kind == "near" else {(0, 0): "new-0-0", (0, 1): "new-1-12"}
    )


def test_verified_pairs_with_published_documents_are_compared_by_signature(ray_session, tmp_path):
    rng = np.random.default_rng(7)
    pairs = [pair_with_jaccard(rng, s) for s in (0.95, 0.5)]
    settings = {"verify": "jaccard", "min_similarity": 0.85, "bands": 40, "rows": 2}
    search("near", write_parts(tmp_path / "old", [[p[0] for p in pairs]]), tmp_path / "a", tmp_path / "set", **settings)
    news = write_parts(tmp_path / "new", [[p[1] for p in pairs] * 2])
    found = search("near", news, tmp_path / "b", against=[str(tmp_path / "set")], **settings)
    assert {k: v[0] for k, v in found.items()} == {(0, 0): "0-0", (0, 2): "0-0", (0, 3): "0-1"}


def test_sets_that_cannot_be_compared_are_refused(ray_session, tmp_path):
    parts = write_parts(tmp_path / "in", [["some words of a text that is long enough"]])
    search("near", parts, tmp_path / "a", tmp_path / "set", partitions=1)
    against = [str(tmp_path / "set")]
    for name, value, message in (
        ("seed", 2, "seed 1, this search has 2"),
        ("shingle", 3, "shingle 5, this search has 3"),
    ):
        with pytest.raises(ValueError, match=message):
            search("near", parts, tmp_path / "b", against=against, **{name: value})
    with pytest.raises(ValueError, match="values 110, this search has 40"):
        search("near", parts, tmp_path / "b", against=against, bands=10, rows=4)
    with pytest.raises(ValueError, match="holds near fingerprints, the exact search needs its own"):
        search("exact", parts, tmp_path / "b", against=against)
    with pytest.raises(ValueError, match="is neither a folder with a published"):
        search("near", parts, tmp_path / "b", against=[str(tmp_path / "in")])
    with pytest.raises(ValueError, match="is where this corpus publishes its own"):
        search("near", parts, tmp_path / "b", tmp_path / "set", partitions=1, against=against)


def test_a_corpus_is_not_compared_with_its_own_set(tmp_path):
    own = tmp_path / "corpus" / "near" / "fingerprints"
    own.mkdir(parents=True)
    (own / "set.json").write_text('{"kind": "near"}')
    for entry in (own, own.parent, own.parent.parent):
        with pytest.raises(InputError, match="is where this corpus publishes its own fingerprints"):
            published.refuse_own([str(entry)], "near", str(own))
    published.refuse_own([str(own)], "near", str(tmp_path / "other" / "near" / "fingerprints"))


@pytest.mark.parametrize("documents", [1, 512, 1300])
def test_fingerprints_come_in_the_same_batches_when_made_and_when_read_back(tmp_path, documents):
    part = str(tmp_path / "part.parquet")
    pq.write_table(to_table({"id": str(i), "text": "a" * i} for i in range(documents)), part, row_group_size=700)

    def make(table):
        return np.arange(table.num_rows)[:, None]

    scheme = published.Scheme("exact", {}, 8)
    made, back = (
        [
            (ranks.tolist(), values.to_pylist())
            for ranks, values in published.fingerprints(part, str(tmp_path / "made"), scheme, ("longest", None), make)
        ]
        for _ in range(2)
    )
    assert made == back
    assert [len(ranks) for ranks, _ in made] == ([documents] if documents <= 512 else [512, 188, 512, 88])


def test_the_content_of_a_set_says_when_it_changed(ray_session, tmp_path):
    parts = write_parts(tmp_path / "in", [["one"], ["two"]])
    contents = []
    for texts in (["one", "two"], ["one", "two"], ["one", "other"]):
        parts = write_parts(tmp_path / "in", [[text] for text in texts])
        search("exact", parts, tmp_path / "out", tmp_path / "set", partitions=1)
        contents.append(published.set_contents([str(tmp_path / "set")], "exact"))
    assert contents[0] == contents[1] != contents[2]


@pytest.mark.parametrize("kind", ["exact", "near"])
def test_a_search_that_was_killed_goes_on_with_the_fingerprints_it_made(ray_session, tmp_path, kind, monkeypatch):
    _, texts = crawls(np.random.default_rng(3))
    parts = write_parts(tmp_path / "in", [texts[:9], texts[9:]])
    expected = search(kind, parts, tmp_path / "whole")
    with monkeypatch.context() as patch:  # killed before anything is written
        patch.setattr(MODULES[kind][0], "write_duplicates", None)
        with pytest.raises(TypeError):
            search(kind, parts, tmp_path / "out")
    files = sorted((tmp_path / "out" / "fingerprints").glob("part-*"))
    assert len(files) == 2
    for file in files:  # a mark that only a search which reads these files can carry on
        table = pq.read_table(file)
        ids = pa.array([f"made before {i}" for i in table["id"].to_pylist()])
        pq.write_table(table.set_column(0, table.schema.field(0), ids), file)
    found = search(kind, parts, tmp_path / "out")
    assert found == {where: (f"made before {of}", s) for where, (of, s) in expected.items()}
    assert not (tmp_path / "out" / "fingerprints").exists()
    with monkeypatch.context() as patch:
        patch.setattr(MODULES[kind][0], "write_duplicates", None)
        with pytest.raises(TypeError):
            search(kind, parts, tmp_path / "out")
    other = write_parts(tmp_path / "in", [texts[:9], ["no duplicate"]])  # other documents in a file of the same name
    assert search(kind, other, tmp_path / "out") == {k: v for k, v in expected.items() if k[0] == 0}


def test_the_report_tells_clusters_by_size_and_shows_the_largest(ray_session, tmp_path):
    texts = [["a" * 400] * 4 + ["b", "c"], ["b", "a" * 400, "c", "d"] + ["c"] * 7]
    search("exact", write_parts(tmp_path / "in", texts), tmp_path / "out", partitions=2)
    found = json.loads((tmp_path / "out" / "clusters.json").read_text())
    assert {k: found[k] for k in ("clusters", "documents", "sizes")} == {
        "clusters": 3,
        "documents": 16,
        "sizes": {"2": 1, "5": 1, "9": 1},
    }
    assert [(c["size"], c["kept"]) for c in found["largest"]] == [(9, "0-5"), (5, "0-0"), (2, "0-4")]
    members = found["largest"][1]["members"]
    assert [m["id"] for m in members] == ["0-0", "0-1", "0-2", "0-3", "1-1"]
    assert members[0]["text"] == "a" * 300
