"""A campaign of faults against pretraining: whatever is done to a run, it has to end as if nothing had been.

    python -m tests.benchmarks.training_faults [--seeds 0 1 2] [--work FOLDER] [--patience SECONDS] [--list]

Every seed is one run of two workers on a cluster of raylets on this machine, and a list of faults drawn with that seed:

    worker      SIGKILL of a worker                       torn        driver killed, then the newest checkpoint cut or
    controller  SIGKILL of Ray Train's controller                     a bit of it flipped
    driver      SIGKILL of the job's own process          full        the disk is full for some seconds
    raylet      SIGKILL of a node's raylet; a new one     storage     writing to the run's folder fails for 30 seconds;
                joins                                                 half the time a worker is killed meanwhile
    drain       a node is drained as a preemption, and    rollback    SIGKILL of worker or driver within a second after
                gone at its deadline; a new one joins                 the run went back (runs with poisoned data)
    machine     SIGKILL of everything: head, nodes, driver

The command is run again whenever it has ended without finishing. Then: the run reached its last step; its token record
is exact (every step once, with the samples that the order of the data gives it, by their hash, and none left out but
those in the skip ledger); where the number of workers never changed, the final weights equal those of an undisturbed
run bit for bit. Full disks and failing storage need the right to mount; without it they are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "cluster"))

import numpy as np
from training_bench import descendants, end_all, events_of, processes, small_run, token_record, weights, write_recipe

from jobs.run_folder import StoredRun
from jobs.settings import Faults, PretrainJob

STEPS = 150
POISON = (88, 94)
SEEDS = range(11)
ANYTIME = ("worker", "controller", "driver", "raylet", "drain", "machine", "torn", "full", "storage")
KILLS = ("worker", "controller", "driver", "raylet", "machine", "torn", "rollback")
PER_RUN = 5


class HangsError(AssertionError):
    """The run makes no progress."""


@dataclasses.dataclass
class Fault:
    """One fault of a plan, and what came of it."""

    kind: str
    at: int
    told: str = "came too late"
    seconds: float | None = None


@dataclasses.dataclass
class Plan:
    """What a seed stands for."""

    seed: int
    elastic: bool
    poisoned: bool
    faults: list[Fault]


def plan(seed: int, may_mount: bool) -> Plan:
    """The run of a seed: every third one poisoned, every fourth elastic, each with faults at random steps."""
    rng = random.Random(seed)
    kinds = [kind for kind in ANYTIME if may_mount or kind not in ("full", "storage")]
    poisoned, elastic = seed % 3 == 2, seed % 4 == 3
    # A deck, so that all kinds come equally often over the seeds: this run's cards begin where the last one's ended.
    order = random.Random(seed // 9).sample(kinds, len(kinds)) * 2
    first = seed * PER_RUN % len(kinds)
    drawn = order[first : first + PER_RUN]
    places = [round((i + rng.uniform(0.3, 0.9)) * (STEPS - 15) / PER_RUN) for i in range(PER_RUN)]
    faults = [Fault(kind, at) for kind, at in zip(drawn, places, strict=True)]
    if poisoned:
        faults = [f for f in faults if not POISON[0] - 12 <= f.at <= POISON[1] + 12] + [Fault("rollback", POISON[1])]
    return Plan(seed, elastic, poisoned, sorted(faults, key=lambda fault: fault.at))


class Machines:
    """The cluster: a head with one core, on which the driver runs, and one node with another.

    Args:
        patience: of the campaign; where it is long, nodes are slow to answer too.
    """

    def __init__(self, patience: float) -> None:
        self.silences = round(patience / 40)  # half seconds, after which a node counts as dead
        self.start()

    def start(self) -> None:
        """Bring up both."""
        from ray.cluster_utils import Cluster

        quick = {
            "health_check_initial_delay_ms": 1000,
            "health_check_period_ms": 500,
            "health_check_failure_threshold": self.silences,
        }
        head = {"num_cpus": 1, "include_dashboard": False, "_system_config": quick, "object_store_memory": 80 << 20}
        self.cluster = patiently_started(lambda: Cluster(initialize_head=True, head_node_args=head))
        self.node = self.add()

    def add(self):
        """One more node."""
        return patiently_started(lambda: self.cluster.add_node(num_cpus=1, object_store_memory=80 << 20))

    def replace(self, sig: int | None) -> None:
        """A new node for the old one, whose raylet gets a signal, or which has gone already."""
        old = self.node
        if sig is not None:
            os.kill(old.all_processes["raylet"][0].process.pid, sig)
        self.node = self.add()
        with contextlib.suppress(Exception):
            self.cluster.remove_node(old, allow_graceful=False)

    def drain(self, seconds: int) -> None:
        """Announce that the node will go."""
        command = [os.path.join(os.path.dirname(sys.executable), "ray"), "drain-node", "--address", self.address]
        command += ["--node-id", self.node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        command += ["--reason-message", "spot", "--deadline-remaining-seconds", str(seconds)]
        subprocess.run(command, check=True, capture_output=True)

    def kill(self) -> None:
        """All of it at once."""
        family = descendants(os.getpid())
        for pid, _ in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        end_all(family)
        self.stop()

    def stop(self) -> None:
        """In good order."""
        with contextlib.suppress(Exception):
            self.cluster.shutdown()

    @property
    def address(self) -> str:
        """Of the head."""
        return self.cluster.address


def patiently_started(start):
    """What ``start`` gives; a machine that is busy with other things may need some attempts, as Ray waits 30 s only."""
    for _ in range(4):
        with contextlib.suppress(Exception):  # Ray raises no other
            return start()
    return start()


class Campaign:
    """All runs share a workspace, whose ``runs`` lie on a small disk of their own where that can be had."""

    def __init__(self, work: str, patience: float) -> None:
        self.work, self.workspace, self.patience = work, f"{work}/project", patience
        self.runs = f"{self.workspace}/runs"
        self.mounted = False
        self._make_tokens()
        os.makedirs(self.runs, exist_ok=True)
        self.mounted = mount("-t", "tmpfs", "-o", "size=48m", "tmpfs", self.runs)
        self.machines = Machines(patience)
        self.undisturbed: dict[bool, np.ndarray] = {}

    def _make_tokens(self) -> None:
        if os.path.exists(f"{self.workspace}/tokens/validation/manifest.json"):
            return
        made = "import sys; sys.path.insert(0, sys.argv[2]); import ray; from training_bench import make_tokens; "
        made += "ray.init(address='local', num_cpus=2, include_dashboard=False, log_to_driver=False); "
        made += "make_tokens(sys.argv[1])"
        here = os.path.dirname(sys.modules["training_bench"].__file__)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([here, os.getcwd(), os.environ.get("PYTHONPATH", "")])}
        subprocess.run([sys.executable, "-c", made, self.workspace, here], check=True, env=env)

    def close(self) -> None:
        """End the cluster and give the disk back."""
        self.machines.stop()
        if self.mounted:
            subprocess.run(["umount", "-l", self.runs], check=False)

    def settings(self, name: str, elastic: bool, poisoned: bool) -> PretrainJob:
        """Of a run of this campaign."""
        return small_run(
            self.workspace,
            name,
            steps=STEPS,
            min_workers=1 if elastic else None,
            resize_every_seconds=2,
            start_timeout_seconds=3 if elastic else 30,
            checkpoint_every=5,
            validate_every=STEPS,
            max_failures=3,
            faults=Faults(slow_worker_seconds=0.08, poison_data_steps=POISON if poisoned else None),
        )

    def reference(self, poisoned: bool) -> np.ndarray:
        """Weights of the undisturbed run."""
        if poisoned not in self.undisturbed:
            name = f"undisturbed{'-poisoned' if poisoned else ''}"
            began = time.monotonic()
            run = Disturbed(self, self.settings(name, elastic=False, poisoned=poisoned))
            run.to_the_end()
            wrong = run.wrong(None)
            print(f"{name}: {time.monotonic() - began:.0f} s{'; ' + '; '.join(wrong) if wrong else ''}", flush=True)
            self.undisturbed[poisoned] = weights(run.settings)
        return self.undisturbed[poisoned]

    def run(self, planned: Plan) -> list[str]:
        """Carry out a plan; what is wrong with the run in the end."""
        expected = None if planned.elastic else self.reference(planned.poisoned)
        settings = self.settings(f"run-{planned.seed}", planned.elastic, planned.poisoned)
        run = Disturbed(self, settings)
        rng = random.Random(planned.seed + 1000)
        try:
            for fault in planned.faults:
                if not run.reaches(fault):
                    break
                before, began = run.step(), time.time()
                fault.told = getattr(run, fault.kind)(rng)
                run.goes_on_from(before, began, resumes=fault.kind in KILLS and not fault.told.startswith("no "))
                fault.seconds = time.time() - began
            run.to_the_end()
            return run.wrong(expected)
        except HangsError as error:
            return [str(error)]
        except Exception as error:  # the other seeds are still worth their time
            run.kill_driver()
            self.machines.kill()
            self.machines.start()
            return [f"the campaign itself failed: {type(error).__name__}: {error}"]
        finally:
            run.kill_driver()


class Disturbed:
    """One run and its driver."""

    def __init__(self, campaign: Campaign, settings: PretrainJob) -> None:
        self.campaign, self.settings = campaign, settings
        self.folder = StoredRun(f"{settings.workspace}/runs/{settings.name}")
        self.recipe = f"{campaign.work}/{settings.name}.yaml"
        self.log = f"{campaign.work}/{settings.name}.log"
        write_recipe(settings, self.recipe)
        self.starts, self.gave_up = 0, []
        self.start()

    def start(self) -> None:
        """Run the command."""
        self.starts += 1
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs", "pretrain", "--config", self.recipe],
                env={**os.environ, "RAY_ADDRESS": self.campaign.machines.address},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def watch(self) -> bool:
        """Run the command again when it has ended without finishing; True when it has finished."""
        status = self.process.poll()
        if status == 0:
            return True
        if status is not None:
            if status != -signal.SIGKILL:
                with open(self.log) as log:
                    self.gave_up.append((log.read().strip().splitlines() or [""])[-1][:200])
            if self.starts > 12:
                raise HangsError(f"the command ended {self.starts} times: {self.gave_up[-1:]}")
            self.start()
        return False

    def kill_driver(self) -> None:
        """SIGKILL; what it has started is left to Ray."""
        self.process.kill()
        self.process.wait()

    def step(self) -> int:
        """The newest step that the run tells of."""
        with contextlib.suppress(OSError, ValueError):
            told = [row["step"] for row in self.folder.metrics()[-1:]]
            return max(told + [event["step"] for event in events_of(self.folder, "checkpoint")[-1:]], default=0)
        return 0

    def wait(self, condition, what: str) -> bool:
        """Until the condition holds: True; until the run has finished: False."""
        patience = self.campaign.patience
        deadline = time.monotonic() + patience
        while not condition():
            if self.watch():
                return False
            if time.monotonic() > deadline:
                raise HangsError(f"hangs: {what} did not come in {patience:.0f} s, at step {self.step()}")
            time.sleep(0.05)
        return True

    def reaches(self, fault: Fault) -> bool:
        """Wait for a fault's moment; False when the run has finished before."""
        if fault.kind == "rollback":
            return self.wait(lambda: bool(events_of(self.folder, "rollback")), "a rollback")
        return self.wait(lambda: self.step() >= fault.at, f"step {fault.at}")

    def goes_on_from(self, step: int, since: float, resumes: bool) -> None:
        """Wait for a step behind ``step`` that was made after the fault, for one that kills after the resume."""

        def gone_on() -> bool:
            resumed = [event["time"] for event in events_of(self.folder, "resume") if event["time"] > since]
            if resumes and not resumed:
                return False
            begun = max([since, *resumed])
            with contextlib.suppress(OSError, ValueError):
                return any(row["step"] > step and row["time"] > begun for row in self.folder.metrics()[-40:])
            return False

        self.wait(gone_on, f"a step behind {step}")

    def to_the_end(self) -> None:
        """Wait until the command has finished."""
        self.wait(lambda: False, "the end")

    def wrong(self, expected: np.ndarray | None) -> list[str]:
        """What is wrong with the finished run."""
        wrong = token_record(self.settings)
        if expected is not None and not np.array_equal(weights(self.settings), expected):
            wrong.append("final weights are not those of the undisturbed run")
        if not events_of(self.folder, "end"):
            wrong.append("no event tells of the end")
        return wrong

    # Faults: each tells what it did

    def _kill_one(self, name: str, rng: random.Random) -> str:
        found = processes(name, os.getpid())
        if not found:
            return f"no {name} was there"
        os.kill(rng.choice(found), signal.SIGKILL)
        return "killed"

    def worker(self, rng: random.Random) -> str:
        """SIGKILL of a worker."""
        return self._kill_one("ray::RayTrainWorker", rng)

    def controller(self, rng: random.Random) -> str:
        """SIGKILL of the controller."""
        return self._kill_one("ray::TrainController", rng)

    def driver(self, rng: random.Random) -> str:
        """SIGKILL of the driver."""
        self.kill_driver()
        return "killed"

    def raylet(self, rng: random.Random) -> str:
        """SIGKILL of the node's raylet; a new node joins."""
        self.campaign.machines.replace(signal.SIGKILL)
        return "killed, a new node joined"

    def drain(self, rng: random.Random) -> str:
        """A preemption with a few seconds' notice."""
        seconds = rng.randrange(6, 10)
        self.campaign.machines.drain(seconds)
        gone = time.monotonic() + seconds
        self.wait(lambda: time.monotonic() > gone, "the node's deadline")
        self.campaign.machines.replace(None)
        return f"with {seconds} s notice, a new node joined"

    def machine(self, rng: random.Random) -> str:
        """Everything dies."""
        self.kill_driver()
        self.campaign.machines.kill()
        self.campaign.machines.start()
        return "killed, started anew"

    def torn(self, rng: random.Random) -> str:
        """The newest checkpoint is damaged while nobody trains."""
        self.kill_driver()
        self.wait_for_silence()
        entries = [e for e in self.folder.read_json("ledger.json")["checkpoints"] if not e["deleted"]]
        folder = f"{self.folder.folder}/{entries[-1]['folder']}"
        name = rng.choice(sorted(os.listdir(folder)))
        path = f"{folder}/{name}"
        size = os.path.getsize(path)
        if rng.random() < 0.5:
            os.truncate(path, rng.randrange(size))
            return f"driver killed, {name} of step {entries[-1]['step']} cut"
        place = rng.randrange(size)
        with open(path, "r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << rng.randrange(8)]))
        return f"driver killed, a bit of {name} of step {entries[-1]['step']} flipped"

    def wait_for_silence(self) -> None:
        """Until the workers of a killed driver are gone."""
        deadline = time.monotonic() + 60
        while processes("ray::RayTrainWorker", os.getpid()):
            if time.monotonic() > deadline:
                raise HangsError("workers outlive their driver by a minute")
            time.sleep(0.1)

    def full(self, rng: random.Random) -> str:
        """The disk fills up, and is cleared after some seconds."""
        seconds, filler = rng.uniform(4, 14), f"{self.campaign.runs}/filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as out:
            while True:
                out.write(bytes(1 << 12))
        until = time.monotonic() + seconds
        self.wait(lambda: time.monotonic() > until, "the disk's clearing")
        os.unlink(filler)
        return f"for {seconds:.0f} s"

    def storage(self, rng: random.Random) -> str:
        """Whoever opens a file to write gets an error for 30 seconds."""
        runs = self.campaign.runs
        if not (mount("--bind", runs, runs) and mount("-o", "remount,bind,ro", runs)):
            return "could not be made to fail"
        told = "for 30 s"
        try:
            until = time.monotonic() + 30
            if rng.random() < 0.5:
                self.wait(lambda: time.monotonic() > until - 30 + 8, "a while")
                told += f", meanwhile a worker {self.worker(rng)}"
            self.wait(lambda: time.monotonic() > until, "the storage's return")
        finally:
            subprocess.run(["umount", "-l", runs], check=True)
        return told

    def rollback(self, rng: random.Random) -> str:
        """A kill within a second after the run went back."""
        wait = rng.uniform(0, 0.9)
        time.sleep(wait)
        if rng.random() < 0.5:
            self.kill_driver()
            return f"driver killed {wait:.1f} s after"
        return f"worker {self.worker(rng)} {wait:.1f} s after"


def mount(*arguments: str) -> bool:
    """Whether it could be mounted."""
    return subprocess.run(["mount", *arguments], check=False, capture_output=True).returncode == 0


def may_mount() -> bool:
    """Whether this process may."""
    with tempfile.TemporaryDirectory() as folder:
        if not mount("-t", "tmpfs", "tmpfs", folder):
            return False
        subprocess.run(["umount", folder], check=True)
    return True


def main() -> None:
    """Run the seeds, print a line for each fault and one for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--work", help="folder for workspace and logs; default: a temporary one")
    parser.add_argument(
        "--patience", type=float, default=240.0, help="seconds without the awaited step after which a run hangs"
    )
    parser.add_argument("--list", action="store_true", help="print the plans and end")
    args = parser.parse_args()
    mounts = may_mount()
    plans = [plan(seed, mounts) for seed in args.seeds]
    if not mounts:
        print("no right to mount: full disks and failing storage are left out")
    if args.list:
        for planned in plans:
            print(
                planned.seed, "elastic" if planned.elastic else "fixed", *(f"{f.kind}@{f.at}" for f in planned.faults)
            )
        return
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        work = args.work or stack.enter_context(tempfile.TemporaryDirectory())
        os.makedirs(work, exist_ok=True)
        campaign = Campaign(os.path.abspath(work), args.patience)
        stack.callback(campaign.close)
        inflicted, bad = 0, []
        for planned in plans:
            start = time.monotonic()
            wrong = campaign.run(planned)
            for fault in planned.faults:
                inflicted += fault.seconds is not None
                took = f"{fault.seconds:6.1f} s" if fault.seconds is not None else "        "
                print(f"{planned.seed:>4}  {fault.kind:<10} at {fault.at:>3}  {took}  {fault.told}")
            kind = f"{'elastic' if planned.elastic else 'fixed'}{', poisoned' if planned.poisoned else ''}"
            verdict = "; ".join(wrong) or ("tokens exact" if planned.elastic else "tokens exact, weights equal")
            print(f"{planned.seed:>4}  {kind}: {verdict}, {time.monotonic() - start:.0f} s", flush=True)
            bad += [planned.seed] if wrong else []
        print(f"{inflicted} faults in {len(plans)} runs, {time.monotonic() - began:.0f} s; runs that went wrong: {bad}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
