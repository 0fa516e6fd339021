import numpy as np
import pytest

from pipelines import storage
from pipelines.documents import document_id, to_table
from pipelines.shards import TokenShards
from pipelines.stage import Output, Stage, Unit, part_uris, read_part, run_stage
from pipelines.tokenize import TokenizeSettings, is_validation, tokenize
from pipelines.tokenizer import TokenizerSettings, train

pytestmark = pytest.mark.usefixtures("ray_session")

SETTINGS = TokenizeSettings(validation_share=0.2, block=8, shard_tokens=8 * 32 * 2)


def documents(part: int):
    rng = np.random.default_rng(part)
    words = ["ore", "slag", "ingot", "furnace", "cast", "mould", "alloy"]
    rows = []
    for i in range(30):
        text = " ".join(rng.choice(words, rng.integers(1, 60)))
        rows.append({"id": document_id("books", str(part), i), "text": text, "source": "books", "url": f"u{part}-{i}"})
    yield Output(to_table(rows), None, len(rows), 0)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, ray_session):
    root = str(tmp_path_factory.mktemp("workspace"))
    corpus = f"{root}/corpus/near"
    stage = Stage("near", corpus, {}, {})
    manifest = run_stage(stage, [Unit(f"part-{i:05d}", {"part": i}) for i in range(4)], documents)
    train(f"{root}/tokenizer", corpus, manifest, TokenizerSettings(vocab_size=300, reserved_tokens=0))
    tokenize(f"{root}/tokens", corpus, manifest, f"{root}/tokenizer", SETTINGS)
    return root, corpus, manifest


def expected(root, corpus, manifest, split):
    """The split's tokens and documents, encoded one after another in one process."""
    from pipelines.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(f"{root}/tokenizer")
    tokens, places = [], []
    for uri in part_uris(corpus, manifest):
        for table in read_part(uri):
            for row in table.to_pylist():
                if is_validation(row["id"], SETTINGS.validation_share) == (split == "validation"):
                    ids = [*tokenizer.encode(row["text"]), tokenizer.eot_id]
                    places.append({"id": row["id"], "start": len(tokens), "length": len(ids), "url": row["url"]})
                    tokens += ids
    return np.array(tokens), places


@pytest.mark.parametrize("split", ["train", "validation"])
def test_shards_hold_every_document_once_in_order(workspace, split):
    root, corpus, manifest = workspace
    shards = TokenShards(f"{root}/tokens/{split}")
    tokens, places = expected(root, corpus, manifest, split)
    assert shards.n_tokens == len(tokens)
    np.testing.assert_array_equal(shards.read(0, shards.n_tokens), tokens)
    rng = np.random.default_rng(0)
    for start in rng.integers(0, len(tokens) - 1, 50):
        length = int(rng.integers(1, min(700, len(tokens) - start + 1)))
        np.testing.assert_array_equal(shards.read(int(start), length), tokens[start : start + length])
        found = [row["id"] for row in shards.documents(int(start), length)]
        assert found == [p["id"] for p in places if p["start"] < start + length and p["start"] + p["length"] > start]
    assert shards.manifest["documents"] == len(places)


def test_a_second_run_changes_nothing_and_a_missing_shard_is_named(workspace):
    root, corpus, manifest = workspace
    before = storage.list_files(f"{root}/tokens")
    tokenize(f"{root}/tokens", corpus, manifest, f"{root}/tokenizer", SETTINGS)
    assert storage.list_files(f"{root}/tokens") == before
    with pytest.raises(ValueError, match="tokens .* asked for, but it holds"):
        TokenShards(f"{root}/tokens/train").read(0, 10**9)


def test_settings_that_cannot_work_are_named():
    with pytest.raises(ValueError, match="tokenize.shard_tokens is 100; it has to be a multiple"):
        TokenizeSettings(shard_tokens=100).validate()
    with pytest.raises(ValueError, match=r"tokenize.validation_share is 1.5"):
        TokenizeSettings(validation_share=1.5).validate()
