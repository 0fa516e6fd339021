"""The laptop's side of the laboratory on machines over ssh: brings cluster/on-prem.yaml up, works on it, breaks it."""

import os
import sys
import time
from pathlib import Path

import yaml
from machines import ROOT, Laptop, call, for_the_laboratory
from strangers import gone, open_ports, scan, without_token
from training_bench import events_of, processes, token_record
from work import pretraining, start, submit, write_recipe

from jobs.run_folder import StoredRun, valid_steps
from pipelines.stage import read_manifest

CUT_AT_STEP = 60


def main(folder):
    config = yaml.safe_load((ROOT / "cluster/on-prem.yaml").read_text())
    ips = [config["provider"]["head_ip"], *config["provider"]["worker_ips"]]
    network = ips[0].rpartition(".")[0]
    lab = Laptop(folder, f"{network}.1/24", config["auth"]["ssh_user"])
    key = os.path.expanduser(config["auth"]["ssh_private_key"])
    call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    public = Path(f"{key}.pub").read_text()
    machines = [lab.machine(f"host{number}", ip, [public]) for number, ip in enumerate(ips)]
    lab.tell(f"three hosts are up: {', '.join(ips)}")
    for machine in machines:
        lab.until(f"{machine.name} answers ssh", lambda ip=machine.ip: open_ports(ip, [22]), 30)

    path, changed = for_the_laboratory(config, folder)
    lab.tell("of cluster/on-prem.yaml are changed, as there is no internet, the setup commands:")
    for before, after in changed:
        lab.tell(f"  {before}  ->  {after}")
    lab.cluster_file = path
    lab.run("ray", "get-auth-token", "--generate", log="token.log")
    (lab.home / ".ray/auth_token").chmod(0o600)
    lab.run("ray", "up", "-y", "--no-config-cache", str(path), log="up.log")
    lab.tell("`ray up` is done")
    tunnel = lab.start("ray", "dashboard", str(path), log="dashboard.log")
    lab.until("the dashboard answers through `ray dashboard`", lambda: open_ports("127.0.0.1", [8265]))
    nodes(lab, 3, "three nodes have joined")

    scan(lab, machines)
    without_token(lab, ips[0])
    lab.stop(tunnel)

    # The head gives no cores to jobs, so that one host is left when one of two is lost.
    recipe = write_recipe(
        lab, steps=500, validate_every=500, min_workers=1, resize_every_seconds=10, start_timeout_seconds=15
    )
    assert submit(lab, "curate", recipe) == 0
    lab.note(curated=read_manifest(f"{lab.workspace}/corpus/near")["documents_out"])
    for job in ("tokenizer", "tokenize"):
        assert submit(lab, job, recipe) == 0
    lose_a_host(lab, machines, recipe)

    lab.run("ray", "down", "-y", str(path), log="down.log")
    lab.tell("`ray down` is done: it has stopped the head, whose loss the others notice after a minute")
    gone(lab, machines)


def lose_a_host(lab, machines, recipe):
    """Train on two hosts, cut one of them off in mid-run, and see the run to its end."""
    settings = pretraining(recipe)
    run = StoredRun(f"{lab.workspace}/runs/{settings.name}")
    job = start(lab, "pretrain", recipe)

    def step():
        assert job.poll() is None, (lab.folder / "pretrain.log").read_text()
        return max(valid_steps(run.metrics(), "loss"), default=0)

    def training_on():
        return [machine.name for machine in machines if processes("ray::RayTrainWorker", machine.pid)]

    def resumes():
        return events_of(run, "resume")

    lab.until("training on two hosts", lambda: step() >= CUT_AT_STEP and len(training_on()) == 2, 600)
    before, known = training_on(), len(resumes())
    lost = next(machine for machine in machines[1:] if machine.name in before)
    at, began = step(), time.monotonic()
    lost.cut()
    lab.tell(f"{lost.name} is cut off after step {at}; trained were {', '.join(before)}")
    resumed = lab.until("the run goes on", lambda: resumes()[known:], 400)[0]
    seconds = time.monotonic() - began
    after = [name for name in training_on() if name != lost.name]
    again = at - resumed["from_step"]
    lab.tell(
        f"from step {resumed['from_step']} on {', '.join(after)}, {seconds:.0f} s after the cut; {again} steps again"
    )
    lost.mend()
    lab.tell(f"{lost.name} is on the network again")
    lab.until("`ingot submit pretrain` has ended", lambda: job.poll() is not None, 1200)
    for event in resumes()[known + 1 :]:
        lab.tell(f"meanwhile: {event['cause']}, from step {event['from_step']} with {event['world_size']} workers")
    rows = valid_steps(run.metrics(), "loss")
    losses = [rows[min(rows)]["loss"], rows[max(rows)]["loss"]]
    lab.note(
        status=job.returncode,
        steps=len(rows),
        wanted_steps=settings.steps,
        losses=losses,
        wrong_tokens=token_record(settings),
        hosts_before=before,
        hosts_after=after,
        lost=lost.name,
        cause=resumed["cause"],
        steps_again=again,
        checkpoint_every=settings.checkpoint_every,
        seconds_until_resumed=seconds,
    )
    lab.tell(f"exit status {job.returncode}, loss {losses[0]:.3f} to {losses[1]:.3f}")


def nodes(lab, count, what):
    """Wait until Ray knows as many nodes."""
    address = "http://127.0.0.1:8265"

    def alive():
        listed = lab.run("ray", "list", "nodes", "--address", address, "--format", "yaml", check=False)
        if listed.returncode:
            return False
        return [node["node_ip"] for node in yaml.safe_load(listed.stdout) or [] if node["state"] == "ALIVE"]

    lab.until(what, lambda: len(alive() or []) == count, 240, every=3)


if __name__ == "__main__":
    main(sys.argv[1])
