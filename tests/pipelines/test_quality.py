import json
import random
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from scipy.optimize import check_grad
from scipy.special import expit

from pipelines import storage
from pipelines.documents import to_table
from pipelines.filters import Batch, judge, linear
from pipelines.filters.quality import QualityClassifier, prepare
from pipelines.sources import Source
from pipelines.words import normal_words

GOOD = ["theorem", "proof", "lemma", "integral", "measure", "theory", "set", "function", "space", "limit"]
BAD = ["buy", "cheap", "click", "here", "now", "offer", "sale", "free", "bonus", "casino"]
BOTH = ["the", "a", "of", "and", "to", "in", "is", "that", "it", "for", "with", "as", "on", "be", "by", "this"]


def column(texts):
    return pa.array(texts, pa.large_string())


def sentences(vocabulary, n, seed, words=60):
    draw = random.Random(seed)
    return [" ".join(draw.choice(vocabulary + BOTH * 2) for _ in range(words)) for _ in range(n)]


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [Source("jsonl", str(path), name=path.stem)]


def settings(tmp_path, good, bad, **more):
    return QualityClassifier(jsonl(tmp_path / "good.jsonl", good), jsonl(tmp_path / "bad.jsonl", bad), **more)


# the model


def dense(x, bits):
    out = np.zeros((len(x.offsets) - 1, 2**bits))
    for d in range(len(out)):
        part = slice(x.offsets[d], x.offsets[d + 1])
        out[d, x.places[part]] = x.values[part]
    return out


def test_vectors_hold_the_logarithms_of_counts_scaled_to_length_one():
    x = linear.features(column(["a b a", "", "A, b! a?", "b", "a"]), 1, 18)
    rows = dense(x, 18)
    a, b = rows[4].argmax(), rows[3].argmax()
    norm = np.hypot(np.log(3), np.log(2))
    assert rows[0][[a, b]] == pytest.approx([np.log(3) / norm, np.log(2) / norm])
    assert np.count_nonzero(rows[0]) == 2
    assert not rows[1].any()
    assert np.array_equal(rows[0], rows[2])  # case and punctuation are no words


def test_longer_ngrams_are_those_of_neighbours_in_their_order_within_a_document():
    texts = ["one two three four", "two one", "one two", "two three four", "four five"]
    x = linear.features(column(texts), 3, 24)
    sets = [set(x.places[x.offsets[d] : x.offsets[d + 1]].tolist()) for d in range(len(texts))]
    assert [len(s) for s in sets] == [4 + 3 + 2, 3, 3, 3 + 2 + 1, 3]
    assert sets[2] < sets[0]
    assert sets[3] < sets[0]
    assert len(sets[1] & sets[2]) == 2  # the words, not the pair
    assert len(sets[0] & sets[4]) == 1
    alone = linear.features(column(texts[3:4]), 3, 24)
    assert set(alone.places.tolist()) == sets[3]


def test_the_gradient_is_that_of_the_loss():
    texts = sentences(GOOD, 10, 1) + sentences(BAD, 20, 2)
    x = linear.features(column(texts), 2, 10)
    y = np.arange(30) < 10
    at = np.random.default_rng(0).normal(size=2**10 + 1)

    def part(which):
        return lambda p: linear.loss_and_gradient(p, x, y, 0.1)[which]

    assert check_grad(part(0), part(1), at) < 1e-4


def test_the_fitted_weights_are_those_of_dense_logistic_regression():
    texts = sentences(GOOD, 30, 1) + sentences(BAD, 50, 2)
    x = linear.features(column(texts), 2, 10)
    y = np.arange(80) < 30
    weights, intercept = linear.fit(x, y, 10, 1e-2)
    # Newton's method on the dense problem, both classes weighing the same
    design = np.hstack([dense(x, 10), np.ones((80, 1))])
    share = np.where(y, 0.5 / 30, 0.5 / 50)
    penalty = np.r_[np.full(2**10, 1e-2), 0]
    w = np.zeros(2**10 + 1)
    for _ in range(30):
        p = expit(design @ w)
        hessian = design.T @ (design * (share * p * (1 - p))[:, None]) + np.diag(penalty)
        w -= np.linalg.solve(hessian + 1e-12 * np.eye(len(w)), design.T @ (share * (p - y)) + penalty * w)
    assert np.abs(linear.sigmoid(linear.logits(x, weights, intercept)) - expit(design @ w)).max() < 2e-3


