"""Whether the best learning rate carries over to wider models: final loss by width and learning rate.

    python -m tests.benchmarks.widths [--device cuda] [--kind muon] [--widths 64 128 256] [--steps 150]

Trains small models, of 2 blocks with heads of 16, on the bytes of the standard library's source, once in the standard
parametrization and once with base_width at the smallest width (`models.widths`). The learning rates are powers of two
around that of `--lr`. Prints a table of losses in nats a byte, the mean of the last tenth of the steps, and where each
row has its lowest. With muP the lowest should stay in its column.

On a CPU, 80 steps, factors of 4 between learning rates: lowest at 0.031, 0.0078 and 0.0078 for widths 32, 64 and 128 in
the standard parametrization (AdamW); at 0.031 for all three with base_width 32. Muon: at 0.031 in both, but in the
standard parametrization the rates on either side change places (0.0078 is as good at width 128), with base_width 32
they keep theirs, and losses there are 2.415, 2.338 and 2.293 against 2.415, 2.352 and 2.353.
"""

import argparse
import glob
import os
import sysconfig
import time

import torch

from models.config import ModelConfig, OptimizerConfig, ScheduleConfig
from models.optimizer import build_optimizer, grad_norm, learning_rate
from models.transformer import Transformer

LENGTH = 64
BATCH = 8


def source(files: int = 150) -> torch.Tensor:
    """Bytes of the standard library's modules, by name, (bytes,), int64."""
    paths = sorted(glob.glob(os.path.join(sysconfig.get_paths()["stdlib"], "*.py")))[:files]
    content = b"".join(open(path, "rb").read() for path in paths)  # noqa: SIM115
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).long()


def train(config: ModelConfig, optimizer_config: OptimizerConfig, steps: int, text: torch.Tensor, device: str) -> float:
    """Mean loss of the last tenth of the steps, in nats a byte."""
    model = Transformer(config, seed=0).to(device)
    optimizer = build_optimizer(model, optimizer_config)
    schedule = ScheduleConfig(warmup_steps=steps // 10)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(steps):
        starts = torch.randint(0, len(text) - LENGTH - 1, (BATCH, 1), generator=generator)
        tokens = text[starts + torch.arange(LENGTH + 1)].to(device)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        norm = grad_norm(model)
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.grad_scale = (norm / optimizer_config.grad_clip).clamp(min=1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, optimizer_config.lr, schedule) * group["lr_scale"]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses[-max(1, steps // 10) :]).mean().item()


def main() -> None:
    """Train all and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kind", default="adamw", choices=["adamw", "muon"])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=2**-7, help="the middle of the grid")
    parser.add_argument("--around", type=int, default=2, help="learning rates on each side, a factor of 4 apart")
    args = parser.parse_args()
    text = source()
    rates = [args.lr * 4.0**i for i in range(-args.around, args.around + 1)]
    for base in (None, min(args.widths)):
        title = "standard parametrization" if base is None else f"base_width {base}"
        print(f"\n{args.kind}, {title}\n{'width':>7}" + "".join(f"{rate:>10.2g}" for rate in rates) + "    lowest at")
        for width in args.widths:
            began = time.perf_counter()
            config = ModelConfig(
                vocab_size=256,
                d_model=width,
                n_layers=2,
                n_heads=width // 16,
                n_kv_heads=width // 16,
                d_ff=2 * width,
                max_seq_len=LENGTH,
                base_width=base,
            )
            losses = [
                train(config, OptimizerConfig(kind=args.kind, lr=rate), args.steps, text, args.device) for rate in rates
            ]
            best = rates[min(range(len(rates)), key=lambda i: losses[i])]
            print(
                f"{width:>7}" + "".join(f"{loss:>10.3f}" for loss in losses) + f"{best:>13.2g}"
                f"   ({time.perf_counter() - began:.0f} s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
