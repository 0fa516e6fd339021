"""A trained model, ready to use, with its tokenizer: a run's checkpoint, or a folder in Llama format."""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import xxhash

from jobs.model_folder import end_ids, eos_id, fingerprint, model_folder, open_model
from jobs.run_folder import StoredRun
from jobs.settings import OfRun, SettingsError
from pipelines import storage
from pipelines.stage import read_manifest
from pipelines.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    from models.training.ledger import Entry
    from models.transformer import Transformer

log = logging.getLogger("ingot")

Settings = TypeVar("Settings", bound=OfRun)


@dataclass
class Trained:
    """What ``load`` gives.

    Attributes:
        model: on the GPU in bf16 when there is one, else on the CPU in fp32; in evaluation mode.
        tokenizer: that the model's tokens were made with.
        ends: ids that end a text; a model that was trained to talk may have several.
        step: of the checkpoint; None for a model that is no run's.
        device: where the model is.
        name: of the run, or of the model's folder or repository.
        fingerprint: of weights, shape and tokenizer: equal fingerprints mean equal answers.
        masked: whether it was trained with attention within documents alone (``mask_documents``).
    """

    model: Transformer
    tokenizer: Tokenizer
    ends: frozenset[int]
    step: int | None
    device: torch.device
    name: str
    fingerprint: str
    masked: bool = False


def load(settings: OfRun, device: str | None = None) -> Trained:
    """Load the run or the model that the settings name; ``device`` None takes a GPU when there is one.

    Raises:
        SettingsError: there is no such run, checkpoint or model, or one that cannot be represented.
        FileNotFoundError: the tokenizer is not there.
    """
    import torch

    from models.parallel import parallelize

    load_one = _load_run if settings.model is None else _load_model
    model, tokenizer, ends, step, name, made_of = load_one(settings)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    masked = settings.model is None and find(settings)[1].get("settings", {}).get("mask_documents", False)
    return Trained(parallelize(model, None, where).eval(), tokenizer, ends, step, where, name, made_of, masked)


def located(settings: Settings) -> Settings:
    """The settings with paths for any process; refuses what is not there before anything is asked of a cluster.

    Raises:
        SettingsError: there is no such run, checkpoint or model.
    """
    settings = dataclasses.replace(settings, workspace=storage.absolute(settings.workspace))
    if settings.model is None:
        find(settings)
        return settings
    # a repository is fetched where it is used
    return dataclasses.replace(settings, model=model_folder(settings.model, fetch=False))


def find(settings: OfRun) -> tuple[StoredRun, dict[str, Any], Entry]:
    """The run that the settings name: its folder, its run.json, and the checkpoint to take.

    Raises:
        SettingsError: there is no such run or checkpoint.
    """
    workspace = storage.absolute(settings.workspace)
    folder = StoredRun(storage.join(workspace, "runs", settings.name))
    facts = folder.read_json("run.json")
    if facts is None:
        raise SettingsError(f"name is {settings.name!r}; there is no such run in {workspace}/runs")
    return folder, facts, _checkpoint(folder, settings)


def model_name(model: str) -> str:
    """What a model that is no run's is called in the workspace: the last part of its folder or repository."""
    return storage.file_name(model)


def run_fingerprint(settings: OfRun) -> str:
    """``Trained.fingerprint`` of a run's checkpoint, without loading it.

    Raises:
        SettingsError: there is no such run or checkpoint.
    """
    return _fingerprint_of(*find(settings))


def _fingerprint_of(folder: StoredRun, facts: dict[str, Any], entry: Entry) -> str:
    from models.training.checkpoints import read_receipt

    # The receipt has the hashes of the checkpoint's files.
    receipt = read_receipt(folder, entry.folder) or {}
    parts = [facts["model"], facts["tokenizer"], entry.step, receipt.get("files")]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())


def _load_run(settings: OfRun) -> tuple[Transformer, Tokenizer, frozenset[int], int, str, str]:
    from models.config import ModelConfig
    from models.training.checkpoints import load_weights
    from models.transformer import Transformer

    workspace = storage.absolute(settings.workspace)
    folder, facts, entry = find(settings)
    tokenizer = Tokenizer.load(storage.join(workspace, "tokenizer"))
    made = read_manifest(storage.join(workspace, "tokenizer"))
    if made is None or made["fingerprint"] != facts["tokenizer"]:
        raise SettingsError(
            f"tokenizer: the one in {workspace}/tokenizer is not the one that run {settings.name} was trained with; "
            "it was trained anew since"
        )
    model = Transformer(ModelConfig(**facts["model"]), seed=None)
    try:
        load_weights(folder, entry.folder, model)
    except ValueError as error:
        raise SettingsError(f"step is {entry.step}; {error}") from None
    ends = frozenset([tokenizer.eot_id])
    return model, tokenizer, ends, entry.step, settings.name, _fingerprint_of(folder, facts, entry)


def _load_model(settings: OfRun) -> tuple[Transformer, Tokenizer, frozenset[int], None, str, str]:
    from models.transformer import Transformer

    folder = model_folder(settings.model)
    pretrained = open_model(folder)
    tokenizer = Tokenizer.of_model(folder, eos_id(pretrained.content))
    rows = pretrained.config.vocab_size
    if tokenizer.vocab_size > rows:
        raise SettingsError(f"model is {settings.model!r}; its tokenizer has {tokenizer.vocab_size} ids, it has {rows}")
    model = Transformer(pretrained.config, seed=None)
    try:
        model.read_weights(pretrained.tensors)
    except ValueError as error:
        raise SettingsError(f"model is {settings.model!r}; {error}") from None
    ends = frozenset([tokenizer.eot_id, *end_ids(folder, pretrained.content)])
    return model, tokenizer, ends, None, model_name(settings.model), fingerprint(folder, pretrained)


def _checkpoint(folder: StoredRun, settings: OfRun) -> Entry:
    """The checkpoint of ``settings.step``, or the newest usable one."""
    from models.training.ledger import LEDGER, Ledger

    ledger = Ledger.from_dict(folder.read_json(LEDGER))
    if settings.step is None:
        entry = next(ledger.usable(), None)
        if entry is None:
            raise SettingsError(f"name is {settings.name!r}; this run has no usable checkpoint yet")
        return entry
    kept = [entry for entry in ledger.entries if not entry.deleted and entry.status != "corrupt"]
    for entry in kept:
        if entry.step == settings.step:
            if entry.status == "poisoned":
                log.warning("step %d of run %s is poisoned: the run went back from it", entry.step, settings.name)
            return entry
    steps = ", ".join(str(entry.step) for entry in kept) or "none"
    raise SettingsError(f"step is {settings.step}; the checkpoints of run {settings.name} are of steps {steps}")
