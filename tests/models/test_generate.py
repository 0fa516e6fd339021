"""Generation against transformers' and against full recomputation, and sampling against its probabilities."""

import random
from dataclasses import replace

import pytest
import torch
import transformers

import models.generate
from models.config import ModelConfig
from models.generate import Engine, Sampling, choose, generate
from models.hugging_face import save_pretrained
from models.transformer import Transformer

TINY = ModelConfig(vocab_size=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=32)


def sharpened(config, seed):
    """A model whose initial weights are large enough for the likeliest token to change along the text."""
    model = Transformer(config, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
    return model


@pytest.mark.parametrize("n_kv_heads", [4, 1])
def test_greedy_text_equals_full_recomputation(n_kv_heads):
    model = sharpened(replace(TINY, n_kv_heads=n_kv_heads), seed=2)
    expected = [5, 7, 11]
    with torch.no_grad():
        for _ in range(20):
            expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    assert list(generate(model, [5, 7, 11], max_new_tokens=20, temperature=0)) == expected[3:]
    assert len(set(expected[3:])) > 5  # else the comparison would say little


def test_a_seed_gives_the_same_text_and_another_seed_another():
    model = Transformer(TINY, seed=1)
    first, again, other = (
        list(generate(model, [1, 2], max_new_tokens=20, temperature=1.0, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert len(first) == 20


def test_it_ends_before_a_stop_token():
    model = sharpened(TINY, seed=2)
    text = list(generate(model, [5, 7, 11], max_new_tokens=20, temperature=0))
    stop = text[6]
    assert list(generate(model, [5, 7, 11], max_new_tokens=20, temperature=0, stop={stop})) == text[: text.index(stop)]


def test_ids_beyond_the_vocabulary_are_never_drawn():
    model = Transformer(TINY, seed=1)
    text = list(generate(model, [1], max_new_tokens=30, temperature=5.0, vocab_size=4))
    assert set(text) == {0, 1, 2, 3}


def test_the_last_place_of_the_context_is_used_and_no_more():
    model = Transformer(TINY, seed=1)
    assert len(list(generate(model, [1] * 32, max_new_tokens=1))) == 1
    with pytest.raises(ValueError, match="at most 1"):
        generate(model, [1] * 32, max_new_tokens=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": []}, "prompt is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_impossible_settings_are_refused_at_the_call(settings, message):
    settings = {"prompt": [1], "max_new_tokens": 2, **settings}
    with pytest.raises(ValueError, match=message):
        generate(Transformer(TINY), **settings)


def drawn(logits, temperature, top_p, uniform):
    rows = len(uniform)
    return choose(logits.expand(rows, -1), torch.full((rows,), temperature), torch.full((rows,), top_p), uniform)


def frequencies(logits, temperature, top_p, draws=20000):
    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(0))
    return torch.bincount(drawn(logits, temperature, top_p, uniform), minlength=len(logits)) / draws


def test_draws_follow_the_tempered_softmax():
    logits = torch.tensor([1.0, 3.0, 0.0, 2.0])
    expected = torch.softmax(logits / 1.7, dim=0)
    torch.testing.assert_close(frequencies(logits, 1.7, 1.0), expected, rtol=0, atol=0.015)


def test_nucleus_is_the_smallest_set_that_reaches_top_p():
    probabilities = torch.tensor([0.1, 0.5, 0.15, 0.25])
    nucleus = torch.tensor([0.0, 0.5, 0.0, 0.25]) / 0.75
    torch.testing.assert_close(frequencies(probabilities.log(), 1.0, 0.7), nucleus, rtol=0, atol=0.015)


def test_a_temperature_of_all_but_zero_is_the_likeliest_token():
    logits = torch.tensor([[1.0, 80.0, 79.0]])
    for temperature in (1e-5, 1e-39, 1e-60):  # the last two are no numbers of fp32 that divide
        for uniform in (0.0, 1.0):
            drawn = choose(logits, torch.tensor([temperature]), torch.tensor([1.0]), torch.tensor([uniform]))
            assert drawn.tolist() == [1]


def test_a_tiny_nucleus_is_the_likeliest_token():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(3))
    assert set(drawn(logits, 1.0, 1e-9, torch.linspace(0, 1 - 2**-24, 50)).tolist()) == {int(logits.argmax())}


# The engine


def in_transformers(model, folder):
    """The same model as transformers' own."""
    save_pretrained(model.state_dict(), model.config, str(folder))
    return transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()


def greedy(theirs, prompt, max_new_tokens, stop=None):
    """transformers' greedy continuation of one prompt, without the id that ends it."""
    ids = theirs.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), pad_token_id=0,
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stop,
    )[0, len(prompt) :].tolist()  # fmt: skip
    return ids[: ids.index(stop)] if stop in ids else ids


def prompts(count, longest=20, seed=0):
    """Random prompts of 1 to `longest` tokens."""
    draws = random.Random(seed)
    return [[draws.randrange(61) for _ in range(draws.randint(1, longest))] for _ in range(count)]


def texts(engine, requests):
    """What an engine says to (prompt, sampling) pairs, all submitted at once."""
    numbers = [engine.submit(*request) for request in requests]
    said = {number: [] for number in numbers}
    while engine.busy:
        for token in engine.step():
            said[token.request].append(token)
    assert all(tokens[-1].finished and not any(t.finished for t in tokens[:-1]) for tokens in said.values())
    return [[t.token for t in said[number] if t.token is not None] for number in numbers]


@pytest.fixture(params=[0, 1], ids=["", "ahead"])
def ahead(request, monkeypatch):
    """Also as on a GPU, which works on a step before the tokens of the last one are looked at."""
    monkeypatch.setitem(models.generate._AHEAD, "cpu", request.param)


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mup"])
def test_texts_that_come_and_go_are_transformers_greedy_texts(tmp_path, n_kv_heads, kind):
    shape = {"llama": {}, "qwen3": {"qk_norm": True, "tied_embeddings": True}, "mup": {"base_width": 16}}[kind]
    model = sharpened(replace(TINY, n_kv_heads=n_kv_heads, **shape), seed=1)
    theirs = in_transformers(model, tmp_path)
    draws = random.Random(1)
    asked = [(p, Sampling(draws.randint(1, 12), stop=frozenset({7}))) for p in prompts(24)]
    engine = Engine(model, slots=5)
    said, numbers, most = {}, {}, 0
    while asked or engine.busy:
        for _ in range(min(len(asked), draws.choice([0, 0, 1, 3, 9]))):  # some come while others are under way
            request = asked.pop()
            numbers[engine.submit(*request)] = request
        for token in engine.step():
            said.setdefault(token.request, []).append(token)
        most = max(most, engine.active)
    assert most == 5
    for number, (prompt, sampling) in numbers.items():
        expected = greedy(theirs, prompt, sampling.max_new_tokens, stop=7)
        assert [t.token for t in said[number] if t.token is not None] == expected
        assert said[number][-1].finished == ("length" if len(expected) == sampling.max_new_tokens else "stop")
        assert all(t.finished is None for t in said[number][:-1])
    assert len({tuple(t.token for t in tokens) for tokens in said.values()}) > 15  # else equality would say little


@pytest.mark.usefixtures("ahead")
def test_log_probabilities_are_those_of_the_whole_sequence(tmp_path):
    model = sharpened(TINY, seed=1)
    theirs = in_transformers(model, tmp_path)
    engine = Engine(model, slots=3, vocab_size=59)
    asked = {
        engine.submit(p, Sampling(9, temperature=t)): p for p, t in zip(prompts(6), [0, 1, 0, 3, 1, 0], strict=True)
    }
    said = {number: [] for number in asked}
    while engine.busy:
        for token in engine.step():
            said[token.request].append(token)
    for number, prompt in asked.items():
        ids = [t.token for t in said[number]]
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1, :59]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor([t.log_probability for t in said[number]]), expected, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("ahead")
def test_a_text_does_not_depend_on_who_shares_the_batch():
    model = sharpened(TINY, seed=2)
    requests = [
        (p, Sampling(11, temperature=i % 3, top_p=[1.0, 0.9][i % 2], seed=i)) for i, p in enumerate(prompts(20))
    ]
    alone = [texts(Engine(model, slots=1), [request])[0] for request in requests]
    assert texts(Engine(model, slots=7), requests) == alone
    assert texts(Engine(model, slots=20), requests[::-1])[::-1] == alone
    by_iterator = [
        list(generate(model, p, max_new_tokens=11, temperature=s.temperature, top_p=s.top_p, seed=s.seed))
        for p, s in requests
    ]
    assert by_iterator == alone


