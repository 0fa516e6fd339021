import json
import random

import pyarrow.parquet as pq
import pytest

from pipelines import storage
from pipelines.curate import curate, final_corpus, stage_manifests
from pipelines.curation import CurationSettings, rules_for
from pipelines.decontaminate import EvaluationSet
from pipelines.filters.gopher import GopherQuality
from pipelines.sources import Source
from pipelines.stage import part_uris

WORDS = [
    "the",
    "river",
    "and",
    "a",
    "house",
    "that",
    "stands",
    "with",
    "old",
    "trees",
    "have",
    "to",
    "be",
    "seen",
    "by",
    "people",
    "who",
    "walk",
    "along",
    "it",
    "in",
    "summer",
    "when",
    "boats",
    "carry",
    "fruit",
    "or",
    "wood",
    "from",
    "one",
    "village",
    "of",
    "the",
    "valley",
    "into",
    "another",
]


def prose(seed: int, words: int = 120) -> str:
    rng = random.Random(seed)
    sentences = [" ".join(rng.choice(WORDS) for _ in range(12)).capitalize() + "." for _ in range(words // 12)]
    return "\n".join(sentences)


def write_lines(path, texts) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def settings(*sources: Source, **changes) -> CurationSettings:
    made = CurationSettings(sources=list(sources), **changes)
    made.language.languages = []
    made.validate()
    return made


def test_each_source_has_its_own_rules_order_and_thresholds(tmp_path):
    base = CurationSettings()
    assert list(rules_for(base, Source(kind="jsonl", path="x"))) == ["language", "gopher_repetition", "gopher_quality"]
    assert "c4" in rules_for(base, Source(kind="warc", path="x"))
    assert list(rules_for(base, Source(kind="code", path="x"))) == ["code"]
    own = Source(
        kind="jsonl",
        path="x",
        rules=["gopher_quality", "language"],
        settings={"gopher_quality.min_words": "7e0"},  # as YAML reads such numbers
    )
    rules = rules_for(base, own)
    assert list(rules) == ["gopher_quality", "language"]
    assert rules["gopher_quality"].min_words == 7
    assert base.gopher_quality.min_words == GopherQuality().min_words
    base.rules = ["gopher_quality"]
    assert list(rules_for(base, Source(kind="jsonl", path="x"))) == ["gopher_quality"]
    assert list(rules_for(base, own)) == ["gopher_quality", "language"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"rules": ["gofer"]}, "rules of the source jsonl: gofer not known; there are "),
        ({"settings": {"gopher_quality.min_wordz": 1}}, "gopher_quality.min_wordz is not a setting of a rule set"),
        ({"settings": {"gopher_quality.min_words": 200_000}}, "min_words is 200000"),
        ({"settings": {"gopher_quality.min_words": "many"}}, "gopher_quality.min_words is 'many', must be of the kind"),
        ({"settings": {"c4.min_words": 1}}, "c4.min_words is of a rule set that the source is not asked by"),
        ({"settings": {"quality.model": "m"}}, "quality.model is about the model, which all sources share"),
    ],
)
def test_a_source_whose_rules_cannot_work_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        settings(Source(kind="jsonl", path="x", **source))


@pytest.mark.usefixtures("ray_session")
def test_the_whole_graph_counts_every_document_and_says_why_each_went(tmp_path):
    good = [prose(seed) for seed in range(6)]
    first = write_lines(tmp_path / "a" / "a.jsonl", [*good, good[0], "too short", good[1] + " one more word here."])
    second = write_lines(tmp_path / "b" / "b.jsonl", ["short too", prose(50, 60)])
    corpus = str(tmp_path / "corpus")
    made = settings(
        Source(kind="jsonl", path=first, name="a"),
        Source(kind="jsonl", path=second, name="b", rules=[]),
    )
    manifests = curate(corpus, made)
    assert list(manifests) == ["extract", "filter", "exact", "near"]
    assert [m["documents_out"] for m in manifests.values()] == [11, 10, 9, 8]
    assert list(manifests["filter"]["set_aside"]) == ["gopher repetition: top 2-gram"]
    assert list(manifests["exact"]["set_aside"]) == ["exact duplicate"]
    assert manifests["near"]["statistics"]["documents"]["sources"]["b"]["documents"] == 2
    few = manifests["filter"]["statistics"]["measures"]["gopher quality: too few words"]["decades"]
    assert sum(few["bins"].values()) == 8
    assert list(few["limits"]) == ["50 inf"]
    folder, manifest = final_corpus(corpus)
    texts = [text for uri in part_uris(folder, manifest) for text in pq.read_table(uri)["text"].to_pylist()]
    assert sorted(texts) == sorted([*good, "short too", prose(50, 60)])
    assert curate(corpus, made) == manifests


@pytest.mark.usefixtures("ray_session")
def test_a_corpus_that_was_started_anew_is_not_taken_for_finished(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [prose(seed) for seed in range(3)])
    corpus = str(tmp_path / "corpus")
    source = Source(kind="jsonl", path=path)
    curate(corpus, settings(source))
    storage.delete(storage.join(corpus, "exact", "manifest.json"))
    with pytest.raises(FileNotFoundError, match="stage exact is unfinished or newer; run `ingot curate` again"):
        final_corpus(corpus)
    without = settings(source)
    without.near.enabled = False
    assert list(curate(corpus, without)) == ["extract", "filter", "exact"]
    assert final_corpus(corpus)[0].endswith("/exact")
    assert list(stage_manifests(corpus)) == ["extract", "filter", "exact"]


@pytest.mark.usefixtures("ray_session")
def test_lines_decontamination_privacy_and_weights_after_deduplication(tmp_path):
    footer = "All rights of this page are held by those who wrote it, and it may be read by everyone."
    question = "A farmer has seventeen sheep and nine cows, sells four of each and buys two more: how many remain?"
    texts = [f"{prose(seed)}\n{footer}" for seed in range(8)]
    texts[3] += "\nWrite to jane.doe@corp.example.org or call +49 30 1234567 for more."
    texts[5] += f"\n{question}"
    path = write_lines(tmp_path / "a.jsonl", texts)
    (tmp_path / "quiz.jsonl").write_text(json.dumps({"question": question}) + "\n")
    corpus = str(tmp_path / "corpus")
    made = settings(Source(kind="jsonl", path=path, name="a", weight=2.0, rules=["language"]))
    made.lines.enabled = True
    made.decontaminate.sets = [EvaluationSet(path=str(tmp_path / "quiz.jsonl"))]
    made.decontaminate.action = "drop"
    made.privacy.enabled = True
    manifests = curate(corpus, made)
    assert list(manifests) == ["extract", "filter", "exact", "lines", "near", "clean", "mix"]
    assert list(manifests["clean"]["set_aside"]) == ["decontaminate: overlap"]
    folder, manifest = final_corpus(corpus)
    rows = [row for uri in part_uris(folder, manifest) for row in pq.read_table(uri).to_pylist()]
    assert len(rows) == len({row["id"] for row in rows}) == 14
    assert sum(footer in row["text"] for row in rows) == 2  # the first document that has it, twice
    assert not any(question in row["text"] for row in rows)
    assert not any("jane.doe" in row["text"] or "1234567" in row["text"] for row in rows)
    assert sum("email@example.com" in row["text"] for row in rows) == 2
    assert not [file.uri for file in storage.list_files(corpus) if "_search" in file.uri]