def test_area_under_the_curve_counts_pairs_with_ties_as_half():
    rng = np.random.default_rng(0)
    scores, y = rng.integers(0, 8, 60) / 8, rng.random(60) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a in scores[y] for b in scores[~y]]
    assert linear.area_under_curve(scores, y) == pytest.approx(np.mean(pairs))


def test_parts_are_joined_and_selected_document_by_document():
    texts = sentences(GOOD, 7, 3, words=5)
    whole = linear.features(column(texts), 2, 12)
    joined = linear.concatenate([linear.features(column(t), 2, 12) for t in (texts[:3], [], texts[3:])])
    assert all(np.array_equal(a, b) for a, b in zip(whole, joined, strict=True))
    mask = np.array([True, False, True, True, False, False, True])
    kept = linear.features(column([t for t, m in zip(texts, mask, strict=True) if m]), 2, 12)
    assert all(np.array_equal(a, b) for a, b in zip(linear.select(whole, mask), kept, strict=True))


# training from sources


@pytest.mark.usefixtures("ray_session")
def test_separable_sets_are_told_apart_and_trained_on_once(tmp_path):
    rules = settings(tmp_path, sentences(GOOD, 300, 1), sentences(BAD, 400, 2), store_score=True)
    folder = str(tmp_path / "model")
    ready = prepare(rules, folder)
    fingerprint = ready.fingerprint()
    manifest = storage.read_json(f"{folder}/manifest.json")
    assert manifest["auc"] > 0.999
    assert manifest["accuracy"] > 0.99
    counts = manifest["documents"]
    assert counts["good"]["train"] + counts["good"]["held_out"] == 300
    assert counts["bad"]["train"] + counts["bad"]["held_out"] == 400
    assert 10 < counts["good"]["held_out"] < 60
    assert manifest["kept_at_threshold"]["0.5"]["good"] > 0.9 > 0.1 > manifest["kept_at_threshold"]["0.5"]["bad"]

    rows = [{"id": "g", "text": sentences(GOOD, 1, 9)[0]}, {"id": "b", "text": sentences(BAD, 1, 9)[0]}, {"text": "…"}]
    rows[0]["metadata"] = {"rank": 3}
    applied = ready.apply(Batch(to_table(rows)))
    assert applied.measures[0].reason == "quality: score"
    assert judge(applied.measures, 3)[0].tolist()[:2] == [-1, 0]
    stored = [json.loads(text) for text in applied.columns["metadata"].to_pylist()]
    assert stored[0] == {"rank": 3, "quality": pytest.approx(applied.measures[0].values[0], abs=1e-4)}

    before = storage.read_bytes(f"{folder}/model.npz")
    written = storage.list_files(folder)
    again = prepare(replace(rules, threshold=0.9), folder)  # does not change the model
    assert (again.fingerprint(), again.threshold) == (fingerprint, 0.9)
    assert storage.list_files(folder) == written
    assert prepare(QualityClassifier(model=folder), "unused").fingerprint() == fingerprint
    assert prepare(replace(rules, ngrams=1), folder).fingerprint() != fingerprint
    assert prepare(rules, folder).fingerprint() == fingerprint
    assert storage.read_bytes(f"{folder}/model.npz") == before  # the same documents, the same model, byte for byte


@pytest.mark.usefixtures("ray_session")
def test_sets_that_do_not_differ_are_told_apart_by_chance(tmp_path):
    texts = sentences(GOOD + BAD, 2000, 5, words=20)
    prepare(settings(tmp_path, texts[:1000], texts[1000:]), str(tmp_path / "model"))
    assert 0.4 < storage.read_json(str(tmp_path / "model/manifest.json"))["auc"] < 0.6


