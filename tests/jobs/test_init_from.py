"""A model's tokenizer in a workspace, and the models that pretraining may go on from."""

import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from test_trained import TEXT, byte_level, make_model, sentence_piece

from jobs import init_from, tokenizer
from jobs.cli import main
from jobs.settings import LadderJob, ModelSettings, PretrainJob, SettingsError, TokenizerJob, TuneJob, checked
from models.mesh import Parallelism
from pipelines import storage
from pipelines.documents import InputError
from pipelines.tokenizer import Tokenizer, TokenizerSettings, train_on_texts

ROLES = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}


@pytest.fixture
def theirs(tmp_path):
    """A model's folder."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    size = byte_level(folder, **ROLES, chat_template="{{ messages }}")
    make_model(folder, "Qwen3", vocab_size=size + 3, head_dim=32)
    return folder


def take(workspace, source):
    tokenizer.run(TokenizerJob(workspace=str(workspace), from_model=str(source)))
    return Tokenizer.load(f"{workspace}/tokenizer")


def test_a_models_tokenizer_becomes_the_workspaces(tmp_path, theirs, capsys):
    taken = take(tmp_path, theirs)
    reference = transformers.AutoTokenizer.from_pretrained(str(theirs), split_special_tokens=True)
    assert taken.encode(TEXT) == reference.encode(TEXT, add_special_tokens=False)
    assert (taken.eot_id, taken.bos_id) == (reference.eos_token_id, reference.bos_token_id)
    # of batches' fillers none may look like the end of a document
    assert taken.pad_id not in (taken.eot_id, taken.bos_id, *taken.encode(TEXT))
    manifest = storage.read_json(f"{tmp_path}/tokenizer/manifest.json")
    assert manifest["vocab_size"] == taken.vocab_size == len(reference)
    assert "chat_template" not in storage.read_json(f"{tmp_path}/tokenizer/tokenizer_config.json")
    ids, starts = taken.encode_batch([TEXT, "", "the river"])
    assert [ids[a:b].tolist() for a, b in itertools.pairwise(starts)] == [
        taken.encode(text) for text in (TEXT, "", "the river")
    ]
    taken.check_batch([TEXT])
    assert sum(taken.byte_lengths()[taken.encode(TEXT)]) == len(TEXT.encode())
    # again does nothing, another one takes its place
    assert main(["tokenizer", "--from", str(theirs), "--workspace", str(tmp_path)]) == 0
    assert "up to date" in capsys.readouterr().err
    assert storage.read_json(f"{tmp_path}/tokenizer/manifest.json") == manifest
    other = tmp_path / "other"
    other.mkdir()
    sentence_piece(other, bos_token="<s>", eos_token="</s>", pad_token="<unk>")
    assert take(tmp_path, other).eot_id == 2
    assert storage.read_json(f"{tmp_path}/tokenizer/manifest.json")["fingerprint"] != manifest["fingerprint"]


def test_our_own_tokenizer_is_taken_over_as_it_is(tmp_path):
    made = train_on_texts([TEXT * 9], TokenizerSettings(vocab_size=300, reserved_tokens=2))
    storage.write_bytes(f"{tmp_path}/one/tokenizer.json", made.backend.to_str().encode())
    taken = take(tmp_path / "two", tmp_path / "one")
    assert taken.same_as(made)
    assert (taken.eot_id, taken.pad_id, taken.bos_id) == (made.eot_id, made.pad_id, made.eot_id)


def test_texts_end_as_the_model_says_also_where_a_token_is_called_as_ours(tmp_path):
    made = train_on_texts([TEXT * 9], TokenizerSettings(vocab_size=300, reserved_tokens=2))
    storage.write_bytes(f"{tmp_path}/one/tokenizer.json", made.backend.to_str().encode())
    end, begin = "<|reserved_0|>", "<|reserved_1|>"
    for roles in ({"eos_token": end}, {"bos_token": begin, "eos_token": "<|endoftext|>"}):
        roles |= {"pad_token": "<|pad|>"}
        storage.write_json(f"{tmp_path}/one/tokenizer_config.json", roles)
        taken = take(tmp_path / "two", tmp_path / "one")
        reference = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{tmp_path}/one/tokenizer.json", **roles)
        assert (taken.eot_id, taken.pad_id) == (reference.eos_token_id, reference.pad_token_id)
        assert taken.bos_id == (reference.bos_token_id or reference.eos_token_id)


def test_tokenizers_that_the_faster_package_does_not_know_are_encoded_by_the_other(tmp_path, theirs, monkeypatch):
    import fastokens

    taken = take(tmp_path, theirs)
    texts = [TEXT, "", "the house"]
    expected = taken.encode_batch(texts)

    def unknown(_):
        raise ValueError("unknown kind")

    monkeypatch.setattr(fastokens.Tokenizer, "from_json_str", unknown)
    got = Tokenizer.load(f"{tmp_path}/tokenizer").encode_batch(texts)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def test_without_an_end_of_text_or_a_free_token_nothing_is_taken(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    byte_level(folder)
    with pytest.raises(InputError, match="eos_token is missing"):
        take(tmp_path, folder)
    sentence_piece(folder, eos_token="</s>")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = content["added_tokens"][-1:]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="pad_token is missing, no special token is free"):
        take(tmp_path, folder)
    with pytest.raises(SettingsError, match="from_model is '/no/such'; it is neither a folder with a tokenizer.json"):
        take(tmp_path, "/no/such")
    assert not storage.exists(f"{tmp_path}/tokenizer")


def test_the_model_gives_the_shape_and_has_to_fit(tmp_path, theirs):
    settings = PretrainJob(workspace=str(tmp_path), init_from=str(theirs), sequence_length=64, steps=200)
    checked(settings)
    own = train_on_texts([TEXT * 9], TokenizerSettings(vocab_size=300, reserved_tokens=2))
    storage.write_bytes(f"{tmp_path}/tokenizer/tokenizer.json", own.backend.to_str().encode())
    with pytest.raises(SettingsError, match=r"its tokenizer is not the one in .*run `ingot tokenizer --from"):
        init_from.shape(settings)
    take(tmp_path, theirs)
    config = init_from.shape(settings)
    assert (config.qk_norm, config.head_dim, config.max_seq_len) == (True, 32, 128)
    assert init_from.shape(replace(settings, sequence_length=256)).max_seq_len == 256
    with pytest.raises(SettingsError, match="tensor_parallel"):
        init_from.shape(replace(settings, workers=8, parallelism=Parallelism(tensor_parallel=8)))
    assert settings.worker_counts(config) == [1]
    facts = init_from.facts(settings)
    assert facts == {"model": str(theirs), "repository": False, "fingerprint": facts["fingerprint"]}
    assert init_from.facts(replace(settings, init_from=None)) is None
    small = shutil.copytree(theirs, tmp_path / "small")
    make_model(small, vocab_size=100)
    with pytest.raises(SettingsError, match="its vocabulary of 100 has no room for the tokenizer's"):
        init_from.shape(replace(settings, init_from=str(small)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (PretrainJob(init_from="x"), "sequence_length is None; it has to be given with init_from"),
        (PretrainJob(init_from="x", sequence_length=8, model=ModelSettings(d_model=64)), "model is .*init_from"),
        (LadderJob(pretrain=PretrainJob(init_from="x", sequence_length=8)), "pretrain.init_from is 'x'"),
        (
            TuneJob(pretrain=PretrainJob(init_from="x", sequence_length=8), transfer_to=ModelSettings()),
            "pretrain.init_from is 'x'",
        ),
    ],
)
def test_settings_that_a_model_to_go_on_from_excludes_are_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        checked(settings)


def test_read_weights_are_the_models(theirs, tmp_path):
    from jobs.model_folder import open_model
    from models.transformer import Transformer

    source = open_model(str(theirs))
    model = Transformer(source.config, seed=3)
    init_from.read_weights(PretrainJob(workspace=str(tmp_path), init_from=str(theirs), sequence_length=8), model)
    reference = transformers.AutoModelForCausalLM.from_pretrained(str(theirs), dtype=torch.float32).eval()
    tokens = torch.arange(50)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), reference(tokens).logits, rtol=0, atol=1e-5)
