"""`ingot cluster check`: the files that come with Ingot pass; each damage to one of them gets its own sentence."""

import contextlib
import gzip
import importlib.util
import json
import os
import random
import re
from pathlib import Path

import pytest
import yaml

from jobs import cluster as command
from jobs.cluster import check, report
from jobs.cluster_file import prices, read
from jobs.machine_types import machine
from jobs.settings import SettingsError

ROOT = Path(__file__).parents[2]
LAUNCHED = sorted((ROOT / "cluster").glob("*.yaml"))
KUBERNETES = sorted((ROOT / "cluster/kubernetes").glob("*.yaml"))


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def errors(cluster):
    return [f"{problem.place}: {problem.text}" for problem in cluster.problems if problem.fatal]


def notes(cluster):
    return [f"{problem.place}: {problem.text}" for problem in cluster.problems if not problem.fatal]


def small_recipe(folder, workspace="s3://bucket/project", **pretrain):
    """A recipe of one section, so that reading it is quick."""
    path = folder / "recipe.yaml"
    path.write_text(
        yaml.safe_dump({"workspace": workspace, "pretrain": {"device": "gpu", "workers": 8, "steps": 100, **pretrain}})
    )
    return str(path)


@pytest.fixture
def damaged(tmp_path):
    """Write a file of ours with something replaced that is there once; returns its path."""

    def write(name, old, new):
        text = (ROOT / "cluster" / name).read_text()
        assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
        path = tmp_path / "damaged.yaml"
        path.write_text(text.replace(old, new))
        return str(path)

    return write


@pytest.mark.parametrize("path", [*LAUNCHED, *KUBERNETES], ids=lambda path: path.name)
def test_files_that_come_with_ingot_have_no_errors(path):
    cluster, _ = check(str(path))
    assert errors(cluster) == []
    # What is left to say is what the user has to put in, or a client that is not installed here.
    assert all(re.search("your own|not installed", note) for note in notes(cluster)), notes(cluster)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("max_workers: 20 ", "max_worker: 20 ", "('max_worker' was unexpected)"),
        ("  region: us-west-2\n", "  region: us-west-2\n  zone: a\n", "provider.zone: Ray's provider aws knows no"),
        ("InstanceType: r7i.4xlarge", "InstanceTyp: r7i.4xlarge", "EC2 would refuse it: Unknown parameter in input"),
        ("MarketType: spot", "MarketType: spott", "EC2 knows no 'spott'"),
        ("InstanceType: r7i.4xlarge", "InstanceType: r7i.5xlarge", "EC2 knows no 'r7i.5xlarge'; there are r7i"),
        ("      SecurityGroupIds: [sg-your-group]\n", "", "the group that Ray would make lets ssh in from everywhere"),
        ("  use_internal_ips: true\n", "", "use_internal_ips: true is missing"),
        ("HttpTokens: required", "HttpTokens: optional", "HttpTokens has to be `required`"),
        ("VolumeSize: 200", "VolumeSize: 40", "a disk of 40 GB is too small"),
        (
            "# price: r7i.4xlarge 1.06 USD/h on demand, seen 2025-06\n",
            "",
            "no price: a line `# price: r7i.4xlarge 1.23",
        ),
        (", ~4.60 spot", "", "the price of g6e.12xlarge says nothing about spot"),
        (
            "    max_workers: 8\n    priority: 10",
            "    max_workers: 8\n    priority: 0",
            "above that of the same machine",
        ),
        ("RAY_enable_autoscaler_v2=1 ", "", "RAY_enable_autoscaler_v2=1 is missing"),
        ("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "opens a port to every network (0.0.0.0)"),
        ("  ~/.ray/auth_token: ~/.ray/auth_token\n", "", "the token is not brought to the nodes"),
        ('bin/python "ingot', 'bin/python ray==2.9.0 "ingot', "installs Ray 2.9.0, but Ingot needs 2.60.0"),
        ("venv --quiet --python 3.11", "venv --quiet --python 3.10", "installs Python 3.10, but Ingot needs 3.11"),
        ("setup_commands:\n", "setup_commands:\n  - test -x (\n", "is no shell command"),
    ],
)
def test_damage_to_a_file_of_ray_up_is_named(damaged, old, new, said):
    if "EC2" in said:
        pytest.importorskip("botocore", reason="boto3 is not installed")
    cluster, _ = check(damaged("aws.yaml", old, new))
    assert any(said in error for error in errors(cluster)), errors(cluster)