@pytest.mark.usefixtures("ray_session")
def test_too_few_documents_are_refused_with_their_path(tmp_path):
    few = settings(tmp_path, sentences(GOOD, 99, 1), sentences(BAD, 300, 2))
    with pytest.raises(ValueError, match=r"quality\.good: .*good\.jsonl has 99 documents, at least 100"):
        prepare(few, str(tmp_path / "model"))
    assert not storage.exists(str(tmp_path / "model/manifest.json"))
    same = settings(tmp_path, ["all the same"] * 200, sentences(BAD, 300, 2))
    with pytest.raises(ValueError, match="too few different documents"):
        prepare(same, str(tmp_path / "model"))


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        prepare(QualityClassifier(model="/nowhere"), "unused")
    with pytest.raises(FileNotFoundError, match="no quality model"):
        QualityClassifier().apply(Batch(to_table([{"id": "1", "text": "x"}])))


@pytest.mark.usefixtures("ray_session")
def test_pages_are_examples_and_files_give_an_even_share(tmp_path):
    from jobs.demo_corpus import warc_member

    (tmp_path / "bad").mkdir()
    for k in range(3):
        jsonl(tmp_path / "bad" / f"{k}.jsonl", sentences(BAD, 10 if k == 1 else 300, k))
    pages = [f"<html><body><p>{text}</p></body></html>".encode() for text in sentences(GOOD, 150, 1)]
    warc = tmp_path / "good.warc"
    warc.write_bytes(b"".join(warc_member("response", f"http://x/{i}", page) for i, page in enumerate(pages)))
    rules = QualityClassifier([Source("warc", str(warc))], [Source("jsonl", str(tmp_path / "bad"))], documents=210)
    prepare(rules, str(tmp_path / "model"))
    counts = storage.read_json(str(tmp_path / "model/manifest.json"))["documents"]
    assert sum(counts["good"].values()) == 150
    assert sum(counts["bad"].values()) == 70 + 10 + 130  # what a small file lacks comes from those after it


# the Pareto rule


class Scores(QualityClassifier):
    def score(self, texts):
        return np.array([float(text) for text in texts.to_pylist()])


def test_the_pareto_rule_keeps_the_share_that_its_distribution_says_and_always_the_same():
    alpha = 9.0
    for score in (0.2, 0.6, 0.9, 1.0):
        table = to_table([{"id": f"{i:x}", "text": str(score)} for i in range(4000)])
        measures = Scores(model="m", pareto=alpha).apply(Batch(table)).measures
        kept = judge(measures, 4000)[0] < 0
        expected = (1 + (1 - score)) ** -alpha  # P(numpy's pareto(alpha) > 1 - score)
        assert kept.mean() == pytest.approx(expected, abs=0.025)
        alone = Scores(model="m", pareto=alpha).apply(Batch(table.slice(7, 5))).measures
        assert np.array_equal(judge(alone, 5)[0] < 0, kept[7:12])
        other = Scores(model="m", pareto=alpha, seed=1).apply(Batch(table)).measures
        assert score == 1.0 or not np.array_equal(judge(other, 4000)[0] < 0, kept)


def test_settings_that_cannot_work_are_refused_by_name():
    QualityClassifier().validate()
    assert not QualityClassifier().enabled
    sources = [Source("jsonl", "x")]
    assert QualityClassifier(good=sources, bad=sources).enabled
    for bad, message in (
        ({"good": sources}, "good is given, so bad"),
        ({"good": sources, "bad": sources, "model": "m"}, "model is given"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"pareto": -1.0}, "pareto is -1.0"),
        ({"documents": 5}, "documents is 5"),
        ({"ngrams": 0}, "ngrams is 0"),
        ({"bits": 40}, "bits is 40"),
        ({"regularization": 0.0}, "regularization is 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            QualityClassifier(**bad).validate()


def test_words_are_those_of_the_other_rules():
    texts = ["Don't panic, 42 times!", "日本 語"]
    x = linear.features(column(texts), 1, 24)
    assert np.diff(x.offsets).tolist() == [len(set(normal_words(column([t])).hashes.tolist())) for t in texts]
