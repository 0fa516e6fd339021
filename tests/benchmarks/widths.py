"""Whether the best learning rate carries over to wider models: final loss by width and learning rate.

    python -m tests.benchmarks.widths [--device cuda] [--kind muon] [--widths 64 128 256] [--picture F.svg]

Trains small models, of 2 blocks with heads of 16, on the bytes of the standard library's source, once in the standard
parametrization and once with base_width at the smallest width (`models.widths`). The learning rates lie `--factor`
apart around that of `--lr`. Prints a table of losses in nats a byte, the mean of the last tenth of the steps, and where
each row has its lowest. With muP the lowest should stay in its column.

On an H100, `--device cuda --widths 128 256 512 1024 --steps 300 --batch 16 --factor 2 --around 5`: lowest at 0.002,
0.00098, 0.00098 and 0.00049 in the standard parametrization (losses 1.933, 1.797, 1.756, 1.680), at 0.002 for all four
with base_width 128 (1.933, 1.893, 1.835, 1.809).

On a CPU, 80 steps, factors of 4 between learning rates: lowest at 0.031, 0.0078 and 0.0078 for widths 32, 64 and 128 in
the standard parametrization (AdamW); at 0.031 for all three with base_width 32. Muon: at 0.031 in both, but in the
standard parametrization the rates on either side change places (0.0078 is as good at width 128), with base_width 32
they keep theirs, and losses there are 2.415, 2.338 and 2.293 against 2.415, 2.352 and 2.353.
"""

from __future__ import annotations

import argparse
import glob
import math
import os
import sysconfig
import time

import torch

from models.config import ModelConfig, OptimizerConfig, ScheduleConfig
from models.optimizer import build_optimizer, grad_norm, learning_rate
from models.transformer import Transformer

LENGTH = 64


def source(files: int = 150) -> torch.Tensor:
    """Bytes of the standard library's modules, by name, (bytes,), int64."""
    paths = sorted(glob.glob(os.path.join(sysconfig.get_paths()["stdlib"], "*.py")))[:files]
    content = b"".join(open(path, "rb").read() for path in paths)  # noqa: SIM115
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).long()


def train(
    config: ModelConfig, optimizer_config: OptimizerConfig, steps: int, batch: int, text: torch.Tensor, device: str
) -> float:
    """Mean loss of the last tenth of the steps, in nats a byte."""
    text = text.to(device)
    model = Transformer(config, seed=0).to(device)
    optimizer = build_optimizer(model, optimizer_config)
    schedule = ScheduleConfig(warmup_steps=steps // 10)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(steps):
        starts = torch.randint(0, len(text) - LENGTH - 1, (batch, 1), generator=generator)
        tokens = text[(starts + torch.arange(LENGTH + 1)).to(device)]
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
    parser.add_argument("--around", type=int, default=2, help="learning rates on each side")
    parser.add_argument("--factor", type=float, default=4.0, help="from one learning rate to the next")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step")
    parser.add_argument("--picture", help="SVG file to draw")
    args = parser.parse_args()
    text = source()
    rates = [args.lr * args.factor**i for i in range(-args.around, args.around + 1)]
    tables = {}
    for base in (None, min(args.widths)):
        title = "standard parametrization" if base is None else f"base_width {base}"
        print(f"\n{args.kind}, {title}\n{'width':>7}" + "".join(f"{rate:>10.2g}" for rate in rates) + "    lowest at")
        tables[title] = {}
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
            optimizers = [OptimizerConfig(kind=args.kind, lr=rate) for rate in rates]
            losses = [train(config, optimizer, args.steps, args.batch, text, args.device) for optimizer in optimizers]
            tables[title][width] = losses
            print(
                f"{width:>7}" + "".join(f"{loss:>10.3f}" for loss in losses) + f"{rates[lowest(losses)]:>13.2g}"
                f"   ({time.perf_counter() - began:.0f} s)",
                flush=True,
            )
        places = [lowest(losses) for losses in tables[title].values()]
        print(f"lowest losses lie up to {max(places) - min(places)} learning rates apart")
    if args.picture:
        draw(args.picture, rates, tables)


def lowest(losses: list[float]) -> int:
    """Where the lowest loss is; what diverged is not a number."""
    return min(range(len(losses)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)


def draw(path: str, rates: list[float], tables: dict[str, dict[int, list[float]]]) -> None:
    """Loss over learning rate, a curve for each width, with and without the transfer."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "ingot"  # the same picture each time
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(tables), figsize=(9, 3.6), sharey=True)
    best = min(min(losses) for table in tables.values() for losses in table.values())
    for axis, (title, table) in zip(axes, tables.items(), strict=True):
        for shade, (width, losses) in enumerate(table.items()):
            color = plt.get_cmap("viridis")(shade / max(1, len(table)))
            axis.plot(rates, losses, color=color, label=f"width {width}")
            axis.plot(rates[lowest(losses)], losses[lowest(losses)], "o", color=color)
        axis.set(xscale="log", xlabel="learning rate", title=title, ylim=(best - 0.05, best + 1.2))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("loss (nats per byte)")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