GCP_SPOT = 'GPU: 4, "accelerator_type:L4": 1, memory: 144000000000}\n    idle_timeout_s: 300          #'
GCP_NETWORK = """      networkInterfaces:
        - subnetwork: projects/your-project/regions/us-central1/subnetworks/default
"""


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("gcp.yaml", GCP_SPOT, GCP_SPOT.replace("4", "8", 1), "resources.GPU: is 8, but g2-standard-48 has 4"),
        ("gcp.yaml", "{CPU: 16, memory", "{CPU: 32, memory", "resources.CPU: is 32, but n2-highmem-16 has 16"),
        ("gcp.yaml", GCP_NETWORK, "", "Ray's own give the node an address outside"),
        ("gcp.yaml", "STANDARD, onHostMaintenance: TERMINATE", "STANDARD", "onHostMaintenance has to be TERMINATE"),
        ("gcp.yaml", "machineType: n2-highmem-16", "machinetype: n2-highmem-16", "machinetype"),
        ("azure.yaml", "vmSize: Standard_E16s_v5", "vmsize: Standard_E16s_v5", "Ray's template has no such parameter"),
        ("azure.yaml", "cache_stopped_nodes: false ", "cache_stopped_nodes: true ", "would go on paying"),
        ("azure.yaml", "availability_zone: auto", "use_external_head_ip: true", "lets ssh in from anywhere"),
        ("azure.yaml", "sudo mount -t nfs", "sudo mkdir", "# shared: /mnt/ingot: no command mounts it"),
        ("azure.yaml", "osDiskSize: 200", "osDiskSize: large", "it has to be of type int"),
        ("on-prem.yaml", "    - 192.168.1.12", "    - 192.168.1.1122", "is no address"),
        ("on-prem.yaml", "    - 192.168.1.12", "    - 192.168.1.11", "192.168.1.11 is there twice"),
        ("on-prem.yaml", "head_ip: 192.168.1.10", "head_ip: 127.0.0.1", "would look for the head on themselves"),
        ("on-prem.yaml", "max_workers: 2", "max_workers: 3", "max_workers: is above the 2 worker_ips"),
        ("on-prem.yaml", "ssh_user: ingot", "ssh_user: root", "is root"),
        ("on-prem.yaml", "  ssh_user: ingot                # not root\n", "", "auth: ssh_user is missing"),
        ("on-prem.yaml", "  ~/ingot/pyproject.toml: pyproject.toml\n", "", "installed on the nodes, but not brought"),
        ("laptop.yaml", "  head_ip: 127.0.0.1\n", "", "provider: head_ip is missing"),
    ],
)
def test_each_provider_has_its_own_damage(damaged, name, old, new, said):
    cluster, _ = check(damaged(name, old, new))
    assert any(said in error for error in errors(cluster)), errors(cluster)


