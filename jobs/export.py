"""``ingot export``: a trained model as a folder that ``transformers`` loads, also for llama.cpp, and onto a hub.

The folder is whole when ``config.json`` is there, without which nothing loads it: it is deleted first and written last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from jobs.gguf import pre_tokenizer, require_architecture, require_gguf, write_gguf
from jobs.model_card import model_card
from jobs.placing import Write, place
from jobs.settings import ExportJob, SettingsError
from jobs.trained import Trained, load, located, model_name
from pipelines import storage
from pipelines.tokenizer import END_OF_TEXT, PAD

log = logging.getLogger("ingot")

CONFIG = "config.json"
_LIST = ".ingot-export.json"  # names of what the export consists of: the next one deletes nothing else
_SMALL = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md", CONFIG)
_UNFINISHED = re.compile(r"\.[^/]+\.[0-9a-f]{8}")  # what a writer that was killed leaves
# exports once had no list; they are known by their model card
_CARD = b'tags: ["ingot", '
_BEFORE = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|model\.safetensors\.index)\.json|README\.md|"
    r"model(-\d{5}-of-\d{5})?\.safetensors|[^/]+-(F32|F16|BF16|Q8_0)\.gguf"
)


def run(settings: ExportJob) -> None:
    """Write the folder.

    Raises:
        SettingsError: there is no such run, checkpoint or model; the folder holds something else or the model itself;
            llama.cpp cannot have the model, or the hub does not take it.
    """
    settings = located(settings)
    if settings.gguf is not None:
        require_gguf()
    # On a cluster it is done in another process, whose working directory is another.
    settings = dataclasses.replace(settings, output=settings.output and storage.absolute(settings.output))
    output = _output(settings)
    if settings.model is not None and output == settings.model:
        raise SettingsError(f"output is {output!r}, which holds the model itself: an export replaces all; name another")
    place(_export, settings, sys.stdout.write)


def _output(settings: ExportJob) -> str:
    name = settings.name if settings.model is None else model_name(settings.model)
    return settings.output or storage.join(settings.workspace, "exports", name)


def _export(settings: ExportJob, device: str, _: Write) -> None:
    hub = None if settings.push_to is None else _hub(settings)  # refused before the work is done
    trained = load(settings, device)
    if settings.gguf is not None:
        require_architecture(trained.model.config)
        pre_tokenizer(trained.tokenizer)
    output = _output(settings)
    write(settings, trained, output)
    of = "" if trained.step is None else f"step {trained.step} of "
    log.info("export: %s%s is in %s", of, trained.name, output)
    if hub is not None:
        _push(hub, settings, output, f"{of}{trained.name}, exported by Ingot")


def write(settings: ExportJob, trained: Trained, output: str) -> None:
    """Write the folder; one file of weights at a time lies on this machine's disk beside it.

    Args:
        settings: of the export.
        trained: what is exported.
        output: path or URI of the folder.

    Raises:
        SettingsError: the folder holds something else.
    """
    import torch
    from safetensors.torch import save_file

    from models.hugging_face import config_content, weight_files

    _make_room(output)
    tokenizer, config = trained.tokenizer, trained.model.config
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings.dtype]
    files = []
    with _beside(output) as local:

        def announce(name: str) -> None:
            files.append(name)
            _write_json(f"{output}/{_LIST}", {"files": [*files, *_SMALL]})

        def keep(name: str) -> None:
            with open(f"{local}/{name}", "rb") as source, storage.open_output(f"{output}/{name}") as target:
                shutil.copyfileobj(source, target, 1 << 24)
            storage.delete(f"{local}/{name}")

        for name, content in weight_files(trained.model.state_dict(), config, dtype, settings.shard_bytes()):
            announce(name)
            if isinstance(content, dict):
                save_file(content, f"{local}/{name}", metadata={"format": "pt"})
                keep(name)
            else:
                storage.write_bytes(f"{output}/{name}", content.encode())
        if settings.gguf is not None:
            name = f"{trained.name}-{settings.gguf.upper()}.gguf"
            announce(name)
            write_gguf(trained.model, tokenizer, f"{local}/{name}", settings.gguf, name=trained.name)
            keep(name)
    storage.write_bytes(f"{output}/tokenizer.json", tokenizer.backend.to_str(pretty=True).encode())
    _write_json(f"{output}/tokenizer_config.json", tokenizer_content(trained))
    _write_json(f"{output}/generation_config.json", generation_content(trained))
    storage.write_bytes(f"{output}/README.md", model_card(settings, trained, files).encode())
    ids = (tokenizer.eot_id, tokenizer.bos_id, tokenizer.pad_id)
    _write_json(f"{output}/{CONFIG}", config_content(config, *ids, dtype))


def tokenizer_content(trained: Trained) -> dict[str, Any]:
    """What ``tokenizer_config.json`` says: base settings, without a chat template."""
    if trained.tokenizer.config:
        return {key: value for key, value in trained.tokenizer.config.items() if key != "chat_template"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        # as in training: special tokens that are written out in a text are text
        "split_special_tokens": True,
        "model_max_length": trained.model.config.max_seq_len,
    }


def generation_content(trained: Trained) -> dict[str, Any]:
    """What ``generation_config.json`` says: greedy, and never an id that the tokenizer does not have."""
    tokenizer, rows = trained.tokenizer, trained.model.config.vocab_size
    unused = list(range(tokenizer.vocab_size, rows))
    others = sorted(trained.ends - {tokenizer.eot_id})
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": [tokenizer.eot_id, *others] if others else tokenizer.eot_id,
        "pad_token_id": tokenizer.pad_id,
        "do_sample": False,
        **({"suppress_tokens": unused} if unused else {}),
    }


def _write_json(uri: str, content: dict[str, Any]) -> None:
    storage.write_bytes(uri, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _make_room(output: str) -> None:
    """Delete an earlier export, whole or not.

    Raises:
        SettingsError: there is something that no export has put there; nothing is deleted.
    """
    try:
        files = [file.uri for file in storage.list_files(output, hidden=True)]
    except FileNotFoundError:
        return
    below = storage.absolute(output).rstrip("/") + "/"
    uri_of = {uri.removeprefix(below): uri for uri in files}
    listed = storage.json_if_there(f"{output}/{_LIST}")
    if listed is not None:
        ours = {_LIST, *listed["files"]} | {name for name in uri_of if _UNFINISHED.fullmatch(name)}
    elif "README.md" in uri_of and _CARD in storage.read_bytes(uri_of["README.md"]):
        ours = {name for name in uri_of if _BEFORE.fullmatch(name)}
    else:
        ours = set()
    others = sorted(uri_of.keys() - ours)
    if others:
        raise SettingsError(
            f"output is {output!r}; that folder holds something else than an export, such as {uri_of[others[0]]}: "
            "name another folder, or move it away"
        )
    storage.delete(f"{output}/{CONFIG}")
    if uri_of:
        _write_json(f"{output}/{_LIST}", {"files": sorted(uri_of.keys() - {_LIST})})
    for name in uri_of.keys() - {_LIST}:
        storage.delete(uri_of[name])


@contextlib.contextmanager
def _beside(output: str) -> Iterator[str]:
    """A folder on this machine for files on their way: on the output's own disk if that is here."""
    path = storage.local_path(output)
    parent = None
    if path is not None:
        parent = path.rstrip("/").rpartition("/")[0] or "/"
        os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=parent) as local:
        yield local


