"""Log-likelihoods of continuations, each distinct prefix of the requests computed once.

Requests that begin alike, such as the questions of a subject behind the same solved examples, are the branches of a
tree. A batch is a part of the forest of all requests, packed without padding: the tokens of a node once, then what
continues it. A token attends within its node, and to each node above it without a mask, all queries below a node at
once; the parts are merged by their log-sum-exps. This is exact attention, as in Hydragen (Juravsky et al. 2024) and
FlashInfer's cascades (Ye et al. 2024), with any number of levels and no cache that outlives the batch. The last layer's
output, the final norm and the head are computed where a token is asked for alone.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from models.decoder import to_device
from models.kernels import on_gpu, rotate_, swiglu
from models.loss import default_chunk
from models.prefix_tree import Batch, Request, Segment, batches
from models.transformer import Transformer, rotate

# tokens whose wide activations exist at one time: on the CPU they stay in its cache, on a GPU they need not much memory
_ROWS, _ROWS_ON_CPU = 16384, 1024

Score = tuple[int, float, bool]
"""Index of a request, the sum of the log-probabilities of its continuation's tokens in nats, and whether each of these
is the likeliest."""

_Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of a batch's tokens: queries, keys and values, (N, heads, head_dim) each, to (N, n_heads, head_dim)."""


