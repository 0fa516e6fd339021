"""Speed on two GPUs against twice that of one, by layout; and a model that only fits when it is sharded.

    python -m tests.benchmarks.parallel [--preset 1b] [--large 8b] [--only one,whole] [--seconds 240]
    python -m tests.benchmarks.parallel --device cpu --preset nano --large none

Steps are the training loop's own (`models.training.step`) on random tokens, the optimizer's included, with the same
global batch on one GPU and on two. Configurations are compiled side by side and timed one after the other; each is a
process of its own on each GPU, ended when its time is over. Ends with one line for each:

    name  GPUs  tokens/s  of twice one GPU  MFU  peak GB  seconds until its first step

What was tried, and what came of it:

- Blocks that are each gathered and compiled alone cost the host 9 to 16 ms a microbatch for 12 layers on a quick core,
  4 to 5 times a model that is one graph: hooks, and guards of each block's call. A GPU that takes 28 ms for the
  microbatch of a small model waits for that on a slower core. Hence gather=whole: one unit, one graph, one gathering a
  step.
- That blocks share one compiled graph, instead of reaching the limit of recompilations, was suspected and is not so:
  `tests/models/test_parallel.py` counts them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from models.config import PRESETS, OptimizerConfig
from models.mesh import Parallelism, data_rank_and_world, make_mesh
from models.optimizer import build_optimizer
from models.parallel import compile_model, parallelize
from models.training.metrics import peak_flops
from models.training.spikes import Limits
from models.training.step import Stepper
from models.transformer import Transformer

LAYOUTS = {
    "one": None,
    "whole": Parallelism(gather="whole"),
    "copies": Parallelism(shard_workers=1),
    "block": Parallelism(gather="block"),
    "step": Parallelism(gather="step"),
}


def main() -> None:
    """Run the configurations, each in processes of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="1b", help="model that one GPU holds")
    parser.add_argument("--large", default="8b", help="model that is only run sharded; none leaves it out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", default="one,whole,copies,block,large", help=f"of {', '.join(LAYOUTS)} and large")
    parser.add_argument("--tokens", type=int, default=2**19, help="in a step, over all GPUs")
    parser.add_argument("--large_tokens", type=int, default=2**17, help="the same of the large model")
    parser.add_argument("--microbatch", type=int, default=4, help="sequences at a time")
    parser.add_argument("--large_recompute", type=float, help="share of activations kept; by the memory when not given")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--steps", type=int, default=2, help="timed steps")
    parser.add_argument("--seconds", type=float, default=240, help="after which nothing new is begun")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(json.loads(args.child))
        return
    began = time.monotonic()
    results: list[dict[str, Any]] = []
    chosen = args.only.split(",")
    small = [name for name in chosen if name in LAYOUTS]
    # the first two are compiled together, and what they leave in the compiler's cache serves the others
    waves = [small[:2], small[2:], ["large"] if "large" in chosen and args.large != "none" else []]
    for wave in filter(None, waves):
        if time.monotonic() - began < args.seconds:
            results += run_wave([configuration(name, args) for name in wave], args.seconds + began - time.monotonic())
    one = next((r["tokens_per_second"] for r in results if r["name"] == "one" and "error" not in r), None)
    print(f"\n{time.monotonic() - began:.0f} s in all; {args.preset}, {args.tokens} tokens a step")
    print(f"{'':14}{'GPUs':>5}{'tokens/s':>10}{'of 2x one':>10}{'MFU':>7}{'GB':>7}{'start s':>9}")
    for r in results:
        if "error" in r:
            print(f"{r['name']:14}{r['error']}")
            continue
        ratio = f"{r['tokens_per_second'] / (2 * one):.1%}" if one and r["world"] == 2 and r["name"] != "large" else ""
        mfu = f"{r['mfu']:.1%}" if r["mfu"] else ""
        print(
            f"{r['name']:14}{r['world']:>5}{r['tokens_per_second']:>10,.0f}{ratio:>10}{mfu:>7}{r['gigabytes']:>7.1f}"
            f"{r['start']:>9.0f}"
        )


