"""The harness's LM class against the harness's own backend for transformers, on the exported model."""

import gc
import random
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from tokenizers.normalizers import NFC
from tokenizers.processors import TemplateProcessing

from jobs import encoder
from jobs.encoder import Encoder
from jobs.harness import IngotLM
from jobs.local_workers import LocalWorkers, heap_at_rest
from models.config import ModelConfig
from models.generate import Sampling, generate
from models.hugging_face import save_pretrained
from models.transformer import Transformer
from pipelines.tokenizer import TokenizerSettings, train_on_texts

WORDS = "the cat sat on a mat and the dog ran to Rome. What is it? Answer: yes no 12 345\n\nThe end\nA. B, C; def f(x):"
LENGTH = 96


def a_text(rng, words):
    return " ".join(rng.choices(WORDS.split(" "), k=words))


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(1)
    settings = TokenizerSettings(vocab_size=400, reserved_tokens=4)
    return train_on_texts([a_text(rng, 2000)], settings)


@pytest.fixture(scope="module")
def trained(tokenizer):
    config = ModelConfig(
        vocab_size=416, d_model=64, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=96, max_seq_len=LENGTH, qk_norm=True
    )
    model = Transformer(config, seed=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)  # so that the likeliest token changes along a text
    ends = frozenset([tokenizer.eot_id])
    return SimpleNamespace(model=model.eval(), tokenizer=tokenizer, ends=ends, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def theirs(trained, tokenizer, tmp_path_factory):
    from transformers import PreTrainedTokenizerFast

    folder = str(tmp_path_factory.mktemp("exported"))
    save_pretrained(trained.model.state_dict(), trained.model.config, folder, eos_token_id=tokenizer.eot_id)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
        split_special_tokens=False,
    )
    model = HFLM(pretrained=folder, tokenizer=fast, device="cpu", dtype="float32", batch_size=4)
    yield model
    tokenizer.backend.encode_special_tokens = True


@pytest.fixture(scope="module")
def ours(trained, tokenizer):
    return IngotLM(LocalWorkers(trained, tokens_per_batch=400, slots=3), LENGTH)


def ids(tokenizer, text):
    return Encoder(tokenizer).texts([text])[0].tolist()


def instances(*arguments):
    return [SimpleNamespace(args=a, task_name=None) for a in arguments]


def pairs():
    """Questions behind solved examples that they share, alone, truncated, with continuations short and long."""
    rng = random.Random(5)
    shots = a_text(rng, 12) + "\n\n"
    for i in range(6):
        question = shots + a_text(rng, 4) + "\nAnswer:"
        yield from ((question, f" {letter}") for letter in "ABCD")
        yield from ((question, " " + a_text(rng, n)) for n in (1, 3, 5))
        yield a_text(rng, 60 + 5 * i) + " ", "yes no"  # more than the model reads; the space moves to the answer
        yield a_text(rng, 5), "\nThe end"
    yield "", "the cat"
    yield "<|endoftext|>the cat", " sat<|endoftext|>"
    yield "What is", " it? " + a_text(rng, 15)


def test_log_likelihoods_and_greedy_flags_are_those_of_the_harness_backend(ours, theirs):
    requests = instances(*pairs())
    reference, got = theirs.loglikelihood(requests), ours.loglikelihood(requests)
    assert [flag for _, flag in got] == [flag for _, flag in reference]
    torch.testing.assert_close([x for x, _ in got], [x for x, _ in reference], rtol=0, atol=1e-4)


def test_calls_of_several_threads_at_once_give_each_its_own_results(ours):
    workers, requests = ours.workers, list(pairs())
    parts = [requests[start:] + requests[:start] for start in range(0, len(requests), 8)]
    texts = [(text[:40], [], Sampling(6)) for text, _ in requests if text]
    expected = [dict(workers.log_likelihoods(part)) for part in parts], dict(workers.generate(texts))
    with ThreadPoolExecutor(len(parts) + 1) as pool:
        scored = [pool.submit(lambda part=part: dict(workers.log_likelihoods(part))) for part in parts]
        continued = pool.submit(lambda: dict(workers.generate(texts)))
        for one, values in zip(scored, expected[0], strict=True):
            assert one.result() == {index: pytest.approx(value, abs=1e-4) for index, value in values.items()}
        assert continued.result() == expected[1]
    begun = workers.log_likelihoods(parts[0])
    first = next(begun)
    assert dict(workers.generate(texts)) == expected[1]
    assert dict([first, *begun]) == {index: pytest.approx(value, abs=1e-4) for index, value in expected[0][0].items()}


