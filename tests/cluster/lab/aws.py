"""The laptop's side of the laboratory on AWS: cluster/aws.yaml from `ray up` to `ray down` against `cloud.Cloud`."""

import os
import secrets
import sys
import time

import yaml
from cloud import REGION, Cloud
from machines import ROOT, Laptop, for_the_laboratory
from training_bench import events_of, processes, token_record
from work import pretraining, start, submit, write_recipe

from jobs.run_folder import StoredRun, valid_steps
from pipelines.stage import read_manifest

BUCKET = "ingot-laboratory"
NOTICE_SECONDS = 60  # AWS gives 120
IDLE_MINUTES = 0.5


def main(folder):
    config = yaml.safe_load((ROOT / "cluster/aws.yaml").read_text())
    endpoint = "http://172.31.255.254:5000"
    # The nodes ask this cloud; they have no keys but those that the metadata service gives for their profile.
    lab = Laptop(
        folder,
        "172.31.255.254/16",
        config["auth"]["ssh_user"],
        {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": REGION, "RAY_prestart_worker_first_driver": "0"},
        storage=f"s3://{BUCKET}",
    )
    os.environ.update(
        AWS_ENDPOINT_URL=endpoint, AWS_DEFAULT_REGION=REGION, AWS_ACCESS_KEY_ID="laptop", AWS_SECRET_ACCESS_KEY="laptop"
    )
    os.environ["MOTO_IAM_LOAD_MANAGED_POLICIES"] = "true"
    cloud = Cloud(lab)
    cloud.s3.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})
    profiles = {kind["node_config"]["IamInstanceProfile"]["Name"] for kind in config["available_node_types"].values()}
    for name in profiles:
        cloud.iam.create_instance_profile(InstanceProfileName=name)
    lab.tell(f"the cloud is there, with the instance profiles {', '.join(sorted(profiles))}")

    lab.cluster_file = path = overlay(lab, cloud, config)
    cloud.requests.clear()  # what follows, Ray asks for
    token = lab.home / ".ray/auth_token"
    token.parent.mkdir()
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    lab.run("ray", "up", "-y", "--no-config-cache", str(path), log="up.log")
    lab.tell(f"`ray up` is done, instances: {cloud.kinds()}")
    lab.note(after_up=cloud.kinds())

    recipe = write_recipe(
        lab,
        device="gpu",
        cpus_per_worker=40,  # of the 48 that a GPU node has: one worker on each
        steps=900,
        validate_every=900,
        checkpoint_every=100,
        min_workers=1,
        resize_every_seconds=5,
        start_timeout_seconds=20,
        faults={"slow_worker_seconds": 0.5},  # nodes come and go in minutes, so that the run has to take some
    )
    curate(lab, cloud, recipe)
    pretrain(lab, cloud, recipe)
    lab.until(lambda _: f"idle nodes are gone: {cloud.kinds()}", lambda: cloud.kinds() == ["head"], 600)
    lab.note(after_idle=cloud.kinds())
    lab.run("ray", "down", "-y", str(path), log="down.log")
    lab.until("`ray down` is done: no instance is left", lambda: not cloud.instances(), 60)
    lab.note(after_down=cloud.kinds(), machines_on=sum(machine is not None for machine in cloud.on.values()))
    write_down(lab, cloud)


def overlay(lab, cloud, config):
    """The file with what this cloud has instead: an image, the setup without the internet, and a short idle time."""
    image = cloud.ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    group = cloud.security_group(config["cluster_name"])
    for kind in config["available_node_types"].values():
        kind["node_config"] |= {"ImageId": image, "SecurityGroupIds": [group]}
        if "idle_timeout_s" in kind:
            kind["idle_timeout_s"] = IDLE_MINUTES * 60
    config["idle_timeout_minutes"] = IDLE_MINUTES
    path, changed = for_the_laboratory(config, lab.folder)
    lab.note(group=group)
    lab.tell(f"of cluster/aws.yaml are changed ImageId to {image}, SecurityGroupIds to {group}, the idle times to")
    lab.tell(f"{IDLE_MINUTES} min, and the setup commands that need the internet:")
    for before, after in changed:
        lab.tell(f"  {before}  ->  {after}")
    return path


def curate(lab, cloud, recipe):
    """Curation and tokens: on CPU nodes, which start for it."""
    first = start(lab, "curate", recipe)
    lab.until(lambda _: f"nodes for curation: {cloud.kinds()}", lambda: len(cloud.kinds()) > 1, 300)
    seen = set()

    def ended():
        seen.update(cloud.kinds())
        return first.poll() is not None

    lab.until("`ingot submit curate` has ended", ended, 900)
    assert first.returncode == 0, (lab.folder / "curate.log").read_text()[-6000:]
    lab.note(kinds_for_curation=sorted(seen), curated=read_manifest(f"{lab.workspace}/corpus/near")["documents_out"])
    for job in ("tokenizer", "tokenize"):
        assert submit(lab, job, recipe) == 0
    lab.until(lambda _: f"idle nodes are gone: {cloud.kinds()}", lambda: cloud.kinds() == ["head"], 600)