def configuration(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What the processes of one configuration are told."""
    large = name == "large"
    return {
        "name": name,
        "preset": args.large if large else args.preset,
        "layout": name if not large else "block",
        "world": 1 if name == "one" else 2,
        "device": args.device,
        "tokens": args.large_tokens if large else args.tokens,
        "microbatch": 1 if large else args.microbatch,
        "recompute": args.large_recompute if large else 1.0,
        "precision": args.precision,
        "steps": args.steps,
    }


def run_wave(configurations: list[dict[str, Any]], seconds: float) -> list[dict[str, Any]]:
    """Start some configurations together, time them one by one; what each came to."""
    groups = [start(c) for c in configurations]
    deadline = time.monotonic() + max(seconds, 30)
    results = []
    try:
        for group in groups:  # all ready, so that nothing compiles while another is timed
            for process in group["processes"]:
                group.setdefault("ready", []).append(said(process, "READY", deadline))
        for group in groups:
            told = [None]
            if None not in group["ready"]:
                for process in group["processes"]:
                    process.stdin.write("GO\n")
                    process.stdin.flush()
                told = [said(process, "RESULT", deadline + 60) for process in group["processes"]]
            name = group["name"]
            if told[0] is None:
                with open(group["log"]) as file:
                    last = [line for line in file.read().splitlines() if line.strip()][-1:] or ["no time left"]
                results.append({"name": name, "error": last[0][:150]})
            else:
                results.append({"name": name, "world": len(told), **json.loads(told[0])})
            print(results[-1], flush=True)
    finally:
        for group in groups:
            for process in group["processes"]:
                process.kill()
                process.wait()
    return results


def start(c: dict[str, Any]) -> dict[str, Any]:
    """Start the processes of a configuration, each seeing its own GPU only, as Ray Train's workers do."""
    folder = tempfile.mkdtemp()
    log = os.path.join(folder, "log.txt")
    processes = []
    for rank in range(c["world"]):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(rank)}
        given = json.dumps({**c, "rank": rank, "rendezvous": f"file://{folder}/rendezvous"})
        with open(log, "a") as errors:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.benchmarks.parallel", "--child", given],
                    env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                )
            )  # fmt: skip
    return {"name": c["name"], "processes": processes, "log": log}


def said(process: subprocess.Popen, word: str, deadline: float) -> str | None:
    """What follows a word on a process's output; None when it ends, or is ended because the time is over."""
    timer = threading.Timer(max(deadline - time.monotonic(), 0), process.kill)
    timer.start()
    try:
        for line in process.stdout:
            if line.startswith(word):
                return line[len(word) :].strip()
    finally:
        timer.cancel()
    return None


def child(c: dict[str, Any]) -> None:
    """One process of a configuration: build, take a short step, wait for the word, time steps."""
    began = time.perf_counter()
    on_gpu = c["device"] == "cuda"
    device = torch.device(c["device"])
    if on_gpu:
        torch.cuda.set_device(0)
        torch.set_float32_matmul_precision("high")
    else:
        torch.set_num_threads(1)
    if c["world"] > 1:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            init_method=c["rendezvous"], rank=c["rank"], world_size=c["world"],
        )  # fmt: skip
    config = PRESETS[c["preset"]]
    length = config.max_seq_len
    if c["recompute"] is None:  # what is left beside 16 bytes a parameter
        memory = torch.cuda.get_device_properties(0).total_memory if on_gpu else 2**40
        c["recompute"] = 1.0 if memory - 16 * config.n_params() / c["world"] > 60e9 else 0.2
    mesh = make_mesh(LAYOUTS[c["layout"]] or Parallelism(), device.type)
    rank, world = data_rank_and_world(mesh)
    with torch.device("meta"):
        model = Transformer(replace(config), seed=None)
    parallelize(model, mesh, device, precision=c["precision"], recompute=c["recompute"]).init_weights(0)
    if on_gpu:
        compile_model(model)
    stepper = Stepper(
        model, build_optimizer(model, OptimizerConfig()), device,
        microbatch=c["microbatch"], grad_clip=1.0, data_world=world,
    )  # fmt: skip

    def samples(n: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(rank)
        batch = torch.randint(0, config.vocab_size, (n, length + 1), generator=generator)
        return batch.pin_memory() if on_gpu else batch

    stepper.step(samples(2 * c["microbatch"]), [0], Limits()).read()
    ready = time.perf_counter() - began
    if on_gpu:
        torch.cuda.empty_cache()
    share = samples(max(c["microbatch"], c["tokens"] // length // world))
    print("READY", flush=True)
    sys.stdin.readline()
    stepper.step(samples(2 * c["microbatch"]), [0], Limits()).read()  # the allocator's memory is there again
    if c["world"] > 1:
        dist.barrier()
    began = time.perf_counter()
    issued = [stepper.step(share, [i], Limits()) for i in range(c["steps"])]
    losses = [outcome.read().loss for outcome in issued]
    seconds = time.perf_counter() - began
    speed = len(share) * world * length * c["steps"] / seconds
    peak = peak_flops(device)
    result = {
        "tokens_per_second": speed,
        "mfu": speed * config.flops_per_token(length) / (peak * c["world"]) if peak else None,
        "gigabytes": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0,
        "start": ready,
        "loss": losses[-1],
        "recompute": c["recompute"],
    }
    print("RESULT", json.dumps(result), flush=True)
    if c["world"] > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
