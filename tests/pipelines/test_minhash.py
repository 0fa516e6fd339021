import numpy as np
import pytest
from datasketch import MinHash
from duplicates import (
    chain_of_edits,
    clusters_of,
    pair_with_jaccard,
    planted,
    probability,
    read_output,
    shuffled,
    write_parts,
)

import pipelines.dedup
from pipelines.dedup.minhash import MinHashDedup, band_keys, find_duplicates, signatures

SETTINGS = MinHashDedup()


def datasketch_signature(values, permutations, seed):
    sketch = MinHash(num_perm=permutations, seed=seed, hashfunc=lambda value: value)
    for value in values.tolist():
        sketch.update(value)
    return sketch.hashvalues


@pytest.mark.parametrize(("permutations", "seed"), [(112, 1), (16, 42)])
def test_signatures_equal_datasketch_bit_for_bit(permutations, seed):
    rng = np.random.default_rng(0)
    sizes = [0, 1, 3, 200, 0, 40_000, 7, 90]  # one document is longer than a block of work
    shingles = [rng.integers(0, 1 << 32, n, dtype=np.uint32) for n in sizes]
    offsets = np.concatenate(([0], np.cumsum(sizes)))
    found = signatures(np.concatenate(shingles), offsets, permutations, seed)
    assert found.dtype == np.uint32
    for row, values in zip(found, shingles, strict=True):
        if len(values) < 1000:
            assert (row == datasketch_signature(values, permutations, seed)).all()
    whole = MinHash(num_perm=permutations, seed=seed, hashfunc=lambda value: value)
    whole.update_batch(shingles[5].tolist())
    assert (found[5] == whole.hashvalues).all()


def test_signatures_of_no_documents():
    assert signatures(np.empty(0, np.uint32), np.zeros(1, np.int64), 16, 1).shape == (0, 16)


def test_band_keys_are_equal_exactly_when_a_band_is():
    a = np.arange(12, dtype=np.uint32)[None]
    b = a.copy()
    b[0, 5] = 99
    equal = band_keys(a, 4, 3) == band_keys(b, 4, 3)
    assert equal.tolist() == [[True, False, True, True]]
    assert len(np.unique(band_keys(np.zeros((1, 12), np.uint32), 4, 3))) == 4


def test_bands_and_rows_fit_the_permutations_and_rise_at_the_wanted_similarity():
    bands, rows = SETTINGS.bands_and_rows()
    assert bands * rows <= SETTINGS.permutations
    assert probability(0.5, bands, rows) < 0.05
    assert probability(0.85, bands, rows) > 0.9


LEVELS = (1.0, 0.95, 0.9, 0.8, 0.5)
PAIRS = 150


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """One part of originals and one of their copies, PAIRS for each level of similarity, and unrelated documents."""
    rng = np.random.default_rng(11)
    made = [planted(rng, level, PAIRS) for level in LEVELS]
    unrelated = [pair_with_jaccard(rng, 0.0)[0] for _ in range(300)]
    originals = [text for m in made for text in m[0]]
    copies = [text for m in made for text in m[1]]
    folder = tmp_path_factory.mktemp("minhash")
    return write_parts(folder / "in", [originals, copies, unrelated]), [m[2] for m in made]


@pytest.fixture(scope="module")
def found(ray_session, corpus, tmp_path_factory):
    """What a search without verification finds in it."""
    output = tmp_path_factory.mktemp("found")
    find_duplicates(corpus[0], str(output), SETTINGS, partitions=2)
    assert not (output / "fingerprints").exists()
    return read_output(output)


def test_recall_and_precision_are_what_the_bands_predict(corpus, found):
    assert all(part == 1 and of == f"0-{row}" for (part, row), (of, _) in found.items())  # no false pair at all
    bands, rows = SETTINGS.bands_and_rows()
    for level, s in enumerate(corpus[1]):
        got = sum(level * PAIRS <= row < (level + 1) * PAIRS for _, row in found)
        p = probability(s, bands, rows)
        assert abs(got - PAIRS * p) <= 4 * np.sqrt(PAIRS * p * (1 - p)) + 1e-9, (s, got / PAIRS, p)
        estimated = [value for (_, row), (_, value) in found.items() if level * PAIRS <= row < (level + 1) * PAIRS]
        if len(estimated) > 50:
            assert np.mean(estimated) == pytest.approx(s, abs=0.03)


def test_pairs_whose_signatures_agree_too_little_are_not_linked(ray_session, corpus, found, tmp_path):
    settings = MinHashDedup(verify="signature", min_similarity=0.9)
    find_duplicates(corpus[0], str(tmp_path), settings, partitions=7)
    assert read_output(tmp_path) == {k: v for k, v in found.items() if v[1] >= 0.9}