def pretrain(lab, cloud, recipe):
    """Two GPU nodes from zero, one lost without a word, one after a notice, and the run to its end."""
    settings = pretraining(recipe)
    run = StoredRun(f"{lab.workspace}/runs/{settings.name}")
    job = start(lab, "pretrain", recipe)

    def alive(condition):
        def there():
            assert job.poll() is None, (lab.folder / "pretrain.log").read_text()[-6000:]
            return condition()

        return there

    def gpu_nodes():
        return [i for i in cloud.instances() if i["Tags"].get("ray-user-node-type", "").startswith("gpu-")]

    def size():
        """Machines on which a worker trains."""
        return sum(bool(processes("ray::RayTrainWorker", on.pid)) for on in list(cloud.on.values()) if on is not None)

    def step():
        return max(valid_steps(run.metrics(), "loss"), default=0)

    def trains_on_two(after):
        return lambda: size() == 2 and step() > after and step()

    lab.until(lambda _: f"nodes for pretraining: {cloud.kinds()}", alive(lambda: len(gpu_nodes()) >= 2), 300)
    lab.note(kinds_for_pretraining=cloud.kinds())
    lab.until(lambda at: f"pretraining on 2 nodes is at step {at}", alive(trains_on_two(120)), 600)

    victim, at, known = gpu_nodes()[-1], step(), len(events_of(run, "resume"))
    lab.tell(f"spot loss without notice of {victim['PrivateIpAddress']} after step {at}")
    cloud.take(victim)
    without = lab.until(
        lambda e: (
            f"the run goes on from step {e[0]['from_step']} with {e[0]['world_size']} workers ({e[0]['cause']}): "
            f"{at - e[0]['from_step']} steps are taken again"
        ),
        alive(lambda: events_of(run, "resume")[known:]),
        600,
    )[0]
    lab.note(without_notice=[at, without["from_step"], without["cause"]])
    lab.until("its place is taken", alive(lambda: len(gpu_nodes()) >= 2), 600)
    lab.until(lambda at: f"pretraining on 2 nodes again, at step {at}", alive(trains_on_two(at)), 900)

    victim, known = gpu_nodes()[0], len(events_of(run, "resume"))
    before = step()
    end = time.time() + NOTICE_SECONDS
    cloud.spot_capacity = False  # the autoscaler looks for another one as soon as it is told
    cloud.announce(victim, NOTICE_SECONDS)
    lab.tell(f"notice for {victim['PrivateIpAddress']} after step {before}: {NOTICE_SECONDS} s")
    lab.until(
        lambda e: f"training was told and saved at step {e[-1]['step']}",
        alive(lambda: [e for e in events_of(run, "interrupt") if e["reason"] == "preemption"]),
        NOTICE_SECONDS,
    )
    while time.time() < end - 0.5:
        time.sleep(0.1)
    at = step()
    cloud.take(victim)
    lab.tell(f"its time is over after step {at}, it is taken; meanwhile there was no spot capacity: {cloud.kinds()}")
    lab.note(kinds_without_spot=cloud.kinds(), refused=cloud.refused)
    cloud.spot_capacity = True
    announced = lab.until(
        lambda e: (
            f"the run goes on from step {e[0]['from_step']} with {e[0]['world_size']} workers ({e[0]['cause']}): "
            f"{at - e[0]['from_step']} steps are taken again, of {settings.checkpoint_every} between checkpoints"
        ),
        alive(lambda: events_of(run, "resume")[known:]),
        600,
    )[0]
    lab.note(with_notice=[at, announced["from_step"], announced["cause"]], checkpoint_every=settings.checkpoint_every)
    saves = [e["step"] for e in events_of(run, "interrupt") if e["reason"] == "preemption"]
    lab.tell(f"just-in-time checkpoints at steps {saves}")
    lab.until(lambda _: f"its place is taken: {cloud.kinds()}", alive(lambda: len(gpu_nodes()) >= 2), 600)
    lab.note(kinds_without_spot=cloud.kinds())
    lab.until(lambda at: f"pretraining on 2 nodes again, at step {at}", alive(trains_on_two(at)), 900)
    lab.until("`ingot submit pretrain` has ended", lambda: job.poll() is not None, 1800)
    rows = valid_steps(run.metrics(), "loss")
    lab.note(
        status=job.returncode,
        steps=len(rows),
        wanted_steps=settings.steps,
        losses=[rows[min(rows)]["loss"], rows[max(rows)]["loss"]],
        wrong_tokens=token_record(settings),
        saves=saves,
    )
    lab.tell(f"exit status {job.returncode}, loss {rows[min(rows)]['loss']:.3f} to {rows[max(rows)]['loss']:.3f}")


def write_down(lab, cloud):
    """What the API has received, for the test to judge."""
    lab.note(
        launches=cloud.asked("RunInstances"), actions=sorted({request.get("Action", "?") for request in cloud.requests})
    )


if __name__ == "__main__":
    main(sys.argv[1])