def _hub(settings: ExportJob) -> Any:
    """The hub's client.

    Raises:
        SettingsError: nobody is logged in.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise SettingsError(
            f"push_to is {settings.push_to!r}; nobody is logged in to the hub: set HF_TOKEN or run `hf auth login`"
        )
    return HfApi()


def _push(hub: Any, settings: ExportJob, output: str, message: str) -> None:
    """Push the folder, in one commit.

    Raises:
        SettingsError: the hub does not take it.
    """
    with contextlib.ExitStack() as opened:
        folder = storage.local_path(output)
        if folder is None:
            folder = opened.enter_context(tempfile.TemporaryDirectory())
            for file in storage.list_files(output):
                name = f"{folder}/{storage.file_name(file.uri)}"
                with storage.open_input(file.uri) as source, open(name, "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 24)
        try:
            hub.create_repo(settings.push_to, private=not settings.public, exist_ok=True)
            # what an earlier export left, such as a file more of weights, goes with the same commit
            stale = ["*.safetensors", "*.gguf", "model.safetensors.index.json"]
            hub.upload_folder(
                repo_id=settings.push_to,
                folder_path=folder,
                commit_message=message,
                delete_patterns=stale,
                ignore_patterns=[_LIST],
            )
        except Exception as error:  # of the network and the hub
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise SettingsError(
                f"push_to is {settings.push_to!r}; the export is in {output}, but the hub says: {reason}"
            ) from None
    kind = "public" if settings.public else "private"
    log.info("export: pushed to %s, which is %s if it is new", settings.push_to, kind)
