"""Exported models against transformers' own implementation, and the way back."""

import json
from dataclasses import replace

import pytest
import safetensors.torch
import torch
import transformers
from large_weights import with_large_weights

from models.config import ModelConfig
from models.generate import generate
from models.hugging_face import Pretrained, load_pretrained, save_pretrained
from models.transformer import Transformer

SMALL = ModelConfig(
    vocab_size=97, d_model=64, n_layers=3, n_heads=4, n_kv_heads=4, d_ff=80, max_seq_len=64, rope_theta=20000.0
)
TOKENS = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))


def of_shape(config):
    return with_large_weights(Transformer(config, seed=3), 5)


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["llama", "qwen3"])
def test_exported_model_has_equal_logits_in_transformers(tmp_path, n_kv_heads, tied, qk_norm):
    model = of_shape(replace(SMALL, n_kv_heads=n_kv_heads, tied_embeddings=tied, qk_norm=qk_norm))
    save_pretrained(model.state_dict(), model.config, str(tmp_path), eos_token_id=1)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        str(tmp_path), dtype=torch.float32, output_loading_info=True
    )
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM")
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        ours, reference = model(TOKENS), theirs.eval()(TOKENS).logits
        loss, reference_loss = model(TOKENS[:, :-1], TOKENS[:, 1:]), theirs(TOKENS, labels=TOKENS).loss
    assert reference.std() > 0.3  # else equality to 1e-5 would say little
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, reference_loss, rtol=0, atol=1e-5)


@pytest.mark.parametrize("qk_norm", [False, True], ids=["llama", "qwen3"])
def test_a_model_that_transformers_made_has_equal_logits_here(tmp_path, qk_norm):
    kind = (
        (transformers.Qwen3Config, transformers.Qwen3ForCausalLM)
        if qk_norm
        else (transformers.LlamaConfig, transformers.LlamaForCausalLM)
    )
    torch.manual_seed(5)
    theirs = kind[1](
        kind[0](
            vocab_size=97, hidden_size=64, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=64, initializer_range=0.1,
            tie_word_embeddings=qk_norm,
        )
    )  # fmt: skip
    theirs.save_pretrained(str(tmp_path), max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    config, state = load_pretrained(str(tmp_path))
    model = Transformer(config, seed=None)
    model.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), theirs.eval()(TOKENS).logits, rtol=0, atol=1e-5)


LLAMA_3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48}  # fmt: skip