class Scorer:
    """Scores continuations, in an order that shares work; several threads may do so at the same time.

    Args:
        model: on any device, not sharded; its matrices are copied where they compute in another dtype.
        turn: makes what is entered while a batch is computed, such as a lock, so that there are the activations of one.
            What comes before and after is outside: of two threads, one sees to the next batch while the device computes
            that of the other.
        vocab_size: probabilities are over the ids below this; None is all rows of the embedding.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        turn: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        vocab_size: int | None = None,
    ):
        self._model, self._turn, self._vocab_size = model, turn, vocab_size
        with torch.inference_mode():
            self._weights = [_Layer.of(model, i) for i in range(len(model.layers))]
            self._head = model.output.weight.to(model.compute_dtype or model.output.weight.dtype)

    def log_likelihoods(self, requests: Sequence[Request], *, tokens_per_batch: int) -> Iterator[Score]:
        """Score requests; the results come as they are ready.

        Args:
            requests: contexts and continuations; both together, less the last token, are at most max_seq_len tokens.
            tokens_per_batch: tokens that are computed together; a longer sequence is a batch of its own.

        Raises:
            ValueError: a request is empty, too long, or has ids outside the vocabulary.
        """
        if not requests:
            return
        config = self._model.config
        before: _Results | None = None
        for batch in batches(
            requests,
            tokens_per_batch,
            max_seq_len=config.max_seq_len,
            vocab_size=config.vocab_size,
            targets_below=self._vocab_size,
        ):
            with self._turn(), torch.inference_mode():
                results = _score(self._model, self._weights, self._head, batch, self._vocab_size)
            # an accelerator is given its next batch before its last one's results are waited for
            if before is not None:
                yield from before.read()
            before = results
        if before is not None:
            yield from before.read()


@dataclass
class _Layer:
    """Matrices of one block in the dtype they compute in; on an accelerator those of the same input are joined."""

    qkv: list[Tensor]
    out: Tensor
    gate_up: list[Tensor]
    down: Tensor

    @classmethod
    def of(cls, model: Transformer, index: int) -> "_Layer":
        block = model.layers[index]
        attention, ffn = block.attention, block.feed_forward
        dtype = model.compute_dtype or attention.w_q.weight.dtype
        q, k, v, out, gate, up, down = (
            linear.weight.to(dtype)
            for linear in (
                attention.w_q, attention.w_k, attention.w_v, attention.w_o, ffn.w_gate, ffn.w_up, ffn.w_down,
            )
        )  # fmt: skip
        if q.is_cuda:
            return cls([torch.cat([q, k, v])], out, [torch.cat([gate, up])], down)
        return cls([q, k, v], out, [gate, up], down)

    def heads(self, x: Tensor, head_dim: int, sizes: Sequence[int]) -> list[Tensor]:
        """Queries, keys and values, (N, heads, head_dim), of x, (N, d_model)."""
        parts = (
            F.linear(x, self.qkv[0]).split(list(sizes), dim=-1)
            if len(self.qkv) == 1
            else [F.linear(x, w) for w in self.qkv]
        )
        return [part.unflatten(-1, (-1, head_dim)) for part in parts]

    def feed_forward(self, x: Tensor) -> Tensor:
        """SwiGLU of x, (N, d_model)."""
        if len(self.gate_up) == 1:
            return torch.cat([F.linear(swiglu(F.linear(rows, self.gate_up[0])), self.down) for rows in x.split(_ROWS)])
        gate, up = self.gate_up
        parts = (F.silu(F.linear(rows, gate)).mul_(F.linear(rows, up)) for rows in x.split(_ROWS_ON_CPU))
        return torch.cat([F.linear(part, self.down) for part in parts])


class _Results:
    """Results of a batch, on their way from the device."""

    def __init__(self, requests: np.ndarray, log_probabilities: Tensor, likeliest: Tensor):
        self.requests = requests
        self.done = None
        if log_probabilities.is_cuda:
            log_probabilities = log_probabilities.to("cpu", non_blocking=True)
            likeliest = likeliest.to("cpu", non_blocking=True)
            self.done = torch.cuda.Event()
            self.done.record()
        self.log_probabilities, self.likeliest = log_probabilities, likeliest

    def read(self) -> Iterator[Score]:
        if self.done is not None:
            self.done.synchronize()
        numbers, of = np.unique(self.requests, return_inverse=True)
        sums = np.bincount(of, self.log_probabilities.double().numpy())
        misses = np.bincount(of, ~self.likeliest.numpy())
        yield from zip(numbers.tolist(), sums.tolist(), (misses == 0).tolist(), strict=True)


def _score(model: Transformer, weights: list[_Layer], head: Tensor, batch: Batch, vocab_size: int | None) -> _Results:
    device = head.device
    tokens, positions, asked, after, targets = (
        to_device(array, device) for array in (batch.tokens, batch.positions, batch.asked, batch.after, batch.targets)
    )
    hidden = _hidden(model, weights, tokens, positions, asked, _attention(batch, head, model))
    log_probabilities, likeliest = [], []
    chunk = default_chunk(device, len(head))
    for start in range(0, len(hidden), chunk):
        logits = F.linear(hidden[start : start + chunk], head)[:, :vocab_size].float()
        low, high = np.searchsorted(batch.after, (start, start + chunk)).tolist()
        row, target = after[low:high] - start, targets[low:high]
        log_probabilities.append(logits[row, target] - logits.logsumexp(1)[row])
        likeliest.append(logits.argmax(1)[row] == target)
    return _Results(batch.requests, torch.cat(log_probabilities), torch.cat(likeliest))


def _hidden(
    model: Transformer, weights: list[_Layer], tokens: Tensor, positions: Tensor, asked: Tensor, attend: _Attention
) -> Tensor:
    """What the output layer reads after the tokens `asked`, (P, d_model)."""
    rotary = model.rotary[:, positions]
    x, delta = model.embed(tokens)
    for i, (block, layer) in enumerate(zip(model.layers, weights, strict=True)):
        attention = block.attention
        x, normed = block.attention_norm.add(x, delta)
        sizes = [len(w.weight) for w in (attention.w_q, attention.w_k, attention.w_v)]
        q, k, v = layer.heads(normed, attention.head_dim, sizes)
        if attention.qk_norm:
            q, k = attention.q_norm(q), attention.k_norm(k)
        if on_gpu(q):
            q, k = (rotate_(part, *rotary) for part in (q, k))
        else:
            q, k = (rotate(part, rotary) for part in (q, k))
        mixed = attend(q, k, v).flatten(1)
        if i == len(weights) - 1:
            x, mixed = x[asked], mixed[asked]
        x, normed = block.ffn_norm.add(x, F.linear(mixed, layer.out))
        delta = layer.feed_forward(normed)
    return model.last_norm(x, delta)


def _attention(batch: Batch, like: Tensor, model: Transformer) -> _Attention:
    flash = like.is_cuda and like.dtype in (torch.bfloat16, torch.float16) and model.config.head_dim % 8 == 0
    return (_Packed if flash and model.config.head_dim <= 256 else _Padded)(batch, like.device)


class _Packed:
    """By FlashAttention-2's kernel for sequences of different lengths (Dao 2023), one call a level."""

    def __init__(self, batch: Batch, device: torch.device):
        self.device = device
        self.nodes = self._lengths(batch.nodes)
        self.levels = []
        for level in batch.levels:
            below, above = [q for q, _ in level], [k for _, k in level]
            self.levels.append((self._rows(below), self._rows(above), *self._lengths(below), *self._lengths(above)))

    def _lengths(self, segments: list[Segment]) -> tuple[Tensor, int]:
        lengths = np.array([stop - start for start, stop in segments])
        ends = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
        return to_device(ends, self.device), int(lengths.max())

    def _rows(self, segments: list[Segment]) -> slice | Tensor:
        if all(a[1] == b[0] for a, b in itertools.pairwise(segments)):
            return slice(segments[0][0], segments[-1][1])
        return to_device(np.concatenate([np.arange(*segment) for segment in segments]), self.device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ends, longest = self.nodes
        out, lse = _flash(q, k, v, ends, ends, longest, longest, causal=True)
        for below, above, q_ends, q_longest, k_ends, k_longest in self.levels:
            more = _flash(q[below], k[above], v[above], q_ends, k_ends, q_longest, k_longest, causal=False)
            out[below], lse[below] = _merged(out[below], lse[below], *more)
        return out


def _flash(
    q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, q_longest: int, k_longest: int, *, causal: bool
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, q_ends, k_ends, q_longest, k_longest, 0.0, causal, False
    )
    return out, lse.t()


class _Padded:
    """By kernels for sequences of one length: nodes of like length together, filled up at their ends."""

    def __init__(self, batch: Batch, device: torch.device):
        self.levels = batch.levels
        self.groups = []
        for start, lengths in _alike(batch.nodes):
            index = start[:, None] + np.arange(lengths.max())
            inside = np.arange(lengths.max()) < lengths[:, None]
            rows = np.minimum(index, len(batch.tokens) - 1)
            self.groups.append((to_device(rows, device), to_device(np.flatnonzero(inside), device)))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        of_kv = q.shape[1] // k.shape[1]
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        for rows, inside in self.groups:
            mine, keys, values = (t[rows].transpose(1, 2) for t in (q, k, v))
            if of_kv > 1:
                keys, values = (t.repeat_interleave(of_kv, dim=1) for t in (keys, values))
            some, some_lse = _kernel(mine, keys, values, causal=True)
            to = rows.flatten()[inside]
            out[to] = some.transpose(1, 2).flatten(0, 1)[inside]
            lse[to] = some_lse.transpose(1, 2).flatten(0, 1)[inside]
        for (start, stop), (k_start, k_stop) in itertools.chain(*self.levels):
            # query heads of a key head are more queries of it
            mine = q[start:stop].unflatten(1, (-1, of_kv)).permute(1, 2, 0, 3).flatten(1, 2)[None]
            keys, values = (t[k_start:k_stop].transpose(0, 1)[None] for t in (k, v))
            some, some_lse = _kernel(mine, keys, values, causal=False)
            some = some[0].unflatten(1, (of_kv, -1)).permute(2, 0, 1, 3).flatten(1, 2)
            some_lse = some_lse[0].unflatten(1, (of_kv, -1)).permute(2, 0, 1).flatten(1, 2)
            rows = slice(start, stop)
            out[rows], lse[rows] = _merged(out[rows], lse[rows], some, some_lse)
        return out


def _alike(nodes: list[Segment]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Starts and lengths of nodes, in groups in which padding is at most an eighth of the longest."""
    starts, lengths = np.array([a for a, _ in nodes]), np.array([b - a for a, b in nodes])
    order = np.argsort(-lengths, kind="stable")
    first = 0
    while first < len(order):
        longest = lengths[order[first]]
        count = int((lengths[order[first:]] >= longest - max(8, longest // 8)).sum())
        group = order[first : first + count]
        yield starts[group], lengths[group]
        first += count


def _kernel(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention, (batch, heads, T, head_dim), and its log-sum-exps, (batch, heads, T)."""
    if q.is_cuda:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, compute_log_sumexp=True, is_causal=causal
        )
        return out, lse[:, :, : q.shape[2]]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=causal)


def _merged(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys, (n, heads, head_dim), and log-sum-exps, (n, heads), of that to each."""
    both = torch.logaddexp(lse, more_lse)
    share = (more_lse - both).exp()[..., None]
    return torch.lerp(out.float(), more.float(), share).to(out.dtype), both
