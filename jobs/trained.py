"""A trained run, ready to use: its model with a checkpoint's weights, and the tokenizer."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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


@dataclass
class Trained:
    """What ``load`` gives.

    Attributes:
        model: on the GPU in bf16 when there is one, else on the CPU in fp32; in evaluation mode.
        tokenizer: that the run's tokens were made with.
        step: of the checkpoint.
        device: where the model is.
    """

    model: Transformer
    tokenizer: Tokenizer
    step: int
    device: torch.device


def load(settings: OfRun, device: str | None = None) -> Trained:
    """Load the run that the settings name; ``device`` None takes a GPU when there is one.

    Raises:
        SettingsError: there is no such run or checkpoint.
        FileNotFoundError: the tokenizer is not there.
    """
    import torch

    from models.config import ModelConfig
    from models.parallel import parallelize
    from models.training.checkpoints import load_weights
    from models.transformer import Transformer

    workspace = storage.absolute(settings.workspace)
    folder, facts, entry = find(settings)
    tokenizer = Tokenizer.load(storage.join(workspace, "tokenizer"))
    config = ModelConfig(**facts["model"])
    made = read_manifest(storage.join(workspace, "tokenizer"))
    if made is None or made["fingerprint"] != facts["tokenizer"]:
        raise SettingsError(
            f"tokenizer: the one in {workspace}/tokenizer is not the one that run {settings.name} was trained with; "
            "it was trained anew since"
        )
    model = Transformer(config, seed=None)
    try:
        load_weights(folder, entry.folder, model)
    except ValueError as error:
        raise SettingsError(f"step is {entry.step}; {error}") from None
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Trained(parallelize(model, None, where).eval(), tokenizer, entry.step, where)


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
