"""A model laid out for generation: matrices joined, in the dtype they are computed in, and a preallocated cache of keys
and values with one row for each text.

The same arithmetic as `models.transformer.Transformer`, in few operations. One forward serves prompts (several tokens
of a few rows) and steps (one token of each row). On CUDA a step is compiled and recorded as one CUDA graph of all rows;
its attention reads as many keys as each row has (`models.decode_attention`), so that one graph serves all
lengths.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.decode_attention import decode_attention
from models.kernels import add_norm, on_gpu, rotate_, swiglu
from models.transformer import Linear, Transformer

# Without cuDNN's, which prepares itself for each new length anew. The second takes masks, the last everything.
_CUDA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""From queries, keys and values of these tokens, (N, heads, head_dim), and a layer's cache of keys and of values, to
what the heads give, (N, n_heads · head_dim)."""


class Layer(NamedTuple):
    """Weights of one block, in the compute dtype; norms in fp32."""

    attention_norm: Tensor  # (d_model,)
    w_qkv: Tensor  # ((n_heads + 2·n_kv_heads) · head_dim, d_model)
    q_norm: Tensor | None  # (head_dim,)
    k_norm: Tensor | None
    w_o: Tensor  # (d_model, n_heads · head_dim)
    ffn_norm: Tensor
    w_gate_up: Tensor  # (2·d_ff, d_model)
    w_down: Tensor  # (d_model, d_ff)


