"""Text from a model: a key-value cache and sampling, one token at a time."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from models.config import ModelConfig
from models.transformer import Transformer


class LayerCache:
    """Keys and values of one layer, in memory that is allocated once.

    Args:
        shape: (batch, n_kv_heads, longest length, head_dim).
        device: where the model is.
        dtype: what the model's attention computes in.
    """

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype):
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values, (batch, n_kv_heads, T, head_dim), and return all so far."""
        stop = self.length + keys.shape[2]
        self.keys[:, :, self.length : stop] = keys
        self.values[:, :, self.length : stop] = values
        self.length = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]


class KVCache:
    """What attention needs of the tokens that a model has seen: 2 · n_layers · n_kv_heads · head_dim numbers each.

    Args:
        config: shape of the model.
        batch: sequences that are generated together.
        length: tokens there is room for.
        device: where the model is.
        dtype: what the model computes in.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        shape = (batch, config.n_kv_heads, length, config.head_dim)
        self.layers = [LayerCache(shape, torch.device(device), dtype) for _ in range(config.n_layers)]

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return self.layers[0].length


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token id from logits, (vocab,).

    Temperature 0 takes the likeliest. Otherwise the draw is from the smallest set of likeliest tokens whose
    probabilities sum to `top_p` or more (nucleus sampling, Holtzman et al. 2020). It runs on the CPU, so that a
    seed gives the same text on any device with the same logits.
    """
    logits = logits.float().cpu()
    if temperature == 0:
        return int(logits.argmax())
    probabilities, tokens = torch.softmax(logits / temperature, dim=0).sort(descending=True, stable=True)
    before = probabilities.cumsum(0) - probabilities
    probabilities[(before >= top_p) & (before > 0)] = 0.0
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


def generate(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: set[int] | frozenset[int] = frozenset(),
    vocab_size: int | None = None,
) -> Iterator[int]:
    """Continue a prompt, yielding each token id as soon as it is known.

    Args:
        model: on any device, not sharded.
        prompt: token ids; at least one.
        max_new_tokens: at most this many are generated.
        temperature: divides the logits; 0 is greedy.
        top_p: nucleus of the distribution to draw from, in (0, 1].
        seed: of the draws.
        stop: ids that end the text; the one that does is not yielded.
        vocab_size: only ids below this are drawn: the tokenizer's, when the embedding has more rows; None is all.

    Raises:
        ValueError: at the call, for an empty prompt, settings out of range, or a text longer than max_seq_len.
    """
    config = model.config
    if not prompt:
        raise ValueError("the prompt is empty; give at least one token, such as <|endoftext|>")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, but must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}, but must be at least 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, but must be above 0 and at most 1")
    # the last token is not fed back
    length = len(prompt) + max_new_tokens - 1
    if length > config.max_seq_len:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens}, but after a prompt of {len(prompt)} tokens must be at most "
            f"{max(0, config.max_seq_len + 1 - len(prompt))}: the model's max_seq_len is {config.max_seq_len}"
        )
    return _generate(model, list(prompt), max_new_tokens, temperature, top_p, seed, stop, vocab_size)


def _generate(
    model: Transformer,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    stop: set[int] | frozenset[int],
    vocab_size: int | None,
) -> Iterator[int]:
    weight = model.tok_embeddings.weight
    cache = KVCache(
        model.config, 1, len(prompt) + max_new_tokens - 1, weight.device, model.compute_dtype or weight.dtype
    )
    generator = torch.Generator().manual_seed(seed)
    tokens = prompt
    for _ in range(max_new_tokens):
        # entered anew for each token: a generator that yields inside would leave its caller in inference mode
        with torch.inference_mode():
            last = torch.tensor([len(tokens) - 1], device=weight.device)
            logits = model(torch.tensor([tokens], device=weight.device), cache=cache, positions=last)[0]
        token = choose(logits[:vocab_size], temperature, top_p, generator)
        if token in stop:
            return
        yield token
        tokens = [token]