def test_nothing_is_looked_through_for_garbage_until_the_last_is_done():
    with heap_at_rest():
        frozen = gc.get_freeze_count()
        with heap_at_rest():
            assert gc.get_freeze_count() >= frozen > 1000
        assert gc.get_freeze_count() >= frozen
    assert gc.get_freeze_count() < 1000


def test_the_likeliest_continuations_are_known_for_such(trained, tokenizer, ours, theirs):
    rng, asked = random.Random(8), []
    for context in (a_text(rng, 5) for _ in range(40)):
        before = ids(tokenizer, context)
        more = next(generate(trained.model, before, max_new_tokens=1, temperature=0))
        text = tokenizer.backend.decode([more], skip_special_tokens=False)
        if ids(tokenizer, context + text) == [*before, more]:
            asked += [(context, text), (context, "?" if text != "?" else "!")]
    assert len(asked) >= 10
    flags = [flag for _, flag in ours.loglikelihood(instances(*asked))]
    assert flags == [True, False] * (len(asked) // 2)
    assert flags == [flag for _, flag in theirs.loglikelihood(instances(*asked))]


def test_rolling_log_likelihoods_are_those_of_the_harness_backend(ours, theirs):
    rng = random.Random(6)
    requests = instances(*((a_text(rng, words),) for words in (1, 10, 60, 200)))
    reference = theirs.loglikelihood_rolling(requests)
    torch.testing.assert_close(ours.loglikelihood_rolling(requests), reference, rtol=1e-6, atol=1e-4)


def test_greedy_texts_are_those_of_the_harness_backend(ours, theirs):
    rng = random.Random(7)
    prompts = [a_text(rng, words) for words in (1, 2, 5, 9, 9, 14, 60, 80)]
    settings = [
        {"until": ["\n\n", "."], "max_gen_toks": 24, "do_sample": False},
        {"until": "e", "max_gen_toks": 12, "temperature": 0.0},
        {"max_gen_toks": 30},
        {"until": ["</s>"], "max_new_tokens": 5},
    ]
    requests = instances(*((p, dict(s)) for s in settings for p in prompts))
    theirs.batch_size_per_gpu = 1  # in a batch of theirs, a text goes on behind its stop string until all have one
    reference = theirs.generate_until(instances(*((p, dict(s)) for s in settings for p in prompts)))
    got = ours.generate_until(requests)
    assert got == reference
    assert len(set(got)) > len(got) // 2  # else equality would say little


def test_texts_end_before_the_token_that_ends_texts(tokenizer, trained):
    tokens = list(generate(trained.model, ids(tokenizer, "the cat"), max_new_tokens=8, temperature=0))
    at = next(i for i, token in enumerate(tokens) if i and token not in tokens[:i])
    ends = frozenset([tokenizer.eot_id, tokens[at]])
    ending = IngotLM(LocalWorkers(SimpleNamespace(**vars(trained) | {"ends": ends})), LENGTH)
    expected = tokenizer.backend.decode(tokens[:at])
    assert ending.generate_until(instances(("the cat", {"max_gen_toks": 8}))) == [expected]


def test_requests_whose_beginnings_are_cut_are_counted(tokenizer, ours):
    lm = IngotLM(ours.workers, LENGTH)
    context, one = "x" * LENGTH, "x"
    assert [len(ids(tokenizer, text)) for text in (context, one)] == [LENGTH, 1]
    lm.loglikelihood(instances((context, one), (context, one * 2), (context[1:], one * 2)))
    assert (lm.cut, lm.asked) == (1, 3)
    for tokens, cut in ((LENGTH - 4, 1), (LENGTH - 3, 2)):
        text = "x" * tokens
        lm.generate_until(instances((text, {"max_gen_toks": 4})))
        assert lm.cut == cut
    lm.loglikelihood_rolling(instances((text * 2,)))  # in windows, of which none is cut
    assert lm.cut == 2


def test_texts_up_to_the_last_place_of_the_context(trained):
    sampling = Sampling(LENGTH - 19)  # the last token is not read
    ((_, (text, _)),) = LocalWorkers(trained).generate([("x" * 19, [], sampling)])
    tokens = generate(trained.model, ids(trained.tokenizer, "x" * 19), max_new_tokens=LENGTH - 19, temperature=0)
    assert text == trained.tokenizer.backend.decode(list(tokens))


def test_texts_after_a_step_that_failed_are_the_same(trained):
    workers, asked = LocalWorkers(trained), [(a_text(random.Random(9), 30), [], Sampling(8))]
    expected = list(LocalWorkers(trained).generate(asked))
    list(workers.generate([("x" * 30, [], Sampling(8))]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers._engine._decoder, "prompt", lambda *_: 1 / 0)  # such as no memory
        with pytest.raises(ZeroDivisionError):
            list(workers.generate(asked))
    assert list(workers.generate(asked)) == expected


def test_samples_of_one_prompt_differ_and_come_again(ours):
    settings = {"max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    requests = instances(*[("the cat", settings)] * 4)
    first = ours.generate_until(requests)
    assert len(set(first)) > 1
    assert ours.generate_until(requests) == first


def test_what_cannot_be_done_is_refused_by_name(ours):
    with pytest.raises(ValueError, match="96 new tokens.*max_seq_len is 96.*max_gen_toks"):
        ours.generate_until(instances(("the", {"max_gen_toks": 96})))
    with pytest.raises(ValueError, match="num_beams to 4"):
        ours.generate_until(instances(("the", {"num_beams": 4})))


@pytest.mark.parametrize(("kind", "begins"), [("gpt2", False), ("gpt4", False), ("gpt4", True)])
def test_encoding_by_lines_gives_the_ids_of_whole_texts(kind, begins):
    rng = random.Random(0)
    made = train_on_texts([a_text(rng, 500)], TokenizerSettings(vocab_size=350, reserved_tokens=0, pre_tokenizer=kind))
    if begins:  # as Llama 3's tokenizer begins each text
        special = ("<|endoftext|>", made.eot_id)
        made.backend.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[special])
    encode = Encoder(made)
    assert encode.by_lines
    reference = type(made.backend).from_str(made.backend.to_str())
    pieces = [
        "a",
        "Bc",
        " ",
        "\n",
        "\n\n",
        "  ",
        ".",
        "?\n",
        "'s",
        "1234",
        "é",
        "\u0301",
        "\r\n",
        "\t",
        "_\nx",
        "\u2003",
    ]
    for _ in range(1000):
        text = "".join(rng.choices([*pieces, "x\nY", "\x1c", "漢", "<|endoftext|>"], k=rng.randint(1, 14)))
        special = not text.startswith("<|endoftext|>")
        assert encode.texts([text])[0].tolist() == reference.encode(text, add_special_tokens=special).ids
        context, continuation = "?" + text[: len(text) // 2].rstrip(), text[len(text) // 2 :]
        ((before, after),) = encode.pairs([(context, continuation)])
        assert before.tolist() == reference.encode(context).ids
        assert after == reference.encode(context + continuation).ids[len(before) :]


def test_where_lines_cannot_be_apart_texts_are_encoded_whole(monkeypatch):
    monkeypatch.setattr(encoder, "_TEXTS_TOGETHER", 3)
    rng = random.Random(0)
    made = train_on_texts([a_text(rng, 500)], TokenizerSettings(vocab_size=350, reserved_tokens=0))
    made.backend.normalizer = NFC()
    encode = Encoder(made)
    assert not encode.by_lines
    reference = type(made.backend).from_str(made.backend.to_str())
    texts = [a_text(rng, rng.randint(1, 20)) + "e\u0301" for _ in range(20)]
    assert [found.tolist() for found in encode.texts(texts)] == [reference.encode(text).ids for text in texts]
    for (before, after), text in zip(encode.pairs([(text, " yes") for text in texts]), texts, strict=True):
        assert [*before.tolist(), *after] == reference.encode(text + " yes").ids
