"""Prompts from a file and from a terminal, with a model in Llama format; transformers is the judge."""

import io
import json
import random

import pytest
import torch
import transformers

from jobs import generate, generate_many
from jobs.cli import main
from jobs.settings import GenerateJob, SettingsError, checked
from models.config import ModelConfig
from models.hugging_face import save_pretrained
from models.transformer import Transformer
from pipelines.tokenizer import TokenizerSettings, train_on_texts

WORDS = ["the", "house", "is", "old", "and", "the", "river", "is", "wide", "Größe", "café", "東京"]
FIELDS = ("completion", "tokens", "finished")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model as a folder, whose greedy texts differ and sometimes end."""
    path = str(tmp_path_factory.mktemp("model"))
    tokenizer = train_on_texts(iter([" ".join(WORDS) * 20]), TokenizerSettings(vocab_size=300, reserved_tokens=2))
    config = ModelConfig(
        vocab_size=320, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=96, tied_embeddings=True
    )
    model = Transformer(config, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim == 2 else 1)
    save_pretrained(model.state_dict(), config, path, eos_token_id=tokenizer.eot_id, pad_token_id=tokenizer.pad_id)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend, eos_token="<|endoftext|>", pad_token="<|pad|>"
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def prompts():
    draws = random.Random(0)
    return [" ".join(draws.choices(WORDS, k=draws.randint(0, 7))) for _ in range(30)]


def expected(folder, prompts, max_new_tokens):
    """transformers' greedy continuations, and whether they ended."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    suppressed = list(range(len(tokenizer), model.config.vocab_size))  # rows that no token has
    texts = []
    for prompt in prompts:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(prompt)]])
        new = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
            suppress_tokens=suppressed,
        )[0, ids.shape[1] :].tolist()  # fmt: skip
        ended = new[-1] == tokenizer.eos_token_id
        kept = new[:-1] if ended else new
        texts.append((tokenizer.decode(kept), len(kept), "stop" if ended else "length"))
    return texts


def asked(folder, tmp_path, **changes):
    settings = {"model": folder, "workspace": str(tmp_path / "ws"), "max_new_tokens": 20, "temperature": 0.0}
    job = GenerateJob(**{**settings, **changes})
    checked(job)
    return job


def records(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_prompts_of_a_file_get_transformers_greedy_texts_in_their_order(folder, prompts, tmp_path):
    lines = tmp_path / "questions.txt"
    lines.write_text("\n".join(prompts) + "\n", "utf-8")
    generate.run(asked(folder, tmp_path, prompts=str(lines)))
    found = records(tmp_path / "ws" / "generated" / "questions.jsonl")
    assert [r["prompt"] for r in found] == prompts
    truth = expected(folder, prompts, 20)
    assert [tuple(r[name] for name in FIELDS) for r in found] == truth
    assert {finished for _, _, finished in truth} == {"stop", "length"}
    assert len({text for text, _, _ in truth}) > 15  # else equality would say little
    assert [file.name for file in (tmp_path / "ws" / "generated").iterdir()] == ["questions.jsonl"]

    fields = tmp_path / "questions.jsonl"
    fields.write_text("".join(json.dumps({"prompt": p, "id": i}) + "\n" for i, p in enumerate(prompts)), "utf-8")
    generate.run(asked(folder, tmp_path, prompts=str(fields), output=str(tmp_path / "out.jsonl"), batch=3))
    assert records(tmp_path / "out.jsonl") == [{**r, "id": i} for i, r in enumerate(found)]


def test_a_killed_run_goes_on_where_it_was_and_ends_with_the_same_output(folder, prompts, tmp_path, monkeypatch):
    lines = tmp_path / "questions.txt"
    lines.write_text("\n".join(prompts), "utf-8")
    drawn = {"prompts": str(lines), "temperature": 1.0, "batch": 4, "max_new_tokens": 8}
    generate.run(asked(folder, tmp_path, **drawn, output=str(tmp_path / "undisturbed.jsonl")))
    monkeypatch.setattr(generate_many, "_KEEP_EVERY", 0.0)
    output = tmp_path / "out.jsonl"
    place, finished = generate_many.place, []

    def killed_after(count):
        def placed(work, what, write, *rest):
            finished.append(sum(map(len, what.finished.values())))
            written = 0

            def count_down(line):
                nonlocal written
                write(line)
                written += 1
                if written > count:
                    raise KeyboardInterrupt

            return place(work, what, count_down, *rest)

        return placed

    for count in (5, 12):
        monkeypatch.setattr(generate_many, "place", killed_after(count))
        with pytest.raises(KeyboardInterrupt):
            generate.run(asked(folder, tmp_path, **drawn, output=str(output)))
        assert not output.exists()
    monkeypatch.setattr(generate_many, "place", killed_after(1000))
    generate.run(asked(folder, tmp_path, **drawn, output=str(output)))
    assert finished == [0, 5, 17]
    assert output.read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()
    assert not (tmp_path / "out.jsonl.unfinished").exists()

    # other settings: nothing of before is of use
    monkeypatch.setattr(generate_many, "place", killed_after(3))
    for seed, before in ((0, 0), (1, 0), (1, 3)):
        with pytest.raises(KeyboardInterrupt):
            generate.run(asked(folder, tmp_path, **drawn, seed=seed, output=str(tmp_path / "other.jsonl")))
        assert finished[-1] == before


def test_prompts_are_read_from_the_terminal_until_the_input_ends(folder, prompts, tmp_path, monkeypatch, capsys):
    typed = ["the house", "the " * 200, "the river"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(typed) + "\n"))
    generate.run(asked(folder, tmp_path, interactive=True))
    first, second = expected(folder, [typed[0], typed[2]], 20)
    printed = capsys.readouterr().out
    assert printed.startswith(first[0] + "\n(max_new_tokens is 20, but after a prompt of ")
    assert printed.endswith(")\n" + second[0] + "\n")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "line 2 of .* has no field prompt"),
        ("a.jsonl", '{"prompt": "a"}\nb\n', "line 2 of .* is not JSON"),
        ("a.jsonl", '{"prompt": "a", "of": "\\ud800"}\n', "line 1 of .* has half of a surrogate pair"),
        ("a.txt", "", "is empty"),
        ("a.txt", "the\n" + "the " * 300, "number 2 has .* at most 77 fit"),
    ],
)
def test_prompts_that_cannot_be_continued_are_named(folder, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(SettingsError, match=message):
        generate.run(asked(folder, tmp_path, prompts=str(tmp_path / name)))
    assert not (tmp_path / "ws" / "generated" / "a.jsonl").exists()


def test_prompts_are_not_replaced_by_their_continuations(folder, tmp_path):
    file = tmp_path / "ws" / "generated" / "a.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text('{"prompt": "a"}\n')
    with pytest.raises(SettingsError, match="which is the file of prompts; name another"):
        generate.run(asked(folder, tmp_path, prompts=str(file)))
    assert file.read_text() == '{"prompt": "a"}\n'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--interactive"], "give one of prompt, prompts and interactive"),
        (["--output", "a"], "output is 'a'; it has to be null without prompts"),
        (["--prompts", "a", "--batch", "0"], "batch is 0; it has to be at least 1, or null"),
    ],
)
def test_settings_that_cannot_work_are_refused(arguments, message, capsys, tmp_path):
    assert main(["generate", *arguments, "--workspace", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
