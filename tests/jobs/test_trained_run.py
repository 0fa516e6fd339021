"""Evaluate, generate and export, on a run that was put into a workspace by hand; transformers is the judge."""

import dataclasses
import glob
import itertools
import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
import transformers

from jobs import evaluate, export, generate
from jobs.cli import main
from jobs.eval_validation import validation
from jobs.run_folder import StoredRun
from jobs.settings import EvaluateJob, ExportJob, GenerateJob, OfRun, SettingsError
from jobs.trained import load
from models.config import ModelConfig, OptimizerConfig
from models.optimizer import build_optimizer
from models.training import checkpoints
from models.training.ledger import LEDGER, Entry, Ledger
from models.transformer import Transformer
from pipelines import storage
from pipelines.shards import write_shard
from pipelines.tokenizer import TokenizerSettings, train_on_texts

TEXT = "The house is old, and the river is wide. Größe, café, 東京. Answer: A\nAnswer: B\nAnswer: C\nAnswer: D\n"
BLOCK, LENGTH = 64, 48


def make_workspace(folder, *, letters_are_tokens):
    """A tokenizer, a validation split and a run with three checkpoints, as the jobs before leave them."""
    workspace = str(folder)
    texts = [TEXT * 20] if letters_are_tokens else ["the house is old and the river is wide " * 20]
    tokenizer = train_on_texts(iter(texts), TokenizerSettings(vocab_size=400, reserved_tokens=2))
    storage.write_bytes(f"{workspace}/tokenizer/tokenizer.json", tokenizer.backend.to_str().encode())
    storage.write_json(f"{workspace}/tokenizer/manifest.json", {"fingerprint": "t"})
    tokens = np.array(([*tokenizer.encode(TEXT * 30), tokenizer.eot_id]) * 2, np.uint16)
    write_shard(f"{workspace}/tokens/validation/shard-00000.parquet", tokens, BLOCK, tokenizer.pad_id)
    shape = {"tokens": len(tokens), "block": BLOCK, "shard_tokens": 32 * BLOCK * 1000, "dtype": "uint16"}
    manifest = {**shape, "vocab_size": tokenizer.vocab_size, "fingerprint": "of the tokens", "tokenizer": "t"}
    for split in ("train", "validation"):
        storage.write_json(f"{workspace}/tokens/{split}/manifest.json", manifest)
    config = ModelConfig(
        vocab_size=448, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=LENGTH,
        tied_embeddings=True,
    )  # fmt: skip
    run = StoredRun(f"{workspace}/runs/base")
    run.write_json("run.json", {"model": asdict(config), "tokens_manifest": "of the tokens", "tokenizer": "t"})
    ledger = Ledger()
    for step, status in ((10, "clean"), (20, "pending"), (30, "poisoned")):
        model = Transformer(config, seed=step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(6 if parameter.ndim == 2 else 1)
        optimizer = build_optimizer(model, OptimizerConfig())
        checkpoints.save(run, f"checkpoints/step-{step:08d}", model, optimizer, {})
        ledger.add(Entry(step, step, step, 1.0, f"checkpoints/step-{step:08d}", status))
    run.write_json(LEDGER, ledger.to_dict())
    return workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("workspace"), letters_are_tokens=True)


@pytest.fixture(scope="module")
def exported(workspace):
    """The run as transformers sees it: model and tokenizer."""
    export.run(ExportJob(workspace=workspace))
    folder = f"{workspace}/exports/base"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def test_newest_usable_checkpoint_is_taken_unless_another_is_asked_for(workspace):
    for step, taken in ((None, 20), (10, 10), (30, 30)):
        trained = load(OfRun(workspace=workspace, step=step))
        assert trained.step == taken
        expected = Transformer(trained.model.config, seed=taken).layers[0].attention.w_q.weight * 6
        torch.testing.assert_close(trained.model.layers[0].attention.w_q.weight, expected)


def test_unknown_runs_and_steps_are_refused_by_name(workspace, tmp_path):
    with pytest.raises(SettingsError, match="name is 'other'; there is no such run"):
        load(OfRun(workspace=workspace, name="other"))
    with pytest.raises(SettingsError, match="step is 15; the checkpoints of run base are of steps 10, 20, 30"):
        load(OfRun(workspace=workspace, step=15))


def test_weights_that_changed_on_storage_are_refused(workspace):
    shard, *_ = sorted(glob.glob(f"{workspace}/runs/base/checkpoints/*10/*.distcp"))
    with open(shard, "rb") as file:
        data = file.read()
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 1
    try:
        storage.write_bytes(shard, bytes(damaged))
        with pytest.raises(SettingsError, match=r"step is 10; .*its files are not those that were written"):
            load(OfRun(workspace=workspace, step=10))
    finally:
        storage.write_bytes(shard, data)


def test_export_has_equal_logits_and_tokens_in_transformers(workspace, exported):
    model, tokenizer = exported
    trained = load(OfRun(workspace=workspace))
    ids = trained.tokenizer.encode(TEXT)
    assert tokenizer.encode(TEXT) == ids
    assert tokenizer.decode(ids) == TEXT
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (trained.tokenizer.eot_id, trained.tokenizer.pad_id)
    assert model.config.eos_token_id == trained.tokenizer.eot_id
    tokens = torch.tensor([ids[:LENGTH]])
    with torch.no_grad():
        torch.testing.assert_close(trained.model(tokens), model(tokens).logits, rtol=0, atol=1e-5)


