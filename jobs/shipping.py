"""What `ingot submit` ships to a cluster: the program, the recipe, and paths that mean there what they mean here."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import os
import socket
import zipfile
from dataclasses import dataclass
from typing import Any

from jobs.settings import SettingsError
from pipelines import storage

PACKAGES = ("pipelines", "models", "jobs")


def is_here(ip: str) -> bool:
    """Whether an address is one of this machine's: only those can be bound."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((ip, 0))
    except OSError:
        return False
    return True


@dataclass
class Paths:
    """What paths of this machine become on a cluster."""

    address: str
    """The cluster's, for messages."""
    elsewhere: list[str]
    """Its nodes on other machines."""

    def workspace(self, uri: str) -> str:
        """A workspace that means the same here and there.

        Raises:
            SettingsError: a relative path, and the cluster has nodes on other machines.
        """
        if storage.is_remote(uri) or uri.startswith(("/", "~", "file://")):
            return uri
        self._require_here("workspace", uri)
        return os.path.abspath(uri)

    def settle(self, setting: str, value: Any) -> Any:
        """``value`` with every relative path of something that exists here made absolute, in lists and dicts too.

        Raises:
            SettingsError: there is such a path, and the cluster has nodes on other machines.
        """
        if isinstance(value, dict):
            return {key: self.settle(f"{setting}.{key}".strip("."), item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.settle(f"{setting}.{number}", item) for number, item in enumerate(value)]
        looks_like_path = isinstance(value, str) and "/" in value and "://" not in value and "\n" not in value
        if not looks_like_path or value.startswith(("/", "~")) or not glob.glob(value, recursive=True):
            return value
        self._require_here(setting, value)
        return os.path.abspath(value)

    def _require_here(self, setting: str, value: str) -> None:
        if self.elsewhere:
            raise SettingsError(
                f"{setting} is {value!r}, a path of this machine, but nodes of the cluster at {self.address} run on "
                f"others ({', '.join(self.elsewhere[:3])}); give s3://…, gs://… or the absolute path of a file system "
                "that every node mounts"
            )


def program() -> dict[str, bytes]:
    """The files of the program by their path: of the checkout that this is run in, else of the installed one."""
    root = os.getcwd()
    if not all(os.path.isfile(os.path.join(root, name, "__init__.py")) for name in PACKAGES):
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    files = {}
    for name in PACKAGES:
        for folder, folders, names in os.walk(os.path.join(root, name)):
            folders[:] = [inner for inner in folders if inner != "__pycache__" and not inner.startswith(".")]
            for file in names:
                if not file.startswith(".") and not file.endswith(".pyc"):
                    path = os.path.join(folder, file)
                    files[os.path.relpath(path, root)] = _content(path)
    if os.path.isfile(os.path.join(root, "pyproject.toml")):  # a checkout; says the version
        files["pyproject.toml"] = _content(os.path.join(root, "pyproject.toml"))
    return files


def _content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def package(files: dict[str, bytes]) -> tuple[str, bytes]:
    """A package for the cluster to unpack, named after its content: the same files always make the same one.

    Args:
        files: contents by path.

    Returns:
        The URI that Ray knows it by, and the package itself, a zip.
    """
    digest, packed = hashlib.sha256(), io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(files):
            digest.update(f"{path}\0{len(files[path])}\0".encode() + files[path])
            archive.writestr(zipfile.ZipInfo(path), files[path], zipfile.ZIP_DEFLATED)  # of 1980, not of now
    return f"gcs://_ray_pkg_{digest.hexdigest()[:32]}.zip", packed.getvalue()


def upload(address: str, headers: dict[str, str], uri: str, packed: bytes) -> int:
    """Give the cluster a package unless it has it already; returns the bytes that were sent.

    Raises:
        OSError: the cluster is out of reach, or does not take it.
    """
    import requests

    place = f"{address}/api/packages/{uri.replace('://', '/')}"
    has_it = requests.get(place, headers=headers, timeout=60)
    if has_it.status_code == 200:
        return 0
    taken = requests.put(place, data=packed, headers=headers, timeout=600)
    taken.raise_for_status()
    return len(packed)


def ship_arguments(job: str, arguments: list[str], files: dict[str, bytes], paths: Paths) -> list[str]:
    """The job's arguments as the cluster needs them: recipes as shipped files, paths settled, no workspace.

    Args:
        job: that they are for.
        arguments: as they were given here.
        files: what is shipped; the recipes are added.
        paths: what paths become.

    Raises:
        SettingsError: a recipe is not there, or names paths of this machine that the cluster cannot see.
    """
    import yaml

    from jobs.cli import job_section

    shipped: list[str] = []
    pairs = _options(arguments)
    for name, value in pairs:
        if value is None:
            shipped.append(name)
        elif name == "--workspace":
            continue
        elif name == "--config":
            if not os.path.isfile(value):
                raise SettingsError(f"config is {value!r}; there is no such file")
            with open(value, encoding="utf-8") as file:
                section = job_section(yaml.safe_load(file), job) or {}
            section.pop("workspace", None)
            recipe = f"recipe-{len(shipped)}.yaml"
            files[recipe] = yaml.safe_dump(paths.settle("", section), sort_keys=False).encode()
            shipped += [name, recipe]
        else:
            settled = value
            if value.lstrip().startswith(("[", "{")):
                with contextlib.suppress(yaml.YAMLError):
                    inner = yaml.safe_load(value)
                    changed = paths.settle(name.lstrip("-"), inner)
                    settled = value if changed == inner else yaml.safe_dump(changed, default_flow_style=True).strip()
            else:
                settled = paths.settle(name.lstrip("-"), value)
            shipped.append(f"{name}={settled}")
    return shipped


def _options(arguments: list[str]) -> list[tuple[str, str | None]]:
    """``--name value`` and ``--name=value`` as pairs; what stands alone has no value."""
    pairs: list[tuple[str, str | None]] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word.startswith("--") and "=" in word:
            pairs.append(tuple(word.split("=", 1)))
        elif word.startswith("--") and rest and not rest[0].startswith("--"):
            pairs.append((word, rest.pop(0)))
        else:
            pairs.append((word, None))
    return pairs
