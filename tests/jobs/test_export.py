"""Exports, against the programs that read them: transformers, the gguf package's reader, a hub's client."""

import json
import os
from dataclasses import asdict, replace

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
import yaml
from large_weights import with_large_weights

from jobs import export
from jobs.gguf import pre_tokenizer, write_gguf
from jobs.run_folder import StoredRun
from jobs.settings import ExportJob, OfRun, PretrainJob, SettingsError, checked
from jobs.trained import load, run_fingerprint
from models.config import ModelConfig, OptimizerConfig, RopeScaling
from models.generate import Engine, Sampling, generate
from models.hugging_face import save_pretrained
from models.optimizer import build_optimizer
from models.training import checkpoints
from models.training.ledger import LEDGER, Entry, Ledger
from models.transformer import Transformer
from pipelines import storage
from pipelines.tokenizer import TokenizerSettings, train_on_texts

TEXT = "The house is old, and the river is wide. Größe, café, 東京.\n  It's 12345 <|endoftext|> DON'T\n\n1 22 333 4444 "
CONFIG = ModelConfig(
    vocab_size=448, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=96, max_seq_len=64, tied_embeddings=True,
    base_width=48,
)  # fmt: skip


def train_tokenizer(**settings):
    return train_on_texts([TEXT * 20], TokenizerSettings(vocab_size=400, reserved_tokens=2, **settings))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A run of two checkpoints with all its facts, as the jobs leave them."""
    workspace = str(tmp_path_factory.mktemp("workspace"))
    tokenizer = train_tokenizer()
    storage.write_bytes(f"{workspace}/tokenizer/tokenizer.json", tokenizer.backend.to_str().encode())
    storage.write_json(f"{workspace}/tokenizer/manifest.json", {"fingerprint": "t"})
    run = StoredRun(f"{workspace}/runs/base")
    settings = asdict(PretrainJob(steps=20, global_batch=8, sequence_length=64))
    dropped = {"gopher: too short": {"documents": 300, "bytes": 9000}, "c4: no end": {"documents": 5, "bytes": 90}}
    stage = {"documents_in": 1000, "documents_out": 695, "bytes_in": 10**6, "bytes_out": 700_000, "set_aside": dropped}
    data = {
        "stages": {"filtered": stage},
        "tokenizer": {"vocab_size": 400, "bytes_per_token": 3.21},
        "tokens": {"train": {"tokens": 200_000, "documents": 690, "bytes": 690_000}},
    }
    facts = {"model": asdict(CONFIG), "settings": settings, "tokenizer": "t", "device": "gpu", "world_size": 2}
    run.write_json("run.json", {**facts, "version": "0.1", "data": data})
    run.write_json("hardware.json", {"device": "NVIDIA H200", "workers": 2})
    for step in (10, 20):
        row = {"step": step, "time": step, "loss": 5 - step / 10, "lr": 1e-3, "tokens": 512 * step, "seconds": 2.0}
        run.append_line("metrics/a.jsonl", json.dumps(row | {"tokens_per_second": 1234.0}))
        measured = {"step": step, "time": step + 1, "validation_loss": 4.5 - step / 10, "validation_bits_per_byte": 1.5}
        run.append_line("metrics/a.jsonl", json.dumps(measured))
    run.append_line("events.jsonl", json.dumps({"time": 1, "event": "rollback"}))
    ledger = Ledger()
    for step in (10, 20):
        model = with_large_weights(Transformer(CONFIG, seed=step), 6)
        name = f"checkpoints/step-{step:08d}"
        checkpoints.save(run, name, model, build_optimizer(model, OptimizerConfig()), {})
        ledger.add(Entry(step, step, step, 1.0, name, "clean"))
    run.write_json(LEDGER, ledger.to_dict())
    score = {"task": "mmlu", "group": None, "metric": "acc", "filter": "none", "value": 0.2612, "stderr": 0.0037}
    scores = [score | {"n_shot": 5}, score | {"task": "mmlu_law", "group": "mmlu", "n_shot": 5}]
    for step, measured in ((20, {"scores": scores}), (10, {"validation_loss": 3.5})):
        fingerprint = run_fingerprint(OfRun(workspace, step=step)) + "-float32-cpu"
        results = {"step": step, "fingerprint": fingerprint, **measured}
        storage.write_json(f"{workspace}/evals/base/step-{step:08d}/results.json", results)
    return workspace


def files_of(folder):
    return sorted(os.listdir(folder))


def test_exported_folder_is_split_and_answers_as_the_run_in_transformers(workspace, tmp_path):
    folder = str(tmp_path / "out")
    export.run(ExportJob(workspace=workspace, output=folder, max_shard_size="100KB"))
    shards = [name for name in files_of(folder) if name.endswith(".safetensors")]
    assert len(shards) > 2
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    trained = load(OfRun(workspace=workspace))
    ids = trained.tokenizer.encode(TEXT)
    assert trained.tokenizer.eot_id not in ids  # what is written out is text, for transformers too
    assert tokenizer(TEXT)["input_ids"] == ids
    assert (tokenizer.decode(ids), tokenizer.chat_template) == (TEXT, None)
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert special == (trained.tokenizer.eot_id, trained.tokenizer.eot_id, trained.tokenizer.pad_id)
    with torch.no_grad():
        tokens = torch.tensor([ids[:64]])
        torch.testing.assert_close(model.eval()(tokens).logits, trained.model(tokens), rtol=0, atol=1e-5)
    # greedy and without the rows that no token has, by what generation_config.json says
    prompt = [trained.tokenizer.eot_id, *ids[:5]]
    mask = torch.ones(1, len(prompt), dtype=torch.long)
    theirs = model.generate(torch.tensor([prompt]), attention_mask=mask, max_new_tokens=40)[0, len(prompt) :].tolist()
    stop, size = {trained.tokenizer.eot_id}, trained.tokenizer.vocab_size
    ours = list(generate(trained.model, prompt, max_new_tokens=40, temperature=0, stop=stop, vocab_size=size))
    assert [token for token in theirs if token not in stop] == ours


def test_what_the_card_says_to_run_writes_the_runs_own_text(workspace, tmp_path, capsys):
    folder = str(tmp_path / "out")
    export.run(ExportJob(workspace=workspace, output=folder))
    program = storage.read_bytes(f"{folder}/README.md").decode().split("```python\n")[1].split("```")[0]
    exec(program.replace('"FOLDER"', repr(folder)))
    printed = capsys.readouterr().out.rstrip("\n")
    trained = load(OfRun(workspace=workspace))
    prompt = [trained.tokenizer.bos_id, *trained.tokenizer.encode("The")]
    stop, size = {trained.tokenizer.eot_id}, trained.tokenizer.vocab_size
    ours = list(generate(trained.model, prompt, max_new_tokens=50, temperature=0, stop=stop, vocab_size=size))
    assert printed.removesuffix("<|endoftext|>") == "<|endoftext|>The" + trained.tokenizer.decode(ours)


def test_greedy_text_of_200_prompts_is_transformers(workspace, tmp_path):
    folder = str(tmp_path / "out")
    export.run(ExportJob(workspace=workspace, output=folder))
    trained = load(OfRun(workspace=workspace))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = trained.tokenizer.encode(TEXT * 8)
    eot, engine = trained.tokenizer.eot_id, Engine(trained.model, slots=50, vocab_size=trained.tokenizer.vocab_size)
    prompts = {}
    for length in range(4, 24):  # ten of each length, so that transformers need not pad
        same = [[eot, *ids[start : start + length]] for start in range(length, length + 10)]
        for prompt in same:
            prompts[engine.submit(prompt, Sampling(24, stop=frozenset({eot})))] = prompt
    ours = {request: [] for request in prompts}
    while engine.busy:
        for token in engine.step():
            ours[token.request] += [] if token.token is None else [token.token]
    requests = list(prompts)
    for same in (requests[i : i + 10] for i in range(0, 200, 10)):
        batch = torch.tensor([prompts[request] for request in same])
        theirs = model.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=24)
        for request, row in zip(same, theirs[:, batch.shape[1] :].tolist(), strict=True):
            assert ours[request] == (row[: row.index(eot)] if eot in row else row)
    assert len(ours) == 200


def test_what_is_read_back_and_written_again_is_equal_byte_for_byte(workspace, tmp_path):
    first, second, third = (str(tmp_path / name) for name in ("base", "again/base", "bf16/base"))
    export.run(ExportJob(workspace=workspace, output=first, max_shard_size="100KB"))
    export.run(ExportJob(model=first, output=second, max_shard_size="100KB"))
    assert files_of(first) == files_of(second)
    for name in set(files_of(first)) - {"README.md"}:
        assert storage.read_bytes(f"{first}/{name}") == storage.read_bytes(f"{second}/{name}"), name
    trained, back = load(OfRun(workspace=workspace)), load(OfRun(model=first))
    assert trained.tokenizer.encode(TEXT) == back.tokenizer.encode(TEXT)
    assert trained.tokenizer.byte_lengths().tolist() == back.tokenizer.byte_lengths().tolist()

    export.run(ExportJob(model=first, output=third, dtype="bf16"))
    assert json.loads(storage.read_bytes(f"{third}/config.json"))["torch_dtype"] == "bfloat16"
    for name, parameter in load(OfRun(model=third)).model.named_parameters():
        assert torch.equal(parameter, back.model.get_parameter(name).bfloat16().float())


def test_model_card_tells_the_runs_own_facts(workspace, tmp_path):
    folder = str(tmp_path / "out")
    export.run(ExportJob(workspace=workspace, output=folder, gguf="q8_0"))
    card = storage.read_bytes(f"{folder}/README.md").decode()
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["ingot", "llama"]
    }  # fmt: skip
    for told in (
        "# base", "Trained from scratch with Ingot 0.1", "| steps | 20 of 20 |", "| tokens | 10.2k, 0.05 epochs |",
        "| batch | 8 sequences of 64 tokens |", "| hardware | 2 workers on NVIDIA H200 |", "| precision | bf16;",
        "| training loss | 3.0000 (mean of the last 1 step) |", "1 rollback, 0 restarts",
        "| validation loss | 2.5000 nats a token, 1.5000 bits a byte, at step 20 |", "| time in steps | 4 s |",
        "| parametrization | muP from width 48;", f"| parameters | {CONFIG.n_params():,} |",
        "| filtered | 1,000 | 695 | 700.0 kB | 69.5 % | gopher: too short 300, c4: no end 5 |",
        "byte-level BPE, 400 tokens, 3.21 bytes a token", "| train | 200k tokens of 690 documents, 690.0 kB of text |",
        "| mmlu | acc | none | 5 | 0.2612 ± 0.0037 |", "`base-Q8_0.gguf` is for llama.cpp",
    ):  # fmt: skip
        assert told in text, told
    assert "mmlu_law" not in text
    # an earlier checkpoint has its own
    export.run(ExportJob(workspace=workspace, output=folder, step=10))
    card = storage.read_bytes(f"{folder}/README.md").decode()
    assert "| steps | 10 of 20 |" in card
    assert "| validation split | validation loss |  |  | 3.5000 |" in card
    assert "mmlu" not in card
    # and not that of other weights, of the same step of a run that went back
    storage.write_json(f"{workspace}/evals/base/step-00000010/results.json", {"fingerprint": "0", "validation_loss": 3})
    export.run(ExportJob(workspace=workspace, output=folder, step=10))
    assert "validation split" not in storage.read_bytes(f"{folder}/README.md").decode()
    assert not any(name.endswith(".gguf") for name in files_of(folder))  # the earlier export's


def test_an_export_that_was_killed_looks_like_none(workspace, tmp_path, monkeypatch):
    settings = ExportJob(workspace=workspace, output=str(tmp_path / "out"), max_shard_size="100KB")
    export.run(settings)
    whole = files_of(settings.output)
    opened = storage.open_output
    for killed_at in range(len(whole)):
        left = killed_at

        def open_output(uri):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return opened(uri)

        monkeypatch.setattr(storage, "open_output", open_output)
        with pytest.raises(KeyboardInterrupt):
            export.run(settings)
        monkeypatch.undo()
        with pytest.raises(SettingsError, match="neither a folder with a config.json"):
            load(OfRun(model=settings.output))
    (tmp_path / "out" / ".model.safetensors.0123abcd").write_text("what a killed writer leaves")
    export.run(settings)
    assert files_of(settings.output) == whole


def test_folders_with_something_else_are_left_alone(workspace, tmp_path):
    for number, name in enumerate(
        ("thesis.tex", "README.md", "model-F16.gguf", "config.json", "more/model.safetensors")
    ):
        folder = tmp_path / str(number)
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("years of work")
        with pytest.raises(SettingsError, match=rf"that folder holds something else than an export, such as \S+{name}"):
            export.run(ExportJob(workspace=workspace, output=str(folder)))
        assert (folder / name).read_text() == "years of work"


def test_what_others_put_beside_an_export_is_not_deleted_with_it(workspace, tmp_path):
    settings = ExportJob(workspace=workspace, output=str(tmp_path), gguf="f16")
    export.run(settings)
    whole = files_of(tmp_path)
    (tmp_path / "base-Q4_K_M.gguf").write_text("made of ours by another program")
    with pytest.raises(SettingsError, match=r"something else than an export, such as \S+base-Q4_K_M.gguf"):
        export.run(settings)
    assert files_of(tmp_path) == sorted([*whole, "base-Q4_K_M.gguf"])
    (tmp_path / "base-Q4_K_M.gguf").unlink()
    (tmp_path / ".ingot-export.json").unlink()  # as exports once were
    export.run(settings)
    assert files_of(tmp_path) == whole


def test_a_model_is_not_replaced_by_its_own_export(workspace, tmp_path):
    folder = str(tmp_path / "exports" / "out")
    export.run(ExportJob(workspace=workspace, output=folder))
    before = files_of(folder)
    for settings in ({"output": folder}, {"workspace": str(tmp_path)}):
        with pytest.raises(SettingsError, match="which holds the model itself"):
            export.run(ExportJob(model=folder, gguf="f16", **settings))
    assert files_of(folder) == before


@pytest.mark.parametrize("size", ["0", "5 apples", "-3GB", "0GB"])
def test_sizes_that_are_none_are_refused(size):
    with pytest.raises(SettingsError, match="max_shard_size is"):
        checked(ExportJob(max_shard_size=size))


# The hub


def test_pushed_folder_is_private_unless_it_is_to_be_public(workspace, tmp_path, monkeypatch):
    asked = []

    def create_repo(self, repo_id, *, private, exist_ok):
        asked.append((repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns, ignore_patterns):
        asked.append((repo_id, commit_message, sorted(set(files_of(folder_path)) - set(ignore_patterns))))

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    settings = ExportJob(workspace=workspace, output=str(tmp_path / "out"), push_to="someone/base")
    with pytest.raises(SettingsError, match="push_to is 'someone/base'; nobody is logged in"):
        export.run(settings)
    assert not asked
    assert not os.path.exists(settings.output)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "of the test")
    export.run(settings)
    export.run(replace(settings, public=True))
    created = ("someone/base", True, True)
    files = [name for name in files_of(settings.output) if not name.startswith(".")]
    pushed = ("someone/base", "step 20 of base, exported by Ingot", files)
    assert asked == [created, pushed, ("someone/base", False, True), pushed]
    assert (
        'AutoTokenizer.from_pretrained("someone/base")' in storage.read_bytes(f"{settings.output}/README.md").decode()
    )

    def refuse(self, repo_id, **_):
        raise huggingface_hub.errors.HfHubHTTPError(
            "403 Forbidden", response=type("Response", (), {"headers": {}, "request": None})()
        )

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(SettingsError, match=r"the export is in \S+out, but the hub says: 403 Forbidden"):
        export.run(settings)


# GGUF


def permuted_back(matrix, head_dim):
    """Rows of a llama's queries and keys from neighbouring pairs to halves of a head."""
    return matrix.reshape(-1, head_dim // 2, 2, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)


GGUF_NAMES = {
    "attn_norm": "attention_norm", "attn_q": "attention.w_q", "attn_k": "attention.w_k", "attn_v": "attention.w_v",
    "attn_output": "attention.w_o", "attn_q_norm": "attention.q_norm", "attn_k_norm": "attention.k_norm",
    "ffn_norm": "ffn_norm", "ffn_gate": "feed_forward.w_gate", "ffn_up": "feed_forward.w_up",
    "ffn_down": "feed_forward.w_down",
}  # fmt: skip
GGUF_TOP = {"token_embd": "tok_embeddings", "output_norm": "norm", "output": "output"}


@pytest.mark.parametrize(
    ("kind", "shape", "step"),
    [
        ("f32", {}, 0.0),
        ("f16", {"tied_embeddings": False, "base_width": None}, 2**-11),
        ("bf16", {"qk_norm": True, "head_width": 32}, 2**-8),
        ("q8_0", {"d_ff": 80, "rope_scaling": RopeScaling(4.0, 1.0, 4.0, 32)}, None),
    ],
    ids=["f32", "f16-untied", "bf16-qwen3", "q8_0-rope-scaling"],
)
def test_gguf_has_the_models_values_by_its_own_reader(tmp_path, kind, shape, step):
    config = replace(CONFIG, **shape)
    model, tokenizer = with_large_weights(Transformer(config, seed=1), 6), train_tokenizer()
    path = str(tmp_path / "model.gguf")
    write_gguf(model, tokenizer, path, kind, name="base")
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    arch = "qwen3" if config.qk_norm else "llama"
    expected = {
        "general.architecture": arch, "general.name": "base", f"{arch}.context_length": 64,
        f"{arch}.embedding_length": 64, f"{arch}.block_count": 2, f"{arch}.feed_forward_length": config.d_ff,
        f"{arch}.attention.head_count": 4, f"{arch}.attention.head_count_kv": 2,
        f"{arch}.rope.dimension_count": config.head_dim, f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.rope.freq_base": 10000.0, f"{arch}.vocab_size": tokenizer.vocab_size, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "dbrx", "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 1, "tokenizer.ggml.add_bos_token": True,
    }  # fmt: skip
    assert {name: fields[name] for name in expected} == expected
    assert fields[f"{arch}.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    size = tokenizer.vocab_size
    assert tokens == [tokenizer.backend.id_to_token(i) for i in range(size)]
    assert types == [3] * 4 + [1] * (size - 4)
    ours = json.loads(tokenizer.backend.to_str())["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(merge) for merge in ours]

    found = {}
    for tensor in reader.tensors:
        where, _, name = tensor.name.removesuffix(".weight").rpartition(".")
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if where:
            values = (
                permuted_back(values, config.head_dim) if name in ("attn_q", "attn_k") and arch == "llama" else values
            )
            found[f"layers.{where.removeprefix('blk.')}.{GGUF_NAMES[name]}.weight"] = values, tensor
        elif name != "rope_freqs":
            found[f"{GGUF_TOP[name]}.weight"] = values, tensor
    state = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    assert found.keys() == state.keys()
    for name, (values, tensor) in found.items():
        wanted = state[name] * np.float32(48 / 64) if name == "norm.weight" and config.base_width else state[name]
        wanted = wanted[:size] if len(wanted) == config.vocab_size else wanted  # no rows that no token has
        assert tensor.shape.tolist() == list(wanted.shape)[::-1]
        if wanted.ndim == 1 or kind == "f32":
            np.testing.assert_array_equal(values, wanted)
        elif step is not None:
            np.testing.assert_allclose(values, wanted, rtol=step, atol=1e-6)
        else:  # blocks of 32 values in steps of 1/127 of their largest, itself in fp16; rows of 80 are no whole blocks
            fits = wanted.shape[1] % 32 == 0
            assert tensor.tensor_type.name == ("Q8_0" if fits else "F16")
            blocks = wanted.reshape(-1, 32) if fits else wanted.reshape(-1, 16)
            off = np.abs(values.reshape(blocks.shape) - blocks).max(1)
            assert (off <= (0.5 / 127 + 2**-11) * np.abs(blocks).max(1) + 1e-6).all()
    if config.rope_scaling:
        (factors,) = [tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
        plain, scaled = (Transformer(replace(config, rope_scaling=x)).rotary for x in (None, config.rope_scaling))
        angles = [np.arctan2(table[1, 1].numpy(), table[0, 1].numpy()) for table in (plain, scaled)]
        np.testing.assert_allclose(factors, angles[0] / angles[1], rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "pre"),
    [({"pre_tokenizer": "gpt2"}, "gpt-2"), ({"digits": 3}, "dbrx"), ({"digits": 1}, "qwen2"), ({"digits": 2}, None)],
)
def test_gguf_names_the_pre_tokenizer_or_refuses(settings, pre):
    tokenizer = train_tokenizer(**settings)
    if pre is None:
        with pytest.raises(SettingsError, match="llama.cpp has no pre-tokenizer that cuts text where this tokenizer"):
            pre_tokenizer(tokenizer)
    else:
        assert pre_tokenizer(tokenizer) == pre


def test_gguf_of_a_model_that_llama_cpp_cannot_have_is_refused_before_anything_is_written(tmp_path):
    folder, output = str(tmp_path / "model"), str(tmp_path / "out")
    config = replace(CONFIG, qk_norm=True, rope_scaling=RopeScaling(4.0, 1.0, 4.0, 32))
    save_pretrained(Transformer(config, seed=1).state_dict(), config, folder, eos_token_id=0)
    storage.write_bytes(f"{folder}/tokenizer.json", train_tokenizer().backend.to_str().encode())
    with pytest.raises(SettingsError, match="no architecture with QK-norm whose rotary frequencies are scaled"):
        export.run(ExportJob(model=folder, output=output, gguf="f16"))
    assert not os.path.exists(output)
    export.run(ExportJob(model=folder, output=output))
