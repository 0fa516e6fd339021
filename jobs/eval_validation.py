"""Loss and bits per byte of a trained model on the validation split."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from jobs.settings import SettingsError
from pipelines import storage
from pipelines.stage import require_manifest

if TYPE_CHECKING:
    from jobs.trained import Trained


def validation(trained: Trained, workspace: str, samples: int, batch: int) -> dict[str, float]:
    """Loss in nats a token and bits a byte over sequences of the validation split.

    The sequences, and what attention sees of them, are those that pretraining validates on, when ``samples`` is its
    ``validation_samples``.

    Raises:
        SettingsError: the token shards were made with another tokenizer than the workspace's, or with more tokens than
            the model knows.
    """
    import torch

    from models.attention import document_index
    from models.loss import IGNORE, inputs_and_targets
    from pipelines.batches import Batches
    from pipelines.shards import TokenShards

    config = trained.model.config
    shards = TokenShards(storage.join(workspace, "tokens/validation"))
    if (
        shards.manifest["tokenizer"]
        != require_manifest(storage.join(workspace, "tokenizer"), "tokenizer")["fingerprint"]
    ):
        raise SettingsError(
            f"{shards.folder}: was made with another tokenizer than the one in {workspace}/tokenizer; "
            "run `ingot tokenize` again"
        )
    if shards.manifest["vocab_size"] > config.vocab_size:
        raise SettingsError(
            f"{shards.folder}: has a vocabulary of {shards.manifest['vocab_size']}, but the model one of "
            f"{config.vocab_size}; evaluate a run that was trained on these shards"
        )
    split = Batches(shards, config.max_seq_len, batch, seed=0)
    lengths = torch.zeros(config.vocab_size, dtype=torch.int64)
    of_tokenizer = torch.from_numpy(trained.tokenizer.byte_lengths())
    lengths[: len(of_tokenizer)] = of_tokenizer
    nats, tokens, size = 0.0, 0.0, 0.0
    for rows, weights in split.in_order(samples, 0, 1, batch):
        inputs, targets = inputs_and_targets(torch.from_numpy(rows[weights > 0]))
        there = inputs.to(trained.device)
        documents = document_index(there, trained.tokenizer.eot_id) if trained.masked else None
        with torch.inference_mode():
            losses = trained.model(there, targets.to(trained.device), reduction="none", documents=documents)
        nats += losses.double().sum().item()
        targets = targets[targets != IGNORE]
        tokens += targets.numel()
        size += lengths[targets].sum().item()
    return {"validation_loss": nats / tokens, "validation_bits_per_byte": nats / math.log(2) / size}