class Decoder:
    """A model, a cache of `rows` texts of up to `length` tokens each, and the forward pass over both.

    Where the model's weights have the compute dtype already, joined matrices take their place, so that nothing is held
    twice; the model works on as before.

    Args:
        model: on any device, not sharded.
        rows: texts there is room for.
        length: tokens there is room for in each.
        vocab_size: ids that have logits; None is all.
        compiled: compile a step and record it as a CUDA graph, which takes some ten seconds at the first one.

    Attributes:
        cache: keys and values, (n_layers, 2, rows, places, n_kv_heads, head_dim). Place `length` of each row takes what
            belongs nowhere.
        last: id of the token that each row reads next, (rows,), int64, for who chooses it to set.
    """

    def __init__(self, model: Transformer, rows: int, length: int, vocab_size: int | None, compiled: bool):
        config = model.config
        weight = model.tok_embeddings.weight
        self.device, self.dtype = weight.device, model.compute_dtype or weight.dtype
        self.rows, self.length = rows, length
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.eps, self.output_multiplier = config.norm_eps, model.output_multiplier
        with torch.no_grad():
            self.layers = [self._layer(block) for block in model.layers]
            self.norm = model.norm.weight.detach().float()
            self.embedding = weight.detach().to(self.dtype)
            tied = model.output.weight is weight
            output = self.embedding if tied else model.output.weight.detach().to(self.dtype)
            self.vocab_size = min(vocab_size or len(output), len(output))
            self.output = output[: -(-self.vocab_size // 64) * 64]  # matrix products want even sizes
            cos, sin = model.rotary[:, :length]
            # of both halves of a head, with the sign that a half gets when they are exchanged
            self.cos, self.sin = torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)
            self.places = -(-(length + 1) // 8) * 8  # kernels with a mask want multiples of 8
            # zeros: what is masked is still multiplied by 0, and NaN would stay
            shape = (config.n_layers, 2, rows, self.places, config.n_kv_heads, config.head_dim)
            self.cache = torch.zeros(shape, device=self.device, dtype=self.dtype)
            self.last = torch.zeros(rows, device=self.device, dtype=torch.int64)
        self.compiled = compiled
        self._graph: torch.cuda.CUDAGraph | None = None

    def _layer(self, block: torch.nn.Module) -> Layer:
        attention, ffn = block.attention, block.feed_forward
        return Layer(
            block.attention_norm.weight.detach().float(),
            _join(self.dtype, attention.w_q, attention.w_k, attention.w_v),
            attention.q_norm.weight.detach().float() if attention.qk_norm else None,
            attention.k_norm.weight.detach().float() if attention.qk_norm else None,
            attention.w_o.weight.detach().to(self.dtype),
            block.ffn_norm.weight.detach().float(),
            _join(self.dtype, ffn.w_gate, ffn.w_up),
            ffn.w_down.weight.detach().to(self.dtype),
        )

    def copy(self, sources: list[int], row: int, length: int) -> None:
        """Copy the first `length` places of the source rows to as many rows from `row` on."""
        where = to_device(np.array(sources), self.device)  # with a list, this program would wait for the device
        for layer in self.cache:  # one at a time: what is copied is held twice in between
            layer[:, row : row + len(sources), :length] = layer[:, where, :length]

    def prompt(self, tokens: list[np.ndarray], row: int, starts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Read several texts' next tokens, filling the cache.

        Args:
            tokens: of each text, at least one, integers; that of the first goes to row `row`, and so on.
            row: of the first.
            starts: tokens that each row holds before these.

        Returns:
            As `step`, after the last token of each.
        """
        sizes = np.array([len(t) for t in tokens])
        texts, longest = len(tokens), int(sizes.max())
        padded = np.zeros((texts, longest), np.int64)
        for line, own in zip(padded, tokens, strict=True):
            line[: len(own)] = own
        index, start = np.arange(longest), np.array(starts)[:, None]
        positions = start + index
        # padding is kept out of the way
        places = np.where(index < sizes[:, None], positions, self.length)
        places += np.arange(row, row + texts)[:, None] * self.places
        positions = positions.clip(max=self.length - 1)
        last = np.arange(texts) * longest + sizes - 1
        padded, positions, places, last = (
            to_device(array, self.device) for array in (padded.ravel(), positions, places.ravel(), last)
        )
        # texts from their beginnings on are padded at their ends, so causal attention suffices
        attend = _attend_causally(texts)
        if max(starts) > 0:
            stop = min(self.places, -(-int((sizes + starts).max()) // 8) * 8)
            attend = _attend_cached(row, texts, stop, positions, self)
        return _best(self._head(self._blocks(padded, positions.flatten(), places, attend, asked=last)))

    def step(self, lengths: np.ndarray, running: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Read `last` of each of the first rows, filling the cache.

        Args:
            lengths: tokens that each row holds before it, (n,).
            running: whether a row reads its token, (n,), bool; what is told of the others means nothing.

        Returns:
            Logits, (n, vocab), their maximum's index, (n,), and the logarithm of the sum of their exponentials, fp32,
            (n,): where steps are recorded of all rows, valid until the next one begins.
        """
        positions = np.where(running, lengths, 0)
        places = np.where(running, lengths, self.length) + np.arange(len(lengths)) * self.places
        if self.compiled and decode_attention is not None:
            return self._recorded_step(positions, places)
        rows, longest = len(lengths), int(positions.max()) + 1
        same = bool(running.all()) and int(positions.min()) + 1 == longest
        positions, places = to_device(positions, self.device), to_device(places, self.device)
        if same:
            attend = _attend_cached(0, rows, longest, None, self)
        else:
            stop = min(self.places, -(-longest // 8) * 8)
            attend = _attend_cached(0, rows, stop, positions[:, None], self)
        return _best(self._head(self._blocks(self.last[:rows], positions, places, attend)))

    def _blocks(
        self, tokens: Tensor, positions: Tensor, places: Tensor, attend: Attend, parts: "Parts | None" = None,
        asked: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The residual stream after all blocks, (N, d_model), of N tokens of any rows, or of those asked for alone."""
        before, between, after = parts or (_before, _between, _after)
        shape = (self.n_heads, self.n_kv_heads, self.head_dim, self.eps)
        cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        x, q, k, v = before(F.embedding(tokens, self.embedding), None, self.layers[0], cos, sin, shape)
        for i, layer in enumerate(self.layers):
            keys, values = self.cache[i]
            keys.flatten(0, 1).index_copy_(0, places, k)
            values.flatten(0, 1).index_copy_(0, places, v)
            mixed = attend(q, k, v, keys, values)
            if i + 1 < len(self.layers):
                x, q, k, v = between(x, mixed, layer, self.layers[i + 1], cos, sin, shape)
        if asked is not None:
            x, mixed = x[asked], mixed[asked]
        return torch.add(*after(x, mixed, self.layers[-1], self.eps))

    def _head(self, x: Tensor) -> Tensor:
        x = _rms_norm(x, self.norm, self.eps)
        if self.output_multiplier != 1:  # muP
            x = x * self.output_multiplier
        return F.linear(x, self.output)[:, : self.vocab_size]

    def _record(self) -> None:
        """Compile a step of all rows, and record it as a graph."""
        # positions and places; of rows without a text one where nothing is read
        self._given = torch.zeros((2, self.rows), dtype=torch.int64, device=self.device)
        self._idle = np.arange(self.rows) * self.places + self.length
        self._given[1] = to_device(self._idle, self.device)
        parts: Parts = tuple(torch.compile(part, dynamic=False) for part in (_before, _between, _after))
        best = torch.compile(_best, dynamic=False)

        def step() -> tuple[Tensor, Tensor, Tensor]:
            lengths = self._given[0] + 1

            def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
                return decode_attention(q, keys, values, lengths).flatten(1)

            return best(self._head(self._blocks(self.last, *self._given, attend, parts)))

        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        # what is compiled and chosen at first use is not to be recorded; each engine of a process is a compilation more
        with torch.cuda.stream(stream), torch._dynamo.config.patch(recompile_limit=1000):
            for _ in range(3):
                step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._results = step()

    def _recorded_step(self, positions: np.ndarray, places: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        if self._graph is None:
            self._record()
        given = np.stack([np.zeros_like(self._idle), self._idle])
        given[:, : len(places)] = positions, places
        self._given.copy_(torch.from_numpy(given).pin_memory(), non_blocking=True)
        self._graph.replay()
        return self._results


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor of an array, on its way to the device without this program waiting."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


Parts = tuple[Callable[..., tuple[Tensor, ...]], ...]


def _join(dtype: torch.dtype, *linears: Linear) -> Tensor:
    """The matrices of linear layers that read the same input, below each other, (sum of d_out, d_in)."""
    weights = [linear.weight.detach() for linear in linears]
    if weights[0].dtype != dtype:
        return torch.cat([weight.to(dtype) for weight in weights])
    sizes = [len(weight) for weight in weights]
    ends = [weight.data_ptr() + weight.nbytes for weight in weights]
    first = weights[0]
    memory = first.untyped_storage()
    adjacent = all(
        w.data_ptr() == end and w.untyped_storage().data_ptr() == memory.data_ptr()
        for w, end in zip(weights[1:], ends, strict=False)
    )
    if adjacent:  # by an earlier call
        return first.as_strided((sum(sizes), first.shape[1]), (first.shape[1], 1))
    whole = torch.cat(weights)
    for linear, part in zip(linears, whole.split(sizes), strict=True):
        linear.weight.data = part
    return whole


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)


def _added(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum of both, and its norm."""
    if delta is None:
        return x, _rms_norm(x, weight, eps)
    if _by_kernel(x):
        return add_norm(x, delta, weight, eps)
    x = x + delta
    return x, _rms_norm(x, weight, eps)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`models.transformer.rotate` of heads, (N, heads, head_dim), with rows of `Decoder.cos` and `Decoder.sin`."""
    half = x.shape[-1] // 2
    if _by_kernel(x):
        return rotate_(x, cos[:, 0, :half], sin[:, 0, half:])
    wide = x.float()
    return (wide * cos).addcmul(wide.roll(half, -1), sin).to(x.dtype)


def _by_kernel(x: Tensor) -> bool:
    """Whether nobody compiles this, so that a kernel is better than single operations."""
    return on_gpu(x) and not torch.compiler.is_compiling()


def _before(
    x: Tensor, delta: Tensor | None, layer: Layer, cos: Tensor, sin: Tensor, shape: tuple[int, int, int, float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The residual stream, (N, d_model), with what is added to it, and its queries, keys and values, (N, heads,
    head_dim).
    """
    n_heads, n_kv_heads, head_dim, eps = shape
    x, normed = _added(x, delta, layer.attention_norm, eps)
    heads = F.linear(normed, layer.w_qkv).unflatten(-1, (-1, head_dim))
    v = heads[:, n_heads + n_kv_heads :]
    if layer.q_norm is None:
        q, k = _rotated(heads[:, : n_heads + n_kv_heads], cos, sin).split([n_heads, n_kv_heads], dim=1)
        return x, q, k, v
    q, k = heads[:, :n_heads], heads[:, n_heads : n_heads + n_kv_heads]
    q, k = _rms_norm(q, layer.q_norm, eps), _rms_norm(k, layer.k_norm, eps)
    return x, _rotated(q, cos, sin), _rotated(k, cos, sin), v


def _after(x: Tensor, mixed: Tensor, layer: Layer, eps: float) -> tuple[Tensor, Tensor]:
    """The residual stream after a block's attention, which gave `mixed`, (N, n_heads · head_dim), and what its
    feed-forward layer adds to it.
    """
    x, normed = _added(x, F.linear(mixed, layer.w_o), layer.ffn_norm, eps)
    gate_up = F.linear(normed, layer.w_gate_up)
    if _by_kernel(x):
        hidden = swiglu(gate_up)
    else:
        gate, up = gate_up.chunk(2, dim=-1)
        hidden = F.silu(gate) * up
    return x, F.linear(hidden, layer.w_down)


def _between(
    x: Tensor, mixed: Tensor, layer: Layer, following: Layer, cos: Tensor, sin: Tensor,
    shape: tuple[int, int, int, float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """From the attention of one block to that of the next."""
    return _before(*_after(x, mixed, layer, shape[-1]), following, cos, sin, shape)


def _best(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return logits, logits.argmax(-1), logits.float().logsumexp(-1)


def _attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, **options)
    with sdpa_kernel(_CUDA_BACKENDS, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, **options)


def _attend_causally(texts: int) -> Attend:
    """Attention of texts to themselves alone, padded at their ends to the same length."""

    def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (texts, -1)).transpose(1, 2) for x in (q, k, v))
        out = _attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

    return attend


def _attend_cached(row: int, texts: int, stop: int, positions: Tensor | None, decoder: Decoder) -> Attend:
    """Attention of texts in rows row, row + 1 … to the first `stop` places of the cache, up to each one's position.

    Args:
        row: of the first text.
        texts: their number.
        stop: places to attend to at most.
        positions: of the queries, (texts, T); None is one query each, to all `stop` places.
        decoder: whose cache it is.
    """
    group = decoder.n_heads // decoder.n_kv_heads
    mask = None
    if positions is not None:
        hidden = torch.arange(stop, device=decoder.device) > positions[:, None, :, None]
        mask = torch.zeros(hidden.shape, dtype=decoder.dtype, device=decoder.device).masked_fill_(hidden, -torch.inf)
        if positions.shape[1] > 1:
            mask = mask.repeat(1, 1, group, 1)

    # heads that share keys are further queries of them: keys are read once, and no kernel needs to know groups
    def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q = q.view(texts, -1, k.shape[1], group, q.shape[2]).permute(0, 2, 3, 1, 4)
        keys, values = (x[row : row + texts, :stop].transpose(1, 2) for x in (keys, values))
        out = _attention(q.flatten(2, 3), keys, values, attn_mask=mask)
        return out.unflatten(2, q.shape[2:4]).permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)

    return attend