SHM = "                - {name: shm, mountPath: /dev/shm}    # Ray's object store, and NCCL between the GPUs of a pod\n"


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        (
            "raycluster",
            "Replicas: 8\n      priority: 10",
            "Replica: 8\n      priority: 10",
            "'maxReplica' was unexpected",
        ),
        ("raycluster", "containerPort: 6379", "containerPorts: 6379", "'containerPorts' was unexpected"),
        ("raycluster", "rayVersion: 2.60.0", "rayVersion: 2.59.0", "is 2.59.0, but Ingot needs Ray 2.60.0"),
        ("raycluster", "ingot:0.1.0", "ingot:0.0.9", "ingot:0.0.9: here it is Ingot 0.1.0"),
        ("raycluster", "mode: token", "mode: disabled", "authOptions: mode: token is missing"),
        ("raycluster", "serviceType: ClusterIP", "serviceType: LoadBalancer", "is LoadBalancer, which opens the head"),
        ("raycluster", "version: v2", "version: v1", "version: v2 is missing"),
        ("raycluster", 'limits: {cpu: "15", memory: 115Gi}', 'limits: {cpu: "15", memory: 120Gi}', "have to be equal"),
        ("raycluster", SHM, "", "no volume in memory is mounted for shared memory"),
        ("raycluster", "sizeLimit: 110Gi", "sizeLimit: 400Gi", "volume shm in memory is larger than the memory limit"),
        ("raycluster", "# price: cpu 1.06 USD/h on demand, seen 2025-06\n", "", "no price: a line `# price: cpu"),
        ("rayjob-pretrain", " replicas: 2\n", " replicas: 3\n", "replicas 3 is not between minReplicas 2 and max"),
        ("rayjob-pretrain", "-m jobs pretrain", "-m jobs pretrian", "runs no job of Ingot"),
        (
            "rayjob-tune",
            "    authOpt",
            "    enableInTreeAutoscaling: true\n    authOpt",
            "Kueue admits a job as a whole",
        ),
        ("namespace", "policyTypes: [Ingress]", "policytypes: [Ingress]", "'policytypes' was unexpected"),
        (
            "namespace",
            "          podSelector: {matchLabels: {app.kubernetes.io/name: kuberay-operator}}\n",
            "",
            "all namespaces",
        ),
        ("rayjob-curate", "submissionMode: K8sJobMode", "submissionMode: JobMode", "has to be one of K8sJobMode"),
        ("redis", "allowPrivilegeEscalation: false, ", "", "allowPrivilegeEscalation: false is missing"),
        ("redis", "runAsUser: 999", "runAsUser: redis", "'redis' is not of type 'integer'"),
        ("kueue", "  clusterQueue: ingot", "  clusterQueue: other", "there is no ClusterQueue other"),
        ("kueue", "whenCanPreempt: Try", "whenCantPreempt: Try", "'whenCantPreempt' was unexpected"),
    ],
)
def test_damage_to_a_kubernetes_file_is_named(damaged, name, old, new, said):
    cluster, _ = check(damaged(f"kubernetes/{name}.yaml", old, new))
    assert any(said in error for error in errors(cluster)), errors(cluster)


def test_a_key_that_is_said_twice_is_refused_with_its_line(damaged):
    path = damaged("aws.yaml", "upscaling_speed: 1.0\n", "upscaling_speed: 1.0\nupscaling_speed: 2.0\n")
    line = (ROOT / "cluster/aws.yaml").read_text().splitlines().index("upscaling_speed: 1.0") + 2
    with pytest.raises(SettingsError, match=rf"damaged\.yaml:{line}: upscaling_speed is said twice"):
        check(path)


def test_errors_say_the_line(damaged):
    cluster, _ = check(damaged("gcp.yaml", "{CPU: 16, memory", "{CPU: 32, memory"))
    (problem,) = [problem for problem in cluster.problems if problem.fatal]
    line = (ROOT / "cluster/gcp.yaml").read_text().splitlines()[problem.line - 1]
    assert "resources: {CPU: 16, memory" in line


def test_a_recipe_that_fits_gets_its_nodes_and_their_price(tmp_path):
    cluster, (plan,) = check(str(ROOT / "cluster/aws.yaml"), small_recipe(tmp_path, workers=16, cpus_per_worker=4))
    assert errors(cluster) == []
    # 16 GPUs are four machines with four each; spot first. By the notes: 4 x 4.60 + 0.20, and 4 x 10.49 + 0.20.
    assert (plan.kind.name, plan.nodes, plan.fallback.name) == ("gpu-spot", 4, "gpu-on-demand")
    (row,) = [line for line in report(cluster, [plan]) if line.strip().startswith("pretrain")]
    assert "16 x 1 GPU, 4 CPU" in row
    assert "4 x gpu-spot" in row
    assert "~18.60" in row
    assert "gpu-on-demand: 42.16" in row


def test_cores_count_as_well_as_gpus(tmp_path):
    # A machine of 48 cores has room for two workers with 20 each, whatever its 4 GPUs would take.
    _, (plan,) = check(str(ROOT / "cluster/aws.yaml"), small_recipe(tmp_path, workers=8, cpus_per_worker=20))
    assert plan.nodes == 4