@pytest.mark.usefixtures("ahead")
def test_prompts_that_begin_alike_read_the_beginning_once_and_give_the_same_text(tmp_path):
    model = sharpened(replace(TINY, max_seq_len=128), seed=3)
    theirs = in_transformers(model, tmp_path)
    first, second = ([random.Random(s).randrange(61) for _ in range(60)] for s in (1, 2))
    ends = prompts(16, longest=9, seed=4)
    asked = [(first if i % 3 else second) + end for i, end in enumerate(ends)]
    asked += [first + ends[1] + [3, 4], first, [*first[:40], 5], asked[0]]
    engine = Engine(model, slots=4)
    read = []
    prompt = engine._decoder.prompt
    engine._decoder.prompt = lambda tokens, *rest: read.extend(map(len, tokens)) or prompt(tokens, *rest)
    said = texts(engine, [(p, Sampling(10)) for p in asked])
    assert said == [greedy(theirs, p, 10) for p in asked]
    assert sum(read) < 2 * 60 + 20 * 20 < sum(map(len, asked))


@pytest.mark.usefixtures("ahead")
def test_a_text_that_moves_before_its_first_token_came_leaves_no_beginning_with_another_token():
    model = sharpened(TINY, seed=3)
    first = prompts(1, longest=1)[0] * 17
    engine = Engine(model, slots=2)
    engine.submit([5], Sampling(2))
    engine.submit([*first, 3, 4], Sampling(1))
    engine.step()
    engine.submit(first, Sampling(8))  # takes the row of what ended, and within a step moves to the one before
    engine.step()
    last = ([*first, 3, 4, 5], Sampling(8))
    number, said = engine.submit(*last), []
    while engine.busy:
        said += [t.token for t in engine.step() if t.request == number]
    assert [said] == texts(Engine(model, slots=1), [last])


