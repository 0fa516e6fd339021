"""Models in Hugging Face's format that settings name: a folder, here or on a storage, or a hub's repository."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any, BinaryIO

import xxhash

from jobs.settings import SettingsError
from pipelines import storage

if TYPE_CHECKING:
    from models.hugging_face import Pretrained

log = logging.getLogger("ingot")

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# what is read of a repository: it may hold the same weights in other forms too
_SMALL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
_FILES = [*_SMALL, "model*.safetensors", "model.safetensors.index.json"]
_WHOLE = 1 << 26  # bytes up to which a file of weights is hashed whole
_SAMPLES = 64  # pieces of a larger one that are hashed
_PIECE = 1 << 16


def model_folder(model: str, setting: str = "model", *, fetch: bool = True, weights: bool = True) -> str:
    """The folder of a model: its absolute path or URI, or of a repository the copy on this machine.

    Args:
        model: a folder, or a repository as OWNER/NAME or OWNER/NAME@REVISION.
        setting: that names it.
        fetch: fetch a repository; else its name is returned as it is.
        weights: they are wanted; else the tokenizer alone.

    Raises:
        SettingsError: there is neither, or the hub does not give it.
    """
    needed = "config.json" if weights else "tokenizer.json"
    if storage.exists(storage.join(model, needed)):
        return storage.absolute(model)
    if storage.is_remote(model) or storage.exists(model) or not _REPOSITORY.fullmatch(model):
        raise SettingsError(f"{setting} is {model!r}; it is neither a folder with a {needed} nor a repository's name")
    if not fetch:
        return model
    from huggingface_hub import snapshot_download

    repository, _, revision = model.partition("@")
    log.info("fetches %s from the hub, unless it is here already", model)
    try:
        return snapshot_download(repository, revision=revision or None, allow_patterns=_FILES if weights else _SMALL)
    except Exception as error:  # of the network, the hub, the cache: each library has its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SettingsError(f"{setting} is {model!r}; there is no such folder, and the hub says: {reason}") from None


def absolute(model: str) -> str:
    """A folder's path or URI that means the same in every process, or a repository's name."""
    return model if _REPOSITORY.fullmatch(model) and not storage.exists(model) else storage.absolute(model)


def is_repository(model: str) -> bool:
    """Whether ``absolute`` gave a repository's name."""
    return not storage.is_remote(model) and not model.startswith("/")


def eos_id(content: dict[str, Any]) -> int | None:
    """The token that ends a text by a model's config.json, the first of them; None where it does not say."""
    eos = content.get("eos_token_id")
    return eos[0] if isinstance(eos, list) else eos


def end_ids(folder: str, content: dict[str, Any]) -> list[int]:
    """The tokens that end a text by a model's generation_config.json, or else by its config.json."""
    generation = storage.json_if_there(storage.join(folder, "generation_config.json")) or {}
    eos = generation.get("eos_token_id", content.get("eos_token_id"))
    return eos if isinstance(eos, list) else [] if eos is None else [eos]


def open_model(folder: str, setting: str = "model") -> Pretrained:
    """The model in a folder: its shape, and weights to be read.

    Args:
        folder: of ``model_folder``.
        setting: that names the model.

    Raises:
        SettingsError: it has no weights in this format, or something that cannot be represented, which is named.
    """
    from models.hugging_face import Pretrained

    def open_file(name: str) -> BinaryIO:
        return storage.open_input(storage.join(folder, name))

    try:
        return Pretrained(folder, open_file)
    except (ValueError, FileNotFoundError) as error:
        raise SettingsError(f"{setting} is {folder!r}; {error}") from None


def fingerprint(folder: str, model: Pretrained) -> str:
    """A hash that differs where shape, weights, tokenizer or what ends texts do.

    Large files are hashed by their size, their header and pieces from all over them: training moves every weight.
    """
    digest = xxhash.xxh3_128()
    for name in _SMALL:
        uri = storage.join(folder, name)
        digest.update(storage.read_bytes(uri) if storage.exists(uri) else b"")
    for name in model.files:
        with model.open_file(name) as file:
            size = file.seek(0, 2)
            digest.update(f"{name} {size}".encode())
            step = max((size - _PIECE) // _SAMPLES, 1)
            whole = size <= _WHOLE
            for at in [0] if whole else [*range(0, size - _PIECE, step), size - _PIECE]:
                file.seek(at)
                digest.update(file.read() if whole else file.read(_PIECE))
    return digest.hexdigest()
