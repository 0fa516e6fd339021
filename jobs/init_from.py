"""The model that pretraining goes on from (``pretrain.init_from``): its shape, its weights, and what is noted of it."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

from jobs.model_folder import eos_id, fingerprint, is_repository, model_folder, open_model
from jobs.settings import PretrainJob, SettingsError
from models.config import ModelConfig
from models.training.run_folder import patiently
from pipelines import storage
from pipelines.tokenizer import Tokenizer

if TYPE_CHECKING:
    from models.hugging_face import Pretrained
    from models.transformer import Transformer

log = logging.getLogger("ingot")


def shape(settings: PretrainJob) -> ModelConfig:
    """The model's shape, for the sequences of the run.

    Raises:
        SettingsError: there is no such model, it has something that cannot be represented, its tokenizer is not the
            workspace's, or it cannot be laid out over the workers.
    """
    folder, model = _open(settings)
    theirs = Tokenizer.of_model(folder, eos_id(model.content))
    own = Tokenizer.load(storage.join(settings.workspace, "tokenizer"))
    if not own.same_as(theirs):
        raise SettingsError(
            f"init_from is {settings.init_from!r}; its tokenizer is not the one in {settings.workspace}/tokenizer: "
            f"run `ingot tokenizer --from {settings.init_from}` and `ingot tokenize`"
        )
    config = model.config
    if own.vocab_size > config.vocab_size:
        raise SettingsError(
            f"init_from is {settings.init_from!r}; its vocabulary of {config.vocab_size} has no room for the "
            f"tokenizer's {own.vocab_size}"
        )
    # What it knew it keeps; training at a longer length is what makes it know longer ones.
    config = dataclasses.replace(config, max_seq_len=max(config.max_seq_len, settings.length()))
    settings.check_parallelism(config)
    return config


def read_weights(settings: PretrainJob, model: Transformer) -> None:
    """Read the weights into a model that may be spread over workers: each reads its parts, one after another."""
    folder, source = patiently(_open, settings)
    log.info("pretrain: the first weights are those in %s", folder)
    model.read_weights(source.tensors)


def facts(settings: PretrainJob) -> dict[str, Any] | None:
    """What the run notes down of the model; None of a run that starts from random weights."""
    if settings.init_from is None:
        return None
    folder, model = _open(settings)
    named = {"model": settings.init_from, "repository": is_repository(settings.init_from)}
    return {**named, "fingerprint": fingerprint(folder, model)}


def _open(settings: PretrainJob) -> tuple[str, Pretrained]:
    folder = model_folder(settings.init_from, "init_from")
    return folder, open_model(folder, "init_from")
