"""Attention of one query of each text to its keys in a cache, as Triton kernels.

Each text's keys are cut into as many parts as it takes to occupy a GPU when texts are few, and the parts' results are
merged by their normalizers (flash decoding; Dao et al. 2023). How many keys a text has is read on the GPU, so a CUDA
graph of these kernels serves all lengths. Heads that share keys are done together: keys are read once.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for the CPU comes without
    triton = None
    decode_attention = None

_PROGRAMS = 1024  # eight for each of an H100's processors


if triton is not None:

    @triton.jit
    def _part_kernel(
        q, keys, values, lengths, parts, normalizers, q_row, q_head, row_stride, place_stride, head_stride, scale,
        GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,  # noqa: N803
        BLOCK: tl.constexpr, PARTS: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        row, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
        length = tl.load(lengths + row).to(tl.int32)
        size = tl.cdiv(tl.cdiv(length, PARTS), BLOCK) * BLOCK
        start = part * size
        stop = tl.minimum(start + size, length)
        heads, i, offset = tl.arange(0, GROUP_BLOCK), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
        mine = (heads < GROUP)[:, None] & (i < HEAD_DIM)[None, :]
        query = tl.load(q + row * q_row + (head * GROUP + heads)[:, None] * q_head + i[None, :], mask=mine, other=0.0)
        first = row * row_stride + head * head_stride
        # a running maximum and sum (Milakov & Gimelshein 2018), in powers of 2
        largest = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_BLOCK], tl.float32)
        mixed = tl.zeros([GROUP_BLOCK, WIDTH], tl.float32)
        for at in range(start, stop, BLOCK):
            places = at + offset
            within = (places < stop)[:, None] & (i < HEAD_DIM)[None, :]
            where = first + places[:, None].to(tl.int64) * place_stride + i[None, :]
            key = tl.load(keys + where, mask=within, other=0.0)
            scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
            scores = tl.where((places < stop)[None, :], scores, float("-inf"))
            new = tl.maximum(largest, tl.max(scores, 1))
            weights = tl.exp2(scores - new[:, None])
            shrink = tl.exp2(largest - new)
            value = tl.load(values + where, mask=within, other=0.0)
            total = total * shrink + tl.sum(weights, 1)
            mixed = mixed * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
            largest = new
        # a part without keys weighs nothing
        mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
        slot = ((row * tl.num_programs(1) + head) * PARTS + part) * GROUP + heads
        tl.store(parts + slot[:, None] * HEAD_DIM + i[None, :], mixed, mask=mine)
        tl.store(normalizers + slot, largest + tl.log2(total), mask=heads < GROUP)

    @triton.jit
    def _merge_kernel(
        parts, normalizers, out, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,  # noqa: N803
        PARTS: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        pair, member = tl.program_id(0).to(tl.int64), tl.program_id(1)
        part, i = tl.arange(0, PARTS), tl.arange(0, WIDTH)
        slot = (pair * PARTS + part) * GROUP + member
        weights = tl.load(normalizers + slot)
        weights = tl.exp2(weights - tl.max(weights, 0))
        weights = weights / tl.sum(weights, 0)
        inside = (i < HEAD_DIM)[None, :]
        mixed = tl.load(parts + slot[:, None] * HEAD_DIM + i[None, :], mask=inside, other=0.0)
        mixed = tl.sum(mixed * weights[:, None], 0)
        tl.store(out + (pair * GROUP + member) * HEAD_DIM + i, mixed, mask=i < HEAD_DIM)

    def decode_attention(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, parts: int | None = None) -> Tensor:
        """Attention of each row's query to the first keys of that row.

        Args:
            q: (rows, n_heads, head_dim), the last dimension contiguous.
            keys: (rows, places, n_kv_heads, head_dim), the last dimension contiguous.
            values: as keys, of equal strides.
            lengths: keys that each row has, (rows,), at least 1.
            parts: into which keys are cut, a power of 2; None suits a GPU.

        Returns:
            (rows, n_heads, head_dim), in q's dtype.
        """
        rows, n_heads, head_dim = q.shape
        n_kv_heads = keys.shape[2]
        group, width = n_heads // n_kv_heads, max(16, triton.next_power_of_2(head_dim))
        if parts is None:
            parts = min(16, triton.next_power_of_2(triton.cdiv(_PROGRAMS, rows * n_kv_heads)))
        mixed = q.new_empty((rows, n_kv_heads, parts, group, head_dim), dtype=torch.float32)
        normalizers = mixed.new_empty((rows, n_kv_heads, parts, group))
        out = q.new_empty((rows, n_heads, head_dim))
        shape = {"GROUP": group, "HEAD_DIM": head_dim, "WIDTH": width, "PARTS": parts}
        _part_kernel[(rows, n_kv_heads, parts)](
            q, keys, values, lengths, mixed, normalizers, q.stride(0), q.stride(1), *keys.stride()[:3],
            head_dim**-0.5 * 1.4426950408889634, GROUP_BLOCK=max(16, triton.next_power_of_2(group)),
            BLOCK=64 if q.element_size() == 2 else 32, num_warps=4, **shape,
        )  # fmt: skip
        _merge_kernel[(rows * n_kv_heads, group)](mixed, normalizers, out, num_warps=1, **shape)
        return out
