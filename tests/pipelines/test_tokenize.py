import shutil

import numpy as np
import pytest

from pipelines import storage
from pipelines.batches import PADDING, Batches
from pipelines.documents import document_id, to_table
from pipelines.shards import TokenShards, shard_name
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
    with pytest.raises(ValueError, match="tokenize.sequence_length is 8, but with packing concatenate"):
        TokenizeSettings(sequence_length=8).validate()
    with pytest.raises(ValueError, match="tokenize.sequence_length is None; packing whole_documents needs"):
        TokenizeSettings(packing="whole_documents").validate()


@pytest.fixture(scope="module")
def packed(workspace):
    root, corpus, manifest = workspace
    settings = TokenizeSettings(
        validation_share=0.2, block=8, shard_tokens=8 * 32 * 2, packing="whole_documents", sequence_length=48
    )
    tokenize(f"{root}/packed", corpus, manifest, f"{root}/tokenizer", settings)
    return f"{root}/packed"


@pytest.mark.parametrize("split", ["train", "validation"])
def test_packed_documents_are_whole_and_all_there(workspace, packed, split):
    tokens, places = expected(*workspace, split)
    shards = TokenShards(f"{packed}/{split}")
    batches = Batches(shards, 48, 4, seed=0)
    eot = shards.manifest["pad_id"] - 1
    samples = np.stack([batches._sample(i) for i in range(batches.n_samples)])
    assert samples.size == shards.n_tokens
    assert (samples == PADDING).sum() == shards.manifest["padding"]
    assert shards.manifest["documents"] == len(places)
    # Where a sequence has padding, it is behind the last document's end.
    for sample in samples:
        filled = sample[sample != PADDING]
        assert (sample[: len(filled)] == filled).all()
        assert len(filled) == len(sample) or filled[-1] == eot
    # Pieces named by the side table, put together, are the documents.
    found: dict[str, list[int]] = {}
    for row in shards.documents(0, shards.n_tokens):
        assert row["start"] // 49 == (row["start"] + row["length"] - 1) // 49
        found.setdefault(row["id"], []).extend(shards.read(row["start"], row["length"]).tolist())
    texts = {p["id"]: tokens[p["start"] : p["start"] + p["length"]].tolist() for p in places}
    assert {i: sorted(ids) for i, ids in found.items()} == {i: sorted(ids) for i, ids in texts.items()}
    short = [p["id"] for p in places if p["length"] <= 49]
    assert short
    assert len(short) < len(places)
    for document in short:
        assert found[document] == texts[document]
    named = {row["id"] for step in range(3) for place in range(4) for row in batches.documents(step, place)}
    assert named <= set(texts)


def test_a_table_is_encoded_as_its_texts_are(workspace):
    from pipelines import tokenize as module
    from pipelines.tokenizer import Tokenizer

    encoder = Tokenizer.load(f"{workspace[0]}/tokenizer")
    for texts in (["", "ore slag", "", "ingot " * 30, "x", ""], ["", ""], [""]):
        rows = [{"id": str(i), "text": text, "source": "books"} for i, text in enumerate(texts)]
        table, sizes = module.encode_table(to_table(rows), encoder, 0.5)
        assert table["tokens"].to_pylist() == [[*encoder.encode(text), encoder.eot_id] for text in texts]
        assert table["length"].to_pylist() == [len(tokens) for tokens in table["tokens"].to_pylist()]
        assert sizes.tolist() == [len(text) for text in texts]


def test_packed_shards_refuse_another_length(packed):
    with pytest.raises(ValueError, match="whole documents were packed into sequences of 48 tokens.* 32 was asked for"):
        Batches(TokenShards(f"{packed}/train"), 32, 4, seed=0)


def test_packing_in_windows_loses_nothing(workspace, monkeypatch):
    from pipelines import tokenize as module

    root, corpus, manifest = workspace
    monkeypatch.setattr(module, "PACKED_TOGETHER", 300)
    monkeypatch.setattr(module, "ENCODED_TOGETHER", 4)
    uri = part_uris(corpus, manifest)[0]
    made = storage.read_json(f"{root}/tokenizer/manifest.json")["fingerprint"]
    outputs = list(module._encode(uri, f"{root}/tokenizer", made, 0.2, 48))
    rows = [row for output in outputs for row in output.kept.to_pylist()]
    plain = [
        row for output in module._encode(uri, f"{root}/tokenizer", made, 0.2, None) for row in output.kept.to_pylist()
    ]
    assert sum(row["length"] for row in rows) == sum(row["length"] for row in plain)
    assert {row["id"] for row in rows} == {row["id"] for row in plain}
    for split, held_out in (("train", False), ("validation", True)):
        size = sum(len(row["tokens"]) for row in rows if row["validation"] == held_out)
        assert size % 49 == 0
        assert size == sum(output.counts.get(f"{split}_tokens", 0) for output in outputs)
    assert sum(output.documents_in for output in outputs) == 30


def test_a_split_with_missing_shards_is_refused_before_it_is_read(packed, tmp_path):
    copy = str(tmp_path / "train")
    shutil.copytree(f"{packed}/train", copy)
    storage.delete(f"{copy}/{shard_name(1)}")
    with pytest.raises(
        ValueError, match=r"1 of the \d+ shards that the manifest lists are not there: shard-00001.parquet"
    ):
        TokenShards(copy)


@pytest.mark.parametrize("damage", ["bit", "cut"])
def test_a_damaged_shard_is_named_with_what_to_do(packed, tmp_path, damage):
    folder = tmp_path / "train"
    shutil.copytree(f"{packed}/train", folder)
    shard = folder / "shard-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 4
    shard.write_bytes(content if damage == "bit" else content[: len(content) // 2])
    shards = TokenShards(str(folder))
    with pytest.raises(ValueError, match=r"shard-00001\.parquet: .*"):
        shards.read(0, shards.n_tokens)
