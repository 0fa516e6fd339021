"""Generation with a cache against full recomputation, and sampling against the probabilities it must follow."""

from dataclasses import replace

import pytest
import torch

from models.config import ModelConfig
from models.generate import KVCache, choose, generate
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


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("pieces", [[9], [1] * 9, [4, 3, 2], [1, 8]])
def test_logits_with_a_cache_equal_those_of_the_whole_sequence(n_kv_heads, pieces):
    model = sharpened(replace(TINY, n_kv_heads=n_kv_heads, qk_norm=n_kv_heads == 2), seed=1)
    tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    cache = KVCache(model.config, 2, 9)
    with torch.no_grad():
        cached = torch.cat([model(piece, cache=cache) for piece in tokens.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(cached, model(tokens), rtol=1e-4, atol=1e-4)
    assert cache.length == 9


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


def frequencies(logits, temperature, top_p, draws=20000):
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(len(logits))
    for _ in range(draws):
        counts[choose(logits, temperature, top_p, generator)] += 1
    return counts / draws


def test_draws_follow_the_tempered_softmax():
    logits = torch.tensor([1.0, 3.0, 0.0, 2.0])
    expected = torch.softmax(logits / 1.7, dim=0)
    torch.testing.assert_close(frequencies(logits, 1.7, 1.0), expected, rtol=0, atol=0.015)


def test_nucleus_is_the_smallest_set_that_reaches_top_p():
    probabilities = torch.tensor([0.1, 0.5, 0.15, 0.25])
    nucleus = torch.tensor([0.0, 0.5, 0.0, 0.25]) / 0.75
    torch.testing.assert_close(frequencies(probabilities.log(), 1.0, 0.7), nucleus, rtol=0, atol=0.015)


def test_a_tiny_nucleus_is_the_likeliest_token():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(0)
    assert {choose(logits, 1.0, 1e-9, generator) for _ in range(50)} == {int(logits.argmax())}
