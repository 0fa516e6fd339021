"""The pretraining job as users run it, under Ray Train: speed, cost of checkpoints, recovery, and what spikes cost.

    python -m tests.benchmarks.pretraining --workspace W --preset 124m --parts loop bare checkpoints spike alarms

W holds tokens (`ingot tokenize`). Every part is a handful of `ingot pretrain` runs with its own names in W/runs, in one
Ray session; a table of each part is printed as soon as it is there. Speeds are medians over steps after the first few,
by the run's own metrics, so they contain data loading, metrics, clipping and everything else that the loop does.

parts:
    loop         tokens per second and MFU of the job
    bare         the same loop in processes without Ray, beside the job
    sync         on a GPU, steps under torch.cuda.set_sync_debug_mode("error"): nothing in them waits for the device
    checkpoints  a checkpoint every 100 steps: pauses, time to write, steps while one is written beside the others
    rollback     planted noise: seconds from its detection to the next step, from host memory and from storage
    spike        a window of shuffled, repeated and random tokens at ten times the learning rate: guarded, unguarded,
                 and never met
    alarms       five undisturbed runs with different seeds: rollbacks and skipped steps, of which there should be none
    precision    bf16 beside fp8 on the same data: losses and speeds
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import socket
import statistics
import sys
import time
from typing import Any

from jobs.pretrain import pretrain
from jobs.run_folder import StoredRun, valid_steps
from jobs.session import ray_session
from jobs.settings import Faults, ModelSettings, PretrainJob
from models.config import OptimizerConfig, ScheduleConfig
from pipelines import storage

WARM = 4  # first steps of a run, which compile and fill caches, do not count


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", required=True)
    parser.add_argument(
        "--parts", nargs="+", default=["loop"], choices=[name[5:] for name in globals() if name[:5] == "part_"]
    )
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--model", default="{}", help="further settings of the model, JSON")
    parser.add_argument("--sequence_length", type=int)
    parser.add_argument("--microbatch", type=int)
    parser.add_argument("--global_batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--prefix", default="bench", help="of the runs' names")
    given = parser.parse_args()
    import torch

    gpu = torch.cuda.is_available()
    settings = PretrainJob(
        workspace=storage.absolute(given.workspace),
        name=given.prefix,
        on_change="restart",
        model=ModelSettings(preset=given.preset, **json.loads(given.model)),
        steps=given.steps,
        global_batch=given.global_batch,
        sequence_length=given.sequence_length,
        microbatch=given.microbatch,
        workers=given.workers,
        device="gpu" if gpu else "cpu",
        compile=gpu,
        precision=given.precision,
        optimizer=OptimizerConfig(lr=given.lr),
        schedule=ScheduleConfig(kind="wsd", warmup_steps=max(1, given.steps // 15)),
        checkpoint_every=100,
        clean_after=50,
        validate_every=10**9,
        validation_samples=64,
        report_every=0,
    )
    print(
        f"{torch.cuda.get_device_name() if gpu else 'CPU'}, torch {torch.__version__}, {given.workers} workers",
        flush=True,
    )
    with ray_session(given.workers):
        for part in given.parts:
            began = time.monotonic()
            globals()[f"part_{part}"](settings)
            print(f"({part}: {time.monotonic() - began:.0f} s)", flush=True)


# Parts


def part_loop(settings: PretrainJob) -> None:
    """Speed of the job."""
    run = trained(settings, "loop", checkpoint_every=10**9)
    show("loop", [speed(run)])


def part_bare(settings: PretrainJob) -> None:
    """Speed of the same loop in processes of its own, without Ray."""
    import torch.multiprocessing

    given = named(settings, "bare", checkpoint_every=10**9)
    folder = StoredRun(f"{given.workspace}/runs/{given.name}")
    storage.delete(folder.folder)
    torch.multiprocessing.spawn(_bare, (given, folder, free_port(), False), nprocs=given.workers)
    show("bare", [speed(folder)])


def part_sync(settings: PretrainJob) -> None:
    """Steps in which waiting for the device is an error."""
    import torch.multiprocessing

    given = named(settings, "sync", checkpoint_every=10**9, steps=WARM + 16)
    folder = StoredRun(f"{given.workspace}/runs/{given.name}")
    storage.delete(folder.folder)
    torch.multiprocessing.spawn(_bare, (given, folder, free_port(), True), nprocs=given.workers)
    show("sync", [{"steps without a wait": len(valid_steps(folder.metrics())) - WARM}])


def _bare(rank: int, settings: PretrainJob, folder: StoredRun, port: int, strict: bool) -> None:
    import torch
    import torch.distributed as dist

    from jobs.worker import build
    from models.training.metrics import MetricsWriter

    device = torch.device(f"cuda:{rank}" if settings.device == "gpu" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if settings.workers > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=settings.workers)
    metrics = MetricsWriter(folder) if rank == 0 else None
    training = build(settings, folder, device, report=lambda *_: None, metrics=metrics)
    if strict:
        issue = training._issue

        def strictly(stream: Any) -> None:
            torch.cuda.set_sync_debug_mode("error" if training.state.step >= WARM else "default")
            issue(stream)
            torch.cuda.set_sync_debug_mode("default")

        training._issue = strictly
    training.train()
    if metrics is not None:
        metrics.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def part_checkpoints(settings: PretrainJob) -> None:
    """What checkpoints cost the steps around them."""
    show("checkpoints", [checkpoint_costs(trained(settings, "checkpoints", keep_checkpoints=1))])


def part_rollback(settings: PretrainJob) -> None:
    """Seconds from the detection of a spike to the next step."""
    table = []
    at = settings.steps // 2 + 20
    for name, snapshots in (("memory", 2), ("storage", 0)):
        faults = Faults(poison_data_steps=(at, at + 6))
        run = trained(settings, f"rollback-{name}", faults=faults, host_snapshots=snapshots)
        table += [rolled_back(run, at)]
    show("rollback", table)


def part_spike(settings: PretrainJob) -> None:
    """Final loss with a spike guarded, unguarded, and never met."""
    at = settings.steps * 2 // 3
    faults = Faults(poison_data_steps=(at, at + 12), poison_lr_factor=10.0)
    table = []
    for name, given, enabled in (("never", Faults(), True), ("guarded", faults, True), ("unguarded", faults, False)):
        spikes = dataclasses.replace(settings.spikes, enabled=enabled)
        run = trained(settings, f"spike-{name}", faults=given, spikes=spikes)
        (end,) = [event for event in run.events() if event["event"] == "end"]
        losses = [row["loss"] for row in valid_steps(run.metrics()).values()][-20:]
        row = {"run": name, "validation_loss": end["validation_loss"], "last_20": statistics.fmean(losses)}
        table.append({**row, **(rolled_back(run, at) if name == "guarded" else {})})
    for row in table:
        row["from_never"] = row["validation_loss"] / table[0]["validation_loss"] - 1
    show("spike", table)


def part_alarms(settings: PretrainJob) -> None:
    """Runs that nothing disturbs."""
    table = []
    for seed in range(5):
        events = trained(settings, f"alarms-{seed}", seed=seed).events()
        count = {kind: sum(e["event"] == kind for e in events) for kind in ("rollback", "outlier")}
        (end,) = [event for event in events if event["event"] == "end"]
        table.append({"seed": seed, **count, "validation_loss": end["validation_loss"]})
    show("alarms", table)


def part_precision(settings: PretrainJob) -> None:
    """bf16 beside fp8."""
    table = []
    for precision in ("bf16", "fp8"):
        run = trained(settings, f"precision-{precision}", precision=precision, keep_checkpoints=1)
        losses = [row["loss"] for row in valid_steps(run.metrics()).values()]
        (end,) = [event for event in run.events() if event["event"] == "end"]
        row = {"precision": precision, **speed(run), "validation_loss": end["validation_loss"]}
        table.append({**row, "last_30": statistics.fmean(losses[-30:]), "curve": [round(x, 3) for x in losses[::30]]})
        show(f"checkpoints, {precision}", [checkpoint_costs(run)])
    for row in table:
        row["loss_ratio"] = row["last_30"] / table[0]["last_30"] - 1
        row["validation_ratio"] = row["validation_loss"] / table[0]["validation_loss"] - 1
        row["speed_ratio"] = row["tokens_per_second"] / table[0]["tokens_per_second"]
    show("precision", table)


# Runs


def named(settings: PretrainJob, name: str, **changes: Any) -> PretrainJob:
    """The settings of one run."""
    return dataclasses.replace(settings, name=f"{settings.name}-{name}", **changes)


def trained(settings: PretrainJob, name: str, **changes: Any) -> StoredRun:
    """The folder of a run that was made anew."""
    given = named(settings, name, **changes)
    folder = StoredRun(f"{given.workspace}/runs/{given.name}")
    storage.delete(folder.folder)
    try:
        pretrain(given, watch=False)
    except Exception as error:
        print(f"{given.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise
    return folder


def speed(run: StoredRun) -> dict[str, Any]:
    """Median tokens per second and MFU, and the peak memory."""
    rows = [row for step, row in valid_steps(run.metrics()).items() if step > WARM]
    told = {"tokens_per_second": statistics.median(row["tokens_per_second"] for row in rows)}
    if rows[0].get("mfu"):
        told["mfu"] = statistics.median(row["mfu"] for row in rows)
    if rows[-1].get("memory_gb"):
        told["memory_gb"] = rows[-1]["memory_gb"]
    return {**told, "steps": len(rows)}


def checkpoint_costs(run: StoredRun) -> dict[str, Any]:
    """Pauses and times to write, and how much slower the steps were while one was written."""
    events = [event for event in run.events() if event["event"] == "checkpoint"]
    rows = valid_steps(run.metrics())
    writing, quiet = [], []
    for step, row in rows.items():
        if step > WARM:
            begun = row["time"] - row["seconds"]
            beside = any(e["time"] - e["write"] < row["time"] and begun < e["time"] for e in events)
            (writing if beside else quiet).append(row["seconds"])
    first, last = min(row["time"] for row in rows.values()), max(row["time"] for row in rows.values())
    usual = statistics.median(quiet)
    lost = sum(e["pause"] for e in events[1:-1]) + sum(writing) - usual * len(writing)
    return {
        "checkpoints": len(events),
        "pauses_ms": [round(1e3 * e["pause"], 1) for e in events],
        "writes_s": [e["write"] for e in events],
        "step_s": usual,
        "step_while_writing_s": statistics.median(writing) if writing else None,
        "steps_while_writing": len(writing),
        "lost_share": lost / (last - first),
    }


def rolled_back(run: StoredRun, at: int) -> dict[str, Any]:
    """How a planted spike was met: steps to its detection, and seconds to the next step."""
    rollbacks = [event for event in run.events() if event["event"] == "rollback"]
    if not rollbacks:
        return {"rollbacks": 0}
    first = rollbacks[0]
    rows = sorted(run.metrics(), key=lambda row: row["time"])
    after = next(row for row in rows if row["time"] > first["time"] and row.get("loss") is not None)
    return {
        "rollbacks": len(rollbacks),
        "detected_after_steps": first["step"] - at,
        "source": first["source"],
        "go_back_s": first["seconds"],
        "until_next_step_ended_s": after["time"] - first["time"] + first["seconds"],
        "of_it_the_step_s": after["seconds"],
        "documents": len(first["documents"]),
    }


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print a part's table, a line for each row."""
    print(f"\n{title}")
    for row in rows:
        print(
            "  "
            + ", ".join(
                f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