def test_a_recipe_that_does_not_fit_is_refused(tmp_path):
    cluster, (plan,) = check(str(ROOT / "cluster/aws.yaml"), small_recipe(tmp_path, workers=128))
    assert plan.kind is None
    # 8 spot and 8 on demand, of 4 GPUs each.
    (error,) = errors(cluster)
    assert "pretrain needs 128 workers with 1 GPU and 1 CPU each; machines of one type have room for 64" in error


def test_a_recipe_that_makes_do_with_fewer_workers_is_told(tmp_path):
    recipe = small_recipe(tmp_path, workers=128, min_workers=32, global_batch=128)
    cluster, _ = check(str(ROOT / "cluster/aws.yaml"), recipe)
    assert errors(cluster) == []
    assert any("it starts with them (min_workers is 32)" in note for note in notes(cluster))


def test_a_job_with_pods_of_its_own_is_held_against_them(tmp_path):
    path = str(ROOT / "cluster/kubernetes/rayjob-pretrain.yaml")
    cluster, (plan,) = check(path, small_recipe(tmp_path, workers=8))
    assert errors(cluster) == []
    assert plan.nodes == 2
    cluster, _ = check(path, small_recipe(tmp_path, workers=9))
    assert any("machines of one type have room for 8" in error for error in errors(cluster))


@pytest.mark.parametrize("workspace", ["workspace", "/home/me/project"])
def test_a_workspace_of_each_node_is_refused_where_there_are_several(tmp_path, workspace):
    recipe = small_recipe(tmp_path, workspace, device="cpu")
    for name in ("aws.yaml", "on-prem.yaml", "kubernetes/raycluster.yaml"):
        cluster, _ = check(str(ROOT / "cluster" / name), recipe)
        assert any(f"workspace is {workspace!r}, a path of each node's own" in error for error in errors(cluster)), name
    cluster, _ = check(str(ROOT / "cluster/laptop.yaml"), recipe)
    assert errors(cluster) == []


def test_a_workspace_that_all_nodes_mount_is_taken(tmp_path):
    recipe = small_recipe(tmp_path, "/mnt/ingot/project")
    for name in ("on-prem.yaml", "azure.yaml"):
        cluster, _ = check(str(ROOT / "cluster" / name), recipe)
        assert errors(cluster) == [], name