@pytest.mark.parametrize(
    "shape",
    [
        {"rope_parameters": LLAMA_3},
        {"head_dim": 32},
        {"head_dim": 8, "tie_word_embeddings": True},
        {"head_dim": 32, "qwen3": True},
        {"rope_parameters": LLAMA_3, "qwen3": True, "tie_word_embeddings": True},
    ],
    ids=["llama-3-rope", "wide-heads", "narrow-heads-tied", "qwen3-wide-heads", "qwen3-llama-3-rope"],
)
def test_models_of_others_have_equal_logits_and_come_back_bit_for_bit(tmp_path, shape):
    shape = dict(shape)
    kind = "Qwen3" if shape.pop("qwen3", False) else "Llama"
    torch.manual_seed(5)
    settings = getattr(transformers, f"{kind}Config")(
        vocab_size=97, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=192, initializer_range=0.1, rms_norm_eps=1e-5,
        **({"head_dim": 16} | shape),
    )  # fmt: skip
    theirs = getattr(transformers, f"{kind}ForCausalLM")(settings).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"), max_shard_size="100KB")
    tokens = torch.randint(0, 97, (2, 150), generator=torch.Generator().manual_seed(1))

    config, state = load_pretrained(str(tmp_path / "theirs"))
    model = Transformer(config, seed=None)
    model.load_state_dict(state)
    with torch.no_grad():
        reference = theirs(tokens).logits
        torch.testing.assert_close(model(tokens), reference, rtol=0, atol=1e-5)
    assert config.n_params() == sum(p.numel() for p in theirs.parameters())
    # 2 flops a weight of a matrix product forward, twice that backward, and the same of queries, keys, values
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and (config.tied_embeddings or "tok_" not in n)]
    attention = 3 * 2 * 2 * 150 * config.n_layers * config.n_heads * config.head_dim
    assert config.flops_per_token(150) == 6 * sum(p.numel() for p in matrices) + attention

    save_pretrained(model.state_dict(), config, str(tmp_path / "ours"), max_shard_size=100_000)
    back = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "ours"), dtype=torch.float32).eval()
    assert type(back) is type(theirs)
    torch.testing.assert_close(dict(back.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(back(tokens).logits, reference, rtol=0, atol=0)
    again, state = load_pretrained(str(tmp_path / "ours"))
    assert again == config
    torch.testing.assert_close(state, dict(model.state_dict()), rtol=0, atol=0)


def test_large_models_are_split_and_the_index_names_every_tensor(tmp_path):
    model = of_shape(SMALL)
    save_pretrained(model.state_dict(), SMALL, str(tmp_path), max_shard_size=60_000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * SMALL.n_params()
    for file in files:
        tensors = safetensors.torch.load_file(str(tmp_path / file))
        assert set(tensors) == {name for name, of in index["weight_map"].items() if of == file}
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 60_000


@pytest.mark.parametrize(("base_width", "exact"), [(32, True), (48, False)])
def test_the_output_multiplier_of_mup_is_in_the_exported_weights(tmp_path, base_width, exact):
    model = of_shape(replace(SMALL, base_width=base_width))
    save_pretrained(model.state_dict(), model.config, str(tmp_path))
    theirs = transformers.LlamaForCausalLM.from_pretrained(str(tmp_path), dtype=torch.float32).eval()
    config, state = load_pretrained(str(tmp_path))
    back = Transformer(config, seed=None)
    back.load_state_dict(state)
    with torch.no_grad():
        ours = model(TOKENS)
        torch.testing.assert_close(theirs(TOKENS).logits, ours, rtol=0, atol=1e-5)
        assert torch.equal(back(TOKENS), ours) or not exact
    # what went out comes back as it is
    save_pretrained(state, config, str(tmp_path / "again"))
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_files_that_end_too_early_are_told(tmp_path):
    save_pretrained(Transformer(SMALL).state_dict(), SMALL, str(tmp_path))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model.safetensors: ends within \S+\.weight; it is not whole"):
        Pretrained(str(tmp_path))  # before any weight is read
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_pretrained(str(tmp_path))


@pytest.mark.parametrize("lie", [(0, 8), (8, 8), (-4, 0)])
def test_headers_that_lie_about_where_values_are_are_told(tmp_path, lie):
    save_pretrained(Transformer(SMALL).state_dict(), SMALL, str(tmp_path))
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    offsets = header["model.norm.weight"]["data_offsets"]
    header["model.norm.weight"]["data_offsets"] = [at + moved for at, moved in zip(offsets, lie, strict=True)]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises(ValueError, match=r"model.safetensors: data_offsets of model\.norm\.weight are"):
        Pretrained(str(tmp_path))
    with pytest.raises(safetensors.SafetensorError):  # the format's own reader
        safetensors.torch.load_file(str(path))


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_greedy_text_equals_transformers(tmp_path, n_kv_heads):
    model = of_shape(replace(SMALL, n_kv_heads=n_kv_heads))
    save_pretrained(model.state_dict(), model.config, str(tmp_path))
    theirs = transformers.LlamaForCausalLM.from_pretrained(str(tmp_path), dtype=torch.float32).eval()
    prompt = [3, 1, 4, 1, 5]
    reference = theirs.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, 5, dtype=torch.long), max_new_tokens=30, do_sample=False
    )
    assert list(generate(model, prompt, max_new_tokens=30, temperature=0)) == reference[0, 5:].tolist()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_what_was_written_is_read_back(tmp_path, tied, qk_norm):
    model = of_shape(replace(SMALL, n_kv_heads=2, tied_embeddings=tied, qk_norm=qk_norm))
    save_pretrained(model.state_dict(), model.config, str(tmp_path))
    config, state = load_pretrained(str(tmp_path))
    assert config == model.config
    torch.testing.assert_close(state, dict(model.state_dict()), rtol=0, atol=0)


def test_bf16_file_is_the_rounded_model(tmp_path):
    model = of_shape(SMALL)
    save_pretrained(model.state_dict(), model.config, str(tmp_path), dtype=torch.bfloat16)
    _, state = load_pretrained(str(tmp_path))
    rounded = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    torch.testing.assert_close(state, rounded, rtol=0, atol=0)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_missing_weights_are_named(tmp_path):
    state = Transformer(SMALL).state_dict()
    del state["layers.1.attention.w_q.weight"]
    with pytest.raises(ValueError, match=r"layers\.1\.attention\.w_q\.weight"):
        save_pretrained(state, SMALL, str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "rope_type is 'linear'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types is"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is"),
        ({"head_dim": 32}, r"q_proj.weight is of shape \(64, 64\), but config.json makes it \(128, 64\)"),
        ({"num_hidden_layers": 2}, r"model.layers.2.\S+, for which the model here has no place"),
        ({"num_hidden_layers": 4}, r"the weights lack model.layers.3"),
        ({"rms_norm_eps": 0.0}, "norm_eps is 0.0"),
    ],
)
def test_what_the_model_cannot_do_is_refused(tmp_path, change, message):
    save_pretrained(Transformer(SMALL).state_dict(), SMALL, str(tmp_path))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        load_pretrained(str(tmp_path))
