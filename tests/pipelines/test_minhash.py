import numpy as np
import pyarrow.parquet as pq
import pytest
from datasketch import MinHash

from pipelines import storage
from pipelines.dedup.minhash import MinHashDedup, band_keys, find_duplicates, signatures
from pipelines.documents import to_table

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


def probability(s, bands, rows):
    return 1 - (1 - s**rows) ** bands


def pair_with_jaccard(rng, target, words=120):
    """Two texts of distinct words with one prefix in common, and the exact Jaccard similarity of their 5-grams."""
    grams = words - 4
    common = round(2 * grams * target / (1 + target))
    first = [f"w{i}" for i in rng.integers(0, 1 << 62, words)]
    shared = common + 4
    second = first[:shared] + [f"w{i}" for i in rng.integers(0, 1 << 62, words - shared)]
    return " ".join(first), " ".join(second), common / (2 * grams - common)


def planted(rng, target, pairs):
    made = [pair_with_jaccard(rng, target) for _ in range(pairs)]
    return [m[0] for m in made], [m[1] for m in made], made[0][2]


def write_parts(folder, texts):
    parts = []
    for p, rows in enumerate(texts):
        uri = storage.join(str(folder), f"part-{p:05d}.parquet")
        folder.mkdir(exist_ok=True)
        pq.write_table(to_table({"id": f"{p}-{r}", "text": text} for r, text in enumerate(rows)), uri)
        parts.append(uri)
    return parts


def read_output(output):
    return {
        (int(file.stem.removeprefix("part-")), row["row"]): (row["duplicate_of"], row["similarity"])
        for file in sorted(output.glob("*.parquet"))
        for row in pq.read_table(file).to_pylist()
    }


LEVELS = (1.0, 0.95, 0.9, 0.8, 0.5)
PAIRS = 200


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


def test_recall_and_precision_are_what_the_bands_predict(ray_session, corpus, tmp_path):
    parts, similarities = corpus
    find_duplicates(parts, str(tmp_path / "out"), SETTINGS, partitions=2)
    found = read_output(tmp_path / "out")
    assert all(part == 1 and of == f"0-{row}" for (part, row), (of, _) in found.items())  # no false pair at all
    bands, rows = SETTINGS.bands_and_rows()
    for level, s in enumerate(similarities):
        got = sum(level * PAIRS <= row < (level + 1) * PAIRS for _, row in found)
        p = probability(s, bands, rows)
        assert abs(got - PAIRS * p) <= 4 * np.sqrt(PAIRS * p * (1 - p)) + 1e-9, (s, got / PAIRS, p)
        estimated = [value for (_, row), (_, value) in found.items() if level * PAIRS <= row < (level + 1) * PAIRS]
        if len(estimated) > 50:
            assert np.mean(estimated) == pytest.approx(s, abs=0.03)


def test_the_result_does_not_depend_on_the_number_of_partitions(ray_session, corpus, tmp_path):
    results = []
    for partitions in (None, 1, 5):
        output = tmp_path / str(partitions)
        find_duplicates(corpus[0], str(output), SETTINGS, partitions)
        results.append(read_output(output))
        assert not (output / "fingerprints").exists()
    assert results[0] == results[1] == results[2]
    assert results[0]


def test_pairs_below_the_smallest_similarity_are_not_linked(ray_session, corpus, tmp_path):
    settings = MinHashDedup(verify="signature", min_similarity=0.9)
    find_duplicates(corpus[0], str(tmp_path / "strict"), settings, partitions=2)
    find_duplicates(corpus[0], str(tmp_path / "all"), SETTINGS, partitions=2)
    everything = read_output(tmp_path / "all")
    assert read_output(tmp_path / "strict") == {k: v for k, v in everything.items() if v[1] >= 0.9}


def test_a_chain_of_near_duplicates_keeps_its_first_document(ray_session, tmp_path):
    rng = np.random.default_rng(5)
    words = [f"w{i}" for i in rng.integers(0, 1 << 62, 300)]
    texts = []
    for _ in range(8):  # each differs from the next a little, the first from the last a lot
        texts.append(" ".join(words))
        words = words[12:] + [f"w{i}" for i in rng.integers(0, 1 << 62, 12)]
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
    ("name", "value"), [("jaccard", 1.5), ("permutations", 1), ("shingle", 0), ("min_similarity", 2)]
)
def test_values_out_of_range_are_refused_by_name(name, value):
    SETTINGS.validate()
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        MinHashDedup(**{name: value}).validate()


def test_too_few_permutations_for_the_similarity_are_refused_before_the_search():
    with pytest.raises(ValueError, match=r"permutations is 16, must be more for a jaccard of 0.99"):
        MinHashDedup(jaccard=0.99, permutations=16).validate()
