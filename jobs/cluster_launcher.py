"""Checks a file of ``ray up``: Ray's own schema and preparation first, then what they let pass."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import re
import shutil
import subprocess
from typing import Any

from jobs import cluster_clouds
from jobs.cluster_clouds import COMMANDS
from jobs.cluster_file import ClusterFile, Where

# What Ray reads below `provider`; its schema lets anything stand there.
_PROVIDER_KEYS = {
    "aws": "region availability_zone cache_stopped_nodes use_internal_ips security_group cloudwatch key_pair",
    "gcp": "region availability_zone cache_stopped_nodes use_internal_ips project_id gcp_credentials",
    "azure": "location resource_group subscription_id cache_stopped_nodes use_internal_ips use_external_head_ip "
    "availability_zone subnet_mask unique_id msi_name msi_resource_group tags",
    "local": "head_ip worker_ips external_head_ip",
}
_HAS_TO_SAY = {
    "aws": ("region",),
    "gcp": ("project_id", "region", "availability_zone"),
    "azure": ("location", "resource_group"),
    "local": ("head_ip", "worker_ips"),
}


def check(cluster: ClusterFile, needed: dict[str, str]) -> None:
    """Note what is wrong with the file, and its kinds of nodes.

    Args:
        cluster: the file; gets problems, kinds, limits and a title.
        needed: versions that all nodes have to run, by name: ray, python.
    """
    config = cluster.documents[0]
    if len(cluster.documents) > 1:
        cluster.error((), "holds several documents, of which `ray up` reads only one")
        return
    provider = config.get("provider")
    if not isinstance(provider, dict) or str(provider.get("type")) not in _PROVIDER_KEYS:
        cluster.error(("provider",), f"type has to be one of {', '.join(_PROVIDER_KEYS)}; others are not known here")
        return
    kind = provider["type"]
    cluster.title = " ".join(str(provider[key]) for key in ("type", "region", "location") if key in provider)
    for key in set(provider) - {"type"} - set(_PROVIDER_KEYS[kind].split()):
        cluster.error(("provider", key), f"Ray's provider {kind} knows no such setting")
    for key in set(_HAS_TO_SAY[kind]) - set(provider):
        cluster.error(("provider",), f"{key} is missing")
    if set(_HAS_TO_SAY[kind]) - set(provider):
        return
    prepared = _prepared(cluster, config)
    if prepared is None:
        return
    cluster.most_workers = prepared["max_workers"]
    _commands(cluster, config, kind)
    _versions(cluster, config, needed)
    _secrets(cluster, config)
    cluster_clouds.check(cluster, config, prepared)


def _prepared(cluster: ClusterFile, config: dict[str, Any]) -> dict[str, Any] | None:
    """The file as `ray up` sees it: defaults filled in, held against Ray's schema; None when Ray refuses it."""
    import click
    import jsonschema
    from ray import autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    with open(os.path.join(os.path.dirname(autoscaler.__file__), "ray-schema.json"), encoding="utf-8") as file:
        schema = json.load(file)
    local = config["provider"]["type"] == "local"
    said = io.StringIO()
    logging.getLogger("ray.autoscaler").setLevel(logging.ERROR)  # it tells of every default that it fills in
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            prepared = prepare_config(copy.deepcopy(config))
    except (click.ClickException, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        cluster.error((), f"Ray cannot prepare it: {_plain(said.getvalue()) or error or type(error).__name__}")
        return None
    errors = sorted(jsonschema.Draft7Validator(schema).iter_errors(prepared), key=lambda error: list(error.path))
    for error in errors:
        # The nodes of `local` are written by Ray, not in the file.
        where: Where = tuple(error.absolute_path) if not local or "available_node_types" not in error.path else ()
        cluster.error(where, f"against Ray's schema: {error.message[:200]}")
    if errors:
        return None
    try:
        validate_config(prepared)
    except (ValueError, RuntimeError) as error:
        cluster.error((), f"Ray refuses it: {error}")
        return None
    return prepared


def _plain(text: str) -> str:
    """Ray's terminal output without its colors."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


def _commands(cluster: ClusterFile, config: dict[str, Any], kind: str) -> None:
    """Commands have to be given, since Ray's own would install a nightly build and open the dashboard; and be shell."""
    for key in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        nobody = key.startswith("worker") and kind == "local" and not config["provider"]["worker_ips"]
        if not config.get(key) and not nobody:
            risk = "install a nightly build of Ray" if key == "setup_commands" else "open the dashboard to the network"
            cluster.error((key,), f"has to be given: Ray's own commands would {risk}")
    bash = shutil.which("bash")
    for key in COMMANDS:
        for number, command in enumerate(config.get(key) or []):
            if bash:
                parsed = subprocess.run([bash, "-n", "-c", command], capture_output=True, text=True, check=False)
                if parsed.returncode:
                    cluster.error((key, number), f"is no shell command: {parsed.stderr.strip().splitlines()[0]}")
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        if config.get(key) and sum("ray start" in command for command in config[key]) != 1:
            cluster.error((key,), "has to start Ray once (`ray start`)")


def _versions(cluster: ClusterFile, config: dict[str, Any], needed: dict[str, str]) -> None:
    """Every version that the file names, in commands and images, against the ones that are needed."""
    installs, pythons = False, {}
    for key in COMMANDS:
        for number, command in enumerate(config.get(key) or []):
            for version in re.findall(r"\bray(?:\[[\w,\s-]*\])?\s*==\s*([\w.]+)", command):
                if version != needed["ray"]:
                    cluster.error((key, number), f"installs Ray {version}, but Ingot needs {needed['ray']}")
            for version in re.findall(r"\bpython\s?(3\.\d+)\b|--python (3\.\d+)\b", command):
                pythons.setdefault("".join(version), (key, number))
            installs |= bool(re.search(r"pip install\b.*\bingot\b", command))
    _pythons(cluster, pythons, needed)
    image = str(config.get("docker", {}).get("image", ""))
    if (found := re.search(r"rayproject/ray[\w-]*:(\d[\w.]*)", image)) and found[1] != needed["ray"]:
        cluster.error(("docker", "image"), f"holds Ray {found[1]}, but Ingot needs {needed['ray']}")
    if not installs and not image:
        cluster.error(("setup_commands",), "install no Ingot: jobs find neither Ray nor PyTorch on the nodes")
    _mounts(cluster, config)


def _pythons(cluster: ClusterFile, pythons: dict[str, Where], needed: dict[str, str]) -> None:
    """One Python on all nodes, new enough."""
    if len(pythons) > 1:
        cluster.error(("setup_commands",), f"nodes get Python {' and '.join(pythons)}: all have to run the same")
    for version, where in pythons.items():
        if int(version.partition(".")[2]) < 11:
            cluster.error(where, f"installs Python {version}, but Ingot needs 3.11 or newer")
        elif version != needed["python"]:
            cluster.note(where, f"nodes get Python {version}, this machine runs {needed['python']}; jobs do not mind")


def _mounts(cluster: ClusterFile, config: dict[str, Any]) -> None:
    """What is brought to the nodes is here, and what is installed there is brought."""
    mounts = config.get("file_mounts", {})
    local = re.search(r"pip install\b.*(?:~|\$HOME)/ingot(?![\w-])", " ".join(config.get("setup_commands") or []))
    if local and not {"~/ingot", "~/ingot/pyproject.toml"} & set(mounts):
        cluster.error(("file_mounts",), "~/ingot is installed on the nodes, but not brought to them")
    for remote, local in mounts.items():
        if not local.startswith(("~", "/")) and not os.path.exists(local):
            cluster.note(("file_mounts", remote), f"there is no {local!r} here: run `ray up` from the checkout")


def _secrets(cluster: ClusterFile, config: dict[str, Any]) -> None:
    """Nobody without the token, and nothing but the nodes' own network."""
    commands = [
        (key, number, command)
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for number, command in enumerate(config.get(key) or [])
        if "ray start" in command
    ]
    for key, number, command in commands:
        if not re.search(r"\bRAY_AUTH_MODE=token\b", command):
            text = "RAY_AUTH_MODE=token is missing: whoever reaches the node could run code on it"
            cluster.error((key, number), text)
        if re.search(r"0\.0\.0\.0|--dashboard-host[= ]\s*(?:::|'::'|\"::\")", command):
            cluster.error((key, number), "opens a port to every network (0.0.0.0)")
        if "--head" in command and not re.search(r"--dashboard-host[= ](?:127\.0\.0\.1|localhost)\b", command):
            text = "--dashboard-host=127.0.0.1 is missing: the dashboard runs jobs, and is reached through ssh"
            cluster.error((key, number), text)
    here = config["provider"]["type"] == "local" and not config["provider"]["worker_ips"]
    if config.get("file_mounts", {}).get("~/.ray/auth_token") != "~/.ray/auth_token" and not here:
        text = "the token is not brought to the nodes: ~/.ray/auth_token: ~/.ray/auth_token is missing"
        cluster.error(("file_mounts",), text)
    setup = " ".join(config.get("setup_commands") or [])
    if not re.search(r"chmod 600 ~/\.ray/auth_token", setup):
        text = "`chmod 600 ~/.ray/auth_token` is missing: others on the node could read the token"
        cluster.error(("setup_commands",), text)
    if not re.fullmatch(r"[\w-]+", str(config["cluster_name"])):
        cluster.error(
            ("cluster_name",), f"is {config['cluster_name']!r}; names and labels of nodes are made of it: a-z, 0-9, -"
        )
    if not config.get("auth", {}).get("ssh_user"):
        cluster.error(("auth",), "ssh_user is missing")
    if config.get("auth", {}).get("ssh_user") == "root":
        cluster.error(("auth", "ssh_user"), "is root: everything that jobs run would be root's")