def test_claims_are_shared_when_every_pod_mounts_them_and_they_let_many_write(tmp_path):
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "ingot"}}
    claim["spec"] = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Ti"}}}
    text = (ROOT / "cluster/kubernetes/raycluster.yaml").read_text()
    document = json.loads(json.dumps(yaml.safe_load(text)))  # without parts that are one and the same
    groups = [document["spec"]["headGroupSpec"], *document["spec"]["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        pod["volumes"].append({"name": "ingot", "persistentVolumeClaim": {"claimName": "ingot"}})
        pod["containers"][0]["volumeMounts"].append({"name": "ingot", "mountPath": "/mnt/ingot"})
    notes_on_prices = "".join(line for line in text.splitlines(keepends=True) if line.startswith("# price:"))
    recipe, path = small_recipe(tmp_path, "/mnt/ingot/project"), tmp_path / "cluster.yaml"

    def found():
        path.write_text(notes_on_prices + yaml.safe_dump_all([claim, document]))
        return errors(check(str(path), recipe)[0])

    assert found() == []
    claim["spec"]["accessModes"] = ["ReadWriteOnce"]
    assert any("the claim ingot is not ReadWriteMany" in error for error in found())
    claim["spec"]["accessModes"] = ["ReadWriteMany"]
    groups[-1]["template"]["spec"]["containers"][0]["volumeMounts"].pop()
    assert any("not all pods mount the claim ingot at /mnt/ingot" in error for error in found())


def test_command_says_what_is_wrong_and_returns_2(damaged, capsys):
    assert command.main(["check", str(ROOT / "cluster/laptop.yaml")]) == 0
    assert "nothing wrong" in capsys.readouterr().out
    assert command.main(["check", damaged("laptop.yaml", "=0 RAY_AUTH_MODE=token ~", "=0 ~")]) == 2
    out = capsys.readouterr().out
    assert "RAY_AUTH_MODE=token is missing: whoever reaches the node could run code on it" in out
    assert "1 error" in out


def test_whatever_is_in_a_file_is_told_and_not_stumbled_over(tmp_path):
    """Files of ours with one value of another kind, or without one key."""
    rng, path = random.Random(0), tmp_path / "cluster.yaml"
    sources = [list(yaml.safe_load_all(path.read_text())) for path in (*LAUNCHED, *KUBERNETES)]
    for _ in range(40):
        documents = json.loads(json.dumps(rng.choice(sources)))  # without parts that are one and the same
        part = rng.choice(documents)
        while True:
            key = rng.choice(list(part) if isinstance(part, dict) else range(len(part)))
            if not isinstance(part[key], dict | list) or not part[key] or rng.random() < 0.2:
                break
            part = part[key]
        if rng.random() < 0.2:
            del part[key]
        else:
            part[key] = rng.choice(["x", None, 7, -1, True, [], {}, {"a": 1}, ["a"]])
        path.write_text(yaml.safe_dump_all(documents))
        with contextlib.suppress(SettingsError):
            check(str(path))


def test_kinds_that_are_not_ours_are_let_pass_and_typos_of_ours_are_not(tmp_path):
    path = tmp_path / "role.yaml"
    path.write_text("apiVersion: rbac.authorization.k8s.io/v1\nkind: Role\nmetadata: {name: a}\n")
    cluster, _ = check(str(path))
    assert (errors(cluster), len(notes(cluster))) == ([], 1)
    path.write_text("apiVersion: ray.io/v1\nkind: RayClusters\nmetadata: {name: a}\n")
    assert any("RayClusters is not known here" in error for error in errors(check(str(path))[0]))


def test_a_sweep_needs_what_its_trials_take_at_once(tmp_path):
    path = tmp_path / "recipe.yaml"
    tune = {"concurrent_trials": 16, "pretrain": {"device": "gpu", "gpus_per_worker": 0.5, "steps": 100}}
    path.write_text(yaml.safe_dump({"workspace": "s3://bucket/a", "tune": tune}))
    _, (plan,) = check(str(ROOT / "cluster/aws.yaml"), str(path))
    # 16 trials with half a GPU each: eight GPUs, two machines.
    assert (plan.need.workers, plan.nodes) == (16, 2)


def test_price_notes_are_read_or_refused():
    (price,) = prices("# price: p5.48xlarge 55.04 USD/h on demand, ~25.00 spot, seen 2026-11\nkey: 1\n").values()
    assert (price.on_demand, price.spot, price.seen) == (55.04, 25.0, "2026-11")
    with pytest.raises(SettingsError, match="cannot be read; it has to be"):
        prices("# price: p5.48xlarge 55 dollars\n")
    with pytest.raises(SettingsError, match="two prices for a"):
        prices("# price: a 1 USD/h on demand, seen 2026-01\n# price: a 2 USD/h on demand, seen 2026-02\n")


@pytest.mark.parametrize("text", ["a: [1", "- a\n- b\n", ""])
def test_yaml_that_is_no_cluster_is_refused(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError):
        read(str(path))


def test_machine_types_are_what_aws_says():
    """Against the list of the EC2 API that moto ships."""
    moto = importlib.util.find_spec("moto")
    if moto is None:
        pytest.skip("moto is not installed")
    with gzip.open(os.path.join(os.path.dirname(moto.origin), "ec2/resources/instance_types.json.gz")) as file:
        known = json.load(file)
    compared = 0
    for name, said in known.items():
        if (held := machine(name)) is None:
            continue
        gpus = said.get("GpuInfo", {}).get("Gpus", [])
        assert held.cpus == said["VCpuInfo"]["DefaultVCpus"], name
        assert held.memory == said["MemoryInfo"]["SizeInMiB"] / 1024, name
        assert held.gpus == sum(gpu["Count"] for gpu in gpus), name
        assert not gpus or gpus[0]["Name"] == held.accelerator, name
        compared += 1
    assert compared > 500
