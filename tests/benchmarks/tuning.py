"""A sweep of the nano preset that is killed half-way, and whether it finds settings better than the defaults.

    python -m tests.benchmarks.tuning --workspace WORKSPACE [--trials 16] [--steps 60] [--search tpe]

WORKSPACE holds tokens, such as those of `ingot demo`. All of the sweep's processes get SIGKILL once half of the trials
have ended, and the same command is run again. Then: no trial that had ended was touched; the best one's validation loss
against that of a run with the default settings, of as many steps and the same tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "cluster"))

from training_bench import descendants, end_all

from jobs.run_folder import StoredRun
from jobs.sweep_trials import Trials
from pipelines import storage


def main() -> None:
    """Run the sweep and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", required=True)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--search", default="tpe")
    given = parser.parse_args()
    workspace = os.path.abspath(given.workspace)
    base = {
        "sequence_length": 128, "global_batch": 8, "steps": given.steps, "device": "cpu", "validation_samples": 64,
        "schedule.warmup_steps": 10,
    }  # fmt: skip
    space = {
        "optimizer.lr": {"low": 1e-4, "high": 3e-2},
        "optimizer.weight_decay": {"low": 0.0, "high": 0.2, "step": 0.05, "scale": "linear"},
        "optimizer.kind": {"values": ["adamw", "muon"]},
    }
    name = f"bench-{given.search}-{given.trials}-{given.steps}"
    folder = f"{workspace}/sweeps/{name}"
    sweep = [
        "tune", "--workspace", workspace, "--name", name, "--trials", str(given.trials), "--search", given.search,
        "--space", json.dumps(space), *options(base, "pretrain."),
    ]  # fmt: skip
    began = time.monotonic()
    half = 0
    if len(ended(folder)) < given.trials // 2:
        driver = subprocess.Popen([sys.executable, "-m", "jobs", *sweep], start_new_session=True)
        while driver.poll() is None and len(ended(folder)) < given.trials // 2:
            time.sleep(0.2)
        half = driver.poll() is None
        family = descendants(driver.pid)
        driver.kill()
        driver.wait()
        end_all(family)
    before = {trial: files_of(folder, trial) for trial in ended(folder)}
    print(f"killed with {len(before)} of {given.trials} trials ended" if half else "started again", flush=True)
    subprocess.run([sys.executable, "-m", "jobs", *sweep], check=True)
    repeated = [trial for trial, files in before.items() if files_of(folder, trial) != files]
    seconds = time.monotonic() - began
    plain = ["pretrain", "--workspace", workspace, "--name", f"{name}-default", "--report_every", "0"]
    subprocess.run([sys.executable, "-m", "jobs", *plain, *options(base, "")], check=True)
    run = StoredRun(f"{workspace}/runs/{name}-default")
    default = next(event["validation_loss"] for event in reversed(run.events()) if event["event"] == "end")
    trials = Trials(folder)
    best = trials.ranked()[0]
    print(f"trials {len(trials.all)}: {trials.count('finished')} to the end, {trials.count('stopped')} stopped early")
    print(f"repeated after the kill: {len(repeated)} of {len(before)} that had ended")
    print(f"steps trained: {sum(t.step for t in trials.all.values())} of {given.trials * given.steps}; {seconds:.0f} s")
    print(f"validation loss: default {default:.4f}, best {best.loss:.4f} (trial {best.name}: {best.settings})")


def options(settings: dict, prefix: str) -> list[str]:
    """Settings as arguments of the command line."""
    return [part for name, value in settings.items() for part in (f"--{prefix}{name}", str(value))]


def ended(folder: str) -> list[str]:
    """Names of the trials that have ended."""
    return [name for name, trial in Trials(folder).all.items() if trial.state in ("finished", "stopped", "diverged")]


def files_of(folder: str, trial: str) -> list:
    """A trial's files with size and time, without what Ray keeps there."""
    return [file for file in storage.list_files(f"{folder}/trials/{trial}") if "/ray/" not in file.uri]


if __name__ == "__main__":
    main()