@pytest.mark.usefixtures("ahead")
def test_a_cancelled_text_gives_nothing_more_and_leaves_the_others_alone():
    model = sharpened(TINY, seed=2)
    requests = [(p, Sampling(12)) for p in prompts(6)]
    expected = texts(Engine(model, slots=3), requests)
    engine = Engine(model, slots=3)
    numbers = [engine.submit(*request) for request in requests]
    said = {number: [] for number in numbers}
    for _ in range(3):
        for token in engine.step():
            said[token.request].append(token.token)
    engine.cancel(numbers[0])
    engine.cancel(numbers[5])  # waits still
    engine.cancel(12345)
    before = list(said[numbers[0]])
    assert (engine.active, engine.waiting) == (2, 2)
    while engine.busy:
        for token in engine.step():
            said[token.request].append(token.token)
    assert said[numbers[0]] == before
    assert said[numbers[5]] == []
    assert [said[number] for number in numbers[1:5]] == expected[1:5]


def test_an_engine_leaves_the_model_as_it_is_and_holds_its_weights_once():
    model = sharpened(TINY, seed=2)
    tokens = torch.tensor([prompts(1)[0]])
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    logits = model(tokens)
    first, second = Engine(model, slots=1), Engine(model, slots=2)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(model(tokens), logits, rtol=0, atol=0)
    layer = model.layers[1]
    for engine in (first, second):
        joined = engine._decoder.layers[1]
        assert joined.w_qkv.data_ptr() == layer.attention.w_q.weight.data_ptr()
        assert joined.w_gate_up.data_ptr() == layer.feed_forward.w_gate.weight.data_ptr()


def test_an_engine_refuses_what_does_not_fit():
    model = Transformer(TINY)
    with pytest.raises(ValueError, match="slots is 0"):
        Engine(model, slots=0)
    with pytest.raises(ValueError, match="max_seq_len 32"):
        Engine(model, length=33)
    with pytest.raises(ValueError, match="at most 3"):
        Engine(model, length=8).submit([1] * 6, Sampling(4))
