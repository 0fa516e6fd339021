r"""Whether a ladder of small sizes foretells the loss of a bigger one, which is then trained.

    python -m tests.benchmarks.ladder --workspace W
    python -m tests.benchmarks.ladder --workspace W --device gpu --widths 64 96 128 160 --target 384 --head 32 \
        --ratios 20 40 --batch 64 --length 256 --lr 0.004 --base-width 128

W holds tokens (`ingot tokenize`). The first, for two cores, wants the smallest vocabulary, of 272 (bytes and a few
pairs): its target has 246,000 parameters and sees 9.8 million tokens. The second, for one GPU, wants one of some
4,000; 8.6 million parameters, 173 million tokens. Trains `ingot tune ladder` with the target's run as settings, then
the target itself, and prints the prediction, its interval, the truth, and the error, for the whole ladder and for its
runs at the target's own ratio of tokens to parameters alone. Run again, it goes on where it was.

The first, on 38 million bytes of prose and code: sizes of 16,900 to 60,400 parameters at 40 and 80 tokens a parameter
foretell 1.951 (1.829 to 2.153) nats for one 4.07 times larger, measured were 1.913: 2.0 % off; those at 40 alone 1.875,
also 2.0 % off.

What was too small: a vocabulary of 1,024, 25,000 to 98,000 parameters, whose embedding is a large part, and 10 to 40
tokens a parameter. At 10 and 20 the law foretold 3.604 (3.496 to 3.774), measured was 3.408, 5.7 % off; at 20 and 40
3.399 (3.251 to 3.587) against 3.142, 8.2 % off. Models in their first million tokens do not follow a power law yet.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import numpy as np

from jobs import ladder, logs
from jobs.inputs import check_fits
from jobs.pretrain import run as pretrain
from jobs.scaling_law import fit_with_uncertainty
from jobs.settings import LadderJob, ModelSettings, PretrainJob, checked
from models.config import OptimizerConfig, ScheduleConfig
from models.training.spikes import SpikeConfig
from pipelines import storage


def main() -> None:
    """Train the ladder, predict, train the target, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", required=True)
    parser.add_argument("--name", default="bench")
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 20, 24, 32])
    parser.add_argument("--target", type=int, default=68, help="d_model of the target")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--head", type=int, default=4, help="width of a head")
    parser.add_argument(
        "--ratios",
        type=float,
        nargs="+",
        default=[40.0, 80.0],
        help="the first is the target's",
    )
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--base-width", type=int, default=32, help="d_model that the learning rate is for")
    parser.add_argument("--compile", action="store_true", help="worth its half minute a run for long runs only")
    parser.add_argument("--gpu-hours", type=float, default=1.0)
    given = parser.parse_args()
    logs.configure()
    heads = given.target // given.head
    base = PretrainJob(
        workspace=storage.absolute(given.workspace),
        name=f"{given.name}-target-t{given.ratios[0]:g}",
        model=ModelSettings(
            d_model=given.target,
            n_layers=given.layers,
            n_heads=heads,
            n_kv_heads=heads,
            d_ff=8 * round(given.target / 3),
            base_width=given.base_width,
        ),
        global_batch=given.batch,
        sequence_length=given.length,
        device=given.device,
        compile=given.compile,
        optimizer=OptimizerConfig(lr=given.lr),
        schedule=ScheduleConfig(kind="wsd", decay_fraction=0.3, min_ratio=0.0, warmup_steps=1),
        spikes=SpikeConfig(enabled=False),
        checkpoint_every=500,
        validate_every=10**9,
        validation_samples=2048,
        host_snapshots=0,
        report_every=0,
    )
    _, shape = check_fits(base)
    steps = round(given.ratios[0] * shape.n_matmul_params() / (given.batch * given.length))
    base = dataclasses.replace(base, steps=steps, schedule=dataclasses.replace(base.schedule, warmup_steps=steps // 20))
    settings = LadderJob(
        workspace=base.workspace,
        name=given.name,
        pretrain=base,
        widths=given.widths,
        tokens_per_parameter=given.ratios,
        gpu_hours=given.gpu_hours,
    )
    checked(settings)
    began = time.monotonic()
    result = ladder.run(settings)
    between = time.monotonic()
    truth = pretrain(base)["validation_loss"]
    rungs, target = result["rungs"], result["target"]
    larger = target["parameters"] / max(r["parameters"] for r in rungs)
    seconds = between - began, time.monotonic() - between
    print(
        f"ladder: {len(rungs)} runs in {seconds[0]:.0f} s; target, {larger:.2f} times the largest: {seconds[1]:.0f} s"
    )
    show("whole ladder", target["loss"], target["interval"], truth)
    alone = [r for r in rungs if abs(r["tokens"] / r["parameters"] / given.ratios[0] - 1) < 0.1]
    if len(alone) < len(rungs):
        fitted = fit_with_uncertainty(*(np.array([r[k] for r in alone]) for k in ("parameters", "tokens", "loss")))
        told = float(fitted.law.loss(target["parameters"], target["tokens"]))
        interval = fitted.measured(target["parameters"], target["tokens"], ladder.CONFIDENCE)
        show(f"its {len(alone)} runs at {given.ratios[0]:g} tokens a parameter", told, interval, truth)


def show(title: str, predicted: float, interval: tuple[float, float], truth: float) -> None:
    """A line for one prediction."""
    low, high = interval
    print(
        f"{title}: predicted {predicted:.4f} ({low:.4f} to {high:.4f} in {ladder.CONFIDENCE:.0%}), "
        f"measured {truth:.4f}, error {predicted / truth - 1:+.2%}",
        flush=True,
    )


if __name__ == "__main__":
    main()
