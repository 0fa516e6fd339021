"""Models in Llama format that others made, with their tokenizers: transformers is the judge."""

import json
import shutil

import pytest
import tokenizers
import torch
import transformers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jobs.export import generation_content
from jobs.settings import OfRun, SettingsError
from jobs.trained import load, located
from models.generate import generate

TEXT = "The house is old, and the river is wide.\n  Größe, café, 東京 🙂 <|end|> don't 12345"


def byte_level(folder, **roles):
    """As Llama 3 has it: special tokens behind the others, one of which is put before every text."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    backend.add_special_tokens(["<|begin|>", "<|end|>", "<|more|>"])
    backend.add_tokens([AddedToken("the river", normalized=False)])  # one that is text
    first = ("<|begin|>", backend.token_to_id("<|begin|>"))
    backend.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[first])
    return save(backend, folder, roles)


def sentence_piece(folder, **roles):
    """As Llama 2 has it: spaces are U+2581, and bytes without a token are <0x..>."""
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"Theousi", "▁T", "he"]
    merges = [("▁", "T"), ("h", "e")]
    ids = {token: i for i, token in enumerate(vocab)}
    backend = tokenizers.Tokenizer(models.BPE(ids, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return save(backend, folder, roles)


def save(backend, folder, roles):
    backend.save(f"{folder}/tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return backend.get_vocab_size()


TOKENIZERS = {
    "llama-3": (byte_level, {"bos_token": "<|begin|>", "eos_token": {"__type": "AddedToken", "content": "<|end|>"}}),
    "qwen": (byte_level, {"bos_token": None, "eos_token": "<|end|>", "pad_token": "<|more|>"}),
    "split": (byte_level, {"eos_token": "<|end|>", "split_special_tokens": True}),
    "llama-2": (sentence_piece, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
}


def make_model(folder, kind="Llama", **shape):
    torch.manual_seed(6)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, initializer_range=0.1, **({"head_dim": 16} | shape),
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model.save_pretrained(str(folder), max_shard_size="60KB")
    return model


@pytest.mark.parametrize("of", TOKENIZERS)
def test_models_of_others_are_used_as_transformers_uses_them(tmp_path, of):
    write, roles = TOKENIZERS[of]
    vocab_size = write(tmp_path, **roles)
    kind, shape = ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}) if of == "qwen" else ("Llama", {})
    theirs = make_model(tmp_path, kind, vocab_size=vocab_size + 5, eos_token_id=[7, 8], **shape)
    reference = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    trained = load(OfRun(model=str(tmp_path)))
    tokenizer = trained.tokenizer
    ids = tokenizer.encode(TEXT)
    assert ids == reference.encode(TEXT, add_special_tokens=False)
    assert tokenizer.decode(ids) == reference.decode(ids)
    assert tokenizer.eot_id == reference.eos_token_id
    assert tokenizer.bos_id == (reference.eos_token_id if reference.bos_token_id is None else reference.bos_token_id)
    assert tokenizer.pad_id == (reference.eos_token_id if reference.pad_token_id is None else reference.pad_token_id)
    assert tokenizer.vocab_size == len(reference)
    # special tokens have no bytes; SentencePiece puts a space before a text
    expected = TEXT if of == "split" else TEXT.replace("<|end|>", "") if write is byte_level else f" {TEXT}"
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == expected
    with torch.no_grad():
        torch.testing.assert_close(
            trained.model(torch.tensor([ids])), theirs(torch.tensor([ids])).logits, rtol=0, atol=1e-5
        )
    assert (trained.step, trained.name) == (None, tmp_path.name)


def test_the_token_that_ends_texts_may_stand_in_the_models_configuration(tmp_path):
    vocab_size = byte_level(tmp_path)
    make_model(tmp_path, vocab_size=vocab_size, eos_token_id=[vocab_size - 2, 3])
    assert load(OfRun(model=str(tmp_path))).tokenizer.eot_id == vocab_size - 2
    for file in ("config.json", "generation_config.json"):
        path = tmp_path / file
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": None}))
    with pytest.raises(ValueError, match=r"tokenizer_config.json: eos_token is missing"):
        load(OfRun(model=str(tmp_path)))


def test_texts_end_with_the_tokens_that_the_generation_config_names(tmp_path):
    size = byte_level(tmp_path, eos_token="<|end|>")
    make_model(tmp_path, vocab_size=size)
    first, path = load(OfRun(model=str(tmp_path))), tmp_path / "generation_config.json"
    prompt = [5, 9, 11]
    text = list(generate(first.model, prompt, max_new_tokens=20, temperature=0))
    at = next(i for i, token in enumerate(text) if i > 2 and token not in text[:i])
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [size - 1, text[at]]}))
    trained = load(OfRun(model=str(tmp_path)))
    assert trained.ends == {trained.tokenizer.eot_id, size - 1, text[at]}
    assert trained.fingerprint != first.fingerprint
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path))
    reference = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :].tolist()
    mine = list(generate(trained.model, prompt, max_new_tokens=20, temperature=0, stop=trained.ends))
    assert [*mine, text[at]] == reference
    assert generation_content(trained)["eos_token_id"] == [trained.tokenizer.eot_id, *sorted({size - 1, text[at]})]


def test_fingerprints_tell_weights_shapes_and_tokenizers_apart(tmp_path):
    size = byte_level(tmp_path, eos_token="<|end|>")
    make_model(tmp_path, vocab_size=size)
    first = load(OfRun(model=str(tmp_path))).fingerprint
    copy = shutil.copytree(tmp_path, tmp_path / "copy", ignore=shutil.ignore_patterns("copy"))
    assert load(OfRun(model=str(copy))).fingerprint == first
    path = sorted(copy.glob("*.safetensors"))[-1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    changed = load(OfRun(model=str(copy))).fingerprint
    sentence_piece(copy, eos_token="</s>")
    assert len({first, changed, load(OfRun(model=str(copy))).fingerprint}) == 3


def test_repositories_are_fetched_from_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    size = byte_level(tmp_path, eos_token="<|end|>")
    make_model(tmp_path, vocab_size=size)
    asked = []

    def snapshot_download(repo_id, revision=None, allow_patterns=None):
        asked.append((repo_id, revision))
        if repo_id != "someone/tiny-llama":
            raise OSError(f"404 Client Error: {repo_id} is not a repository\nmore")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    settings = located(OfRun(model="someone/tiny-llama@v1"))
    assert not asked
    trained = load(settings)
    assert (trained.name, asked) == ("tiny-llama@v1", [("someone/tiny-llama", "v1")])
    with pytest.raises(SettingsError, match=r"model is 'someone/none'; .*404 Client Error: someone/none is not"):
        load(OfRun(model="someone/none"))


def test_what_is_no_model_or_cannot_be_represented_is_refused(tmp_path, monkeypatch):
    for model in ("no-such-folder", "/no/such/folder", "s3://", str(tmp_path)):
        with pytest.raises(SettingsError, match="it is neither a folder with a config.json nor a repository's name"):
            located(OfRun(model=model))
    size = byte_level(tmp_path, eos_token="<|end|>")
    make_model(tmp_path, vocab_size=size)
    monkeypatch.chdir(tmp_path.parent)
    assert located(OfRun(model=tmp_path.name)).model == str(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"vocab_size": size - 1}, r"embed_tokens.weight is of shape \(\d+, 64\), but config.json makes it"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        ({"model_type": "mixtral"}, "model_type is 'mixtral'"),
    ):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(SettingsError, match=message):
            load(OfRun(model=str(tmp_path)))
    path.write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json: no such file, which is the only form"):
        load(OfRun(model=str(tmp_path)))