def test_a_chain_of_near_duplicates_keeps_its_first_document(ray_session, tmp_path):
    texts = chain_of_edits(np.random.default_rng(5), 8)
    parts = write_parts(tmp_path / "in", [texts[4:], texts[:4], ["", "...", "x", "x"]])
    dropped = find_duplicates(parts, str(tmp_path / "out"), MinHashDedup(jaccard=0.6), partitions=3)
    found = read_output(tmp_path / "out")
    assert {k: v[0] for k, v in found.items() if k[0] < 2} == dict.fromkeys(
        [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)], "0-0"
    )
    assert found[2, 3] == ("2-2", 1.0)  # documents without words are never duplicates
    assert dropped == len(found) == 8


def test_a_corpus_without_words_has_no_near_duplicates(ray_session, tmp_path):
    parts = write_parts(tmp_path / "in", [[], ["", " . "]])
    assert find_duplicates(parts, str(tmp_path / "out"), SETTINGS) == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("jaccard", 1.5), ("permutations", 1), ("shingle", 0), ("min_similarity", 2), ("bands", 4), ("verify", "all")],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    SETTINGS.validate()
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        MinHashDedup(**{name: value}).validate()


def test_too_few_permutations_for_the_similarity_are_refused_before_the_search():
    with pytest.raises(ValueError, match=r"permutations is 16, must be more for a jaccard of 0.99"):
        MinHashDedup(jaccard=0.99, permutations=16).validate()


def test_verified_pairs_have_the_true_similarity(ray_session, corpus, tmp_path):
    settings = MinHashDedup(verify="jaccard", min_similarity=0.9, bands=20, rows=4)
    find_duplicates(corpus[0], str(tmp_path / "out"), settings, partitions=3)
    found = read_output(tmp_path / "out")
    wanted = [level for level, s in enumerate(corpus[1]) if s >= 0.9]
    assert set(found) == {(1, row) for level in wanted for row in range(level * PAIRS, (level + 1) * PAIRS)}
    assert all(of == f"0-{row}" for (_, row), (of, _) in found.items())


def test_clusters_do_not_depend_on_the_order_of_the_corpus_or_on_how_it_is_cut(ray_session, tmp_path):
    rng = np.random.default_rng(8)
    texts = [text for _ in range(6) for text in chain_of_edits(rng, 7, step=25)]
    for s in (0.95, 0.8):
        ones, others, _ = planted(rng, s, 20)
        texts += ones + others
    results = {}
    for settings in (MinHashDedup(), MinHashDedup(verify="jaccard", min_similarity=0.8)):
        for partitions, parts in ((1, 1), (2, 3), (7, 4)) if settings.verify == "none" else ((1, 2), (7, 3)):
            made = shuffled(rng, texts, parts)
            folder = tmp_path / f"{settings.verify}-{partitions}"
            find_duplicates(write_parts(folder / "in", made), str(folder / "out"), settings, partitions)
            ids = {(p, r): text for p, rows in enumerate(made) for r, text in enumerate(rows)}
            by_id = {f"{p}-{r}": text for (p, r), text in ids.items()}
            found = {k: (by_id[v[0]], v[1]) for k, v in read_output(folder / "out").items()}
            results.setdefault(settings.verify, []).append(clusters_of(found, ids))
    for name, (one, *rest) in results.items():
        assert all(other == one for other in rest), name
    assert max(map(len, results["none"])) > 3
    assert results["none"] != results["jaccard"]


def test_large_groups_and_components_give_the_same_result_as_small_ones(ray_session, tmp_path, monkeypatch):
    rng = np.random.default_rng(9)
    texts = [pair_with_jaccard(rng, 0.97)[0]] * 30 + chain_of_edits(rng, 20)
    texts += [text for _ in range(30) for text in pair_with_jaccard(rng, 0.97)[:2]]
    parts = write_parts(tmp_path / "in", shuffled(rng, texts, 4))
    settings = MinHashDedup(verify="signature", keep="longest")
    find_duplicates(parts, str(tmp_path / "a"), settings, 1)
    expected = read_output(tmp_path / "a")
    monkeypatch.setattr(pipelines.dedup, "PIECES", 1)  # Ray Data's hash shuffle from here on
    monkeypatch.setattr(pipelines.dedup, "PARTITION_BYTES", 20_000)
    monkeypatch.setattr(pipelines.dedup.rows, "PARTITION_BYTES", 20_000)
    find_duplicates(parts, str(tmp_path / "b"), settings, 2, limit=8)
    assert read_output(tmp_path / "b") == expected
    assert len(expected) > 60


def test_the_longest_of_a_cluster_stays(ray_session, tmp_path):
    texts = chain_of_edits(np.random.default_rng(6), 6)
    texts[3] += " and some more words"
    parts = write_parts(tmp_path / "in", [texts[:2], texts[2:]])
    find_duplicates(parts, str(tmp_path / "out"), MinHashDedup(jaccard=0.6, keep="longest"), 2)
    found = {k: v[0] for k, v in read_output(tmp_path / "out").items()}
    assert found == dict.fromkeys([(0, 0), (0, 1), (1, 0), (1, 2), (1, 3)], "1-1")
