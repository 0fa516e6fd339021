"""The Triton kernels, in Triton's interpreter where Triton is installed: the model with them against the plain one."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from models.config import ModelConfig
from models.kernels import add_norm, split_and_rotate, swiglu
from models.transformer import Transformer, rotary_table, rotate

SMALL = {"vocab_size": 61, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48, "max_seq_len": 32}


def results(tied, n_kv_heads):
    """Loss, losses by token, and gradients of a small model with norms that are not 1."""
    model = Transformer(ModelConfig(**{**SMALL, "tied_embeddings": tied, "n_kv_heads": n_kv_heads}), seed=1)
    model.z_loss = 1e-3
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    tokens = torch.randint(0, 61, (2, 13), generator=generator)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, :4] = -100
    loss, losses = model(inputs, targets, reduction="sum", loss_chunk=10, token_losses=True)
    loss.backward()
    return loss.detach(), losses, {name: p.grad for name, p in model.named_parameters()}


def with_kernels():
    """`results` with the kernels, run by this file as a program; Triton reads at its import whether to interpret."""
    from models import kernels, loss, transformer

    torch.library.wrap_triton = lambda kernel: kernel  # which takes compiled kernels alone
    for module in (kernels, loss, transformer):
        module.on_gpu = lambda *tensors: True
    transformer.joinable = lambda *inputs: True
    return [results(tied, n_kv_heads) for tied, n_kv_heads in ((False, 2), (True, 4))]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_model_with_kernels_equals_the_plain_one(tmp_path):
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "tests.models.test_triton_kernels", str(tmp_path / "results.pt")]
    subprocess.run(command, env=environment, check=True)
    found = torch.load(tmp_path / "results.pt")
    for ours, (tied, n_kv_heads) in zip(found, ((False, 2), (True, 4)), strict=True):
        torch.testing.assert_close(ours, results(tied, n_kv_heads), rtol=1e-4, atol=1e-5)


def test_without_a_gpu_they_are_the_textbook():
    generator = torch.Generator().manual_seed(0)
    x, delta = (torch.randn(2, 5, 8, generator=generator) for _ in range(2))
    weight = torch.randn(8, generator=generator)
    total, normed = add_norm(x, delta, weight, 1e-5)
    torch.testing.assert_close(total, x + delta)
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(x + delta, (8,), weight, 1e-5))
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(x), gate * gate.sigmoid() * up)
    qkv, table = torch.randn(2, 5, 32, generator=generator), rotary_table(4, 5, 100.0)
    q, k, v = split_and_rotate(qkv, table, 4, 2)
    torch.testing.assert_close(q, rotate(qkv[..., :16].view(2, 5, 4, 4), table))
    torch.testing.assert_close(k, rotate(qkv[..., 16:24].view(2, 5, 2, 4), table))
    torch.testing.assert_close(v, qkv[..., 24:].view(2, 5, 2, 4))


if __name__ == "__main__":
    torch.save(with_kernels(), sys.argv[1])