def test_generated_text_is_transformers_greedy_text(workspace, exported, capsys):
    model, tokenizer = exported
    settings = GenerateJob(workspace=workspace, prompt="The house", max_new_tokens=30, temperature=0)
    generate.run(settings)
    printed = capsys.readouterr().out
    prompt = [tokenizer.eos_token_id, *tokenizer.encode("The house")]
    ids = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=30,
        do_sample=False,
        # rows of the embedding that no token has
        suppress_tokens=list(range(len(tokenizer), model.config.vocab_size)),
    )[0, len(prompt) :].tolist()
    trained = load(OfRun(workspace=workspace))
    expected = b"".join(trained.tokenizer.token_bytes(token) for token in ids).decode("utf-8", "replace")
    assert printed == "The house" + expected + "\n"


def test_characters_of_several_tokens_come_whole(workspace):
    trained = load(OfRun(workspace=workspace))
    text = "日本 naïve 🙂"
    pieces = list(generate._decoded(trained, iter(trained.tokenizer.encode(text))))
    assert "".join(pieces) == text
    assert "�" not in "".join(pieces)


def test_validation_loss_is_transformers_loss_on_the_same_sequences(workspace, exported):
    model, tokenizer = exported
    results = evaluate.run(EvaluateJob(workspace=workspace, validation_samples=7, batch=3))
    tokens = ([*tokenizer.encode(TEXT * 30), tokenizer.eos_token_id]) * 2
    losses, targets, there = [], [], (len(tokens) - 1) // LENGTH
    for i in (of * there // 7 for of in range(7)):  # evenly from the whole split
        sample = torch.tensor([tokens[i * LENGTH : (i + 1) * LENGTH + 1]])
        with torch.no_grad():
            losses.append(torch.nn.functional.cross_entropy(model(sample[:, :-1]).logits[0], sample[0, 1:]).item())
        targets += sample[0, 1:].tolist()
    size = sum(len(load(OfRun(workspace=workspace)).tokenizer.token_bytes(t)) for t in targets)
    assert results["validation_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    bits = np.mean(losses) * len(targets) / math.log(2) / size
    assert results["validation_bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert json.loads(storage.read_bytes(f"{workspace}/evals/base/results.json")) == results


def test_evaluation_reads_what_pretraining_validated_on_and_redraws_the_page(workspace):
    run, page = f"{workspace}/runs/base/run.json", f"{workspace}/runs/base/report.html"
    facts = storage.read_json(run)
    storage.write_json(run, facts | {"settings": facts.get("settings", {}) | {"validation_samples": 5}})
    try:
        expected = evaluate.run(EvaluateJob(workspace=workspace, validation_samples=5))
        assert not storage.exists(page)  # a run without pages
        storage.write_bytes(page, b"old")
        found = evaluate.run(EvaluateJob(workspace=workspace))
    finally:
        storage.write_json(run, facts)
    assert found["validation_loss"] == expected["validation_loss"]
    assert f"{found['validation_loss']:.3f}" in storage.read_bytes(page).decode()


def test_validation_of_a_run_that_masked_documents_reads_each_alone(workspace, exported):
    model, tokenizer = exported
    trained = dataclasses.replace(load(OfRun(workspace=workspace)), masked=True)
    tokens = ([*tokenizer.encode(TEXT * 30), tokenizer.eos_token_id]) * 2
    samples = (len(tokens) - 1) // LENGTH
    # one has the end of a document and the beginning of another
    assert tokens.index(tokenizer.eos_token_id) % LENGTH < LENGTH - 1
    result = validation(trained, workspace, samples, 3)
    losses = []
    for i in range(samples):
        sample = tokens[i * LENGTH : (i + 1) * LENGTH + 1]
        starts = [0, *(at + 1 for at, token in enumerate(sample[:-1]) if token == tokenizer.eos_token_id)]
        for start, stop in itertools.pairwise([*starts, LENGTH]):
            if start < stop:
                with torch.no_grad():
                    logits = model(torch.tensor([sample[start:stop]])).logits[0]
                targets = torch.tensor(sample[start + 1 : stop + 1])
                losses += torch.nn.functional.cross_entropy(logits, targets, reduction="none").tolist()
    assert result["validation_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_shards_of_another_tokenizer_are_not_scored(workspace):
    manifest = f"{workspace}/tokens/validation/manifest.json"
    kept = storage.read_json(manifest)
    try:
        storage.write_json(manifest, kept | {"tokenizer": "u"})
        with pytest.raises(SettingsError, match=r"tokens/validation: was made with another tokenizer"):
            evaluate.run(EvaluateJob(workspace=workspace))
    finally:
        storage.write_json(manifest, kept)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--temperature", "-1"], "temperature is -1.0; it has to be at least 0"),
        (["generate", "--top_p", "0"], "top_p is 0.0"),
        (["generate", "--max_new_tokens", "0"], "max_new_tokens is 0"),
        (["generate", "--max_new_tokens", "100"], "must be at most 48"),
        (["generate", "--name", "other"], "name is 'other'"),
        (["evaluate", "--limit", "0"], "limit is 0"),
        (["evaluate", "--batch", "0"], "batch is 0"),
        (["evaluate", "--tasks", "mmlu_anatomy", "--data_dir", "/no/such/folder"], "no file /no/such/folder/mmlu/test"),
        (["evaluate", "--tasks", "mmlu_anatomi"], "no such task; near are mmlu_anatomy"),
        (["evaluate", "--tasks", "humaneval"], "allow_code_execution is False"),
        (["evaluate", "--steps", "[10, 11]"], "step is 11"),
        (["export", "--step", "11"], "step is 11"),
    ],
)
def test_bad_settings_end_with_status_2_and_a_sentence(workspace, arguments, message, capsys):
    assert main([*arguments, "--workspace", workspace]) == 2
    assert message in capsys.readouterr().err
