"""Attention of a step, in Triton's interpreter where Triton is installed, against PyTorch's of each row alone."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F  # noqa: N812


def compare():
    """The kernels on grouped and other heads, with parts that have no keys; run by this file as a program."""
    from models.decode_attention import decode_attention

    generator = torch.Generator().manual_seed(0)
    for n_heads, n_kv_heads, head_dim, parts in ((4, 2, 32, 4), (3, 3, 64, 1), (8, 1, 24, 16), (4, 2, 16, None)):
        heads = torch.randn(3, n_heads + 2 * n_kv_heads, head_dim, generator=generator)
        q = heads[:, :n_heads]  # rows are further apart than they are long, as in the model
        keys, values = torch.randn(2, 3, 120, n_kv_heads, head_dim, generator=generator)
        lengths = [120, 1, 65]
        for row, length in enumerate(lengths):
            keys[row, length:] = values[row, length:] = float("nan")  # never to be read
        found = decode_attention(q, keys, values, torch.tensor(lengths), parts)
        for row, length in enumerate(lengths):
            expected = F.scaled_dot_product_attention(
                q[row, :, None], keys[row, :length].transpose(0, 1), values[row, :length].transpose(0, 1),
                enable_gqa=True,
            )[:, 0]  # fmt: skip
            torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_equal_attention_of_each_row_alone():
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-m", "tests.models.test_decode_attention"], env=environment, check=True)


if __name__ == "__main__":
    compare()
