"""What a run reads from its workspace: token shards in the order of training, validation samples, documents by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.run_folder import StoredRun
from jobs.settings import PretrainJob, SettingsError
from models.config import ModelConfig
from models.training.run_folder import patiently
from pipelines import storage
from pipelines.batches import Batches, prefetch
from pipelines.shards import TokenShards
from pipelines.stage import require_manifest

if TYPE_CHECKING:
    import torch

EXCERPT = 300  # characters of a document that events quote


def check_fits(settings: PretrainJob) -> tuple[dict[str, Any], ModelConfig]:
    """Manifest of the workspace's training tokens, and the model's shape for them.

    Raises:
        SettingsError: the vocabulary is too small, a sequence longer than a split, or the tokenizer another one; or
            there is no model to go on from that fits.
        FileNotFoundError: the token shards or the tokenizer are not there.
    """
    train = check_tokens(settings)
    if settings.init_from is not None:
        from jobs.init_from import shape

        return train, shape(settings)
    return train, settings.model.config(train["vocab_size"], settings.length())


def of_run(settings: PretrainJob, run: StoredRun) -> tuple[dict[str, Any], ModelConfig]:
    """``check_fits`` for a run, which once it was started needs the model no more that it went on from."""
    facts = None if settings.init_from is None else run.read_json("run.json")
    if facts is None or facts["settings"].get("init_from") != settings.init_from:
        return check_fits(settings)
    return check_tokens(settings), ModelConfig(**facts["model"])


def check_tokens(settings: PretrainJob) -> dict[str, Any]:
    """Manifest of the workspace's training tokens.

    Raises:
        SettingsError: a sequence is longer than a split, or the tokenizer another one.
        FileNotFoundError: the token shards or the tokenizer are not there.
    """
    manifests = {}
    for split in ("train", "validation"):
        manifests[split] = require_manifest(storage.join(settings.workspace, "tokens", split), "tokenize")
        try:
            reader(settings, split)
        except ValueError as error:
            raise SettingsError(f"sequence_length is {settings.length()}; {error}") from None
    train = manifests["train"]
    tokenizer = storage.join(settings.workspace, "tokenizer")
    if require_manifest(tokenizer, "tokenizer")["fingerprint"] != train["tokenizer"]:
        raise SettingsError(
            f"{settings.workspace}/tokens/train: made with another tokenizer than the one in {tokenizer} now; "
            "run `ingot tokenize` again"
        )
    return train


def reader(settings: PretrainJob, split: str) -> Batches:
    """The batches of a split as the run orders them."""
    shards = TokenShards(storage.join(settings.workspace, "tokens", split))
    return Batches(shards, settings.length(), settings.data_batch(), settings.seed)


def microbatch(settings: PretrainJob, world: int) -> int:
    """Sequences that each of ``world`` workers takes at a time."""
    share = -(-settings.global_batch // world)
    return min(settings.microbatch or share, share)


def training_batches(
    settings: PretrainJob, vocab_size: int, rank: int, world: int, pin: bool
) -> Callable[[int, Callable[[int], int]], Iterator[torch.Tensor]]:
    """What the loop draws its tokens from: a function of the data step to begin at and of the rule that skips some.

    Args:
        settings: of the run.
        vocab_size: of the tokenizer, for rehearsed poison.
        rank: of this worker among those that see different samples.
        world: their number.
        pin: put the tokens into page-locked memory, from where they reach a GPU without a copy.
    """
    import torch

    def batches(data_step: int, skip: Callable[[int], int]) -> Iterator[torch.Tensor]:
        source = reader(settings, "train")  # its own: the thread of a stream that was just closed may still be reading

        def ahead() -> Iterator[torch.Tensor]:
            at = data_step
            while True:
                at = skip(at)
                samples = patiently(source.rank, at, rank, world)
                samples = poisoned(samples, at, rank, settings.faults.poison_data_steps, vocab_size)
                tokens = torch.from_numpy(samples)
                yield tokens.pin_memory() if pin else tokens
                at += 1

        return prefetch(ahead())

    return batches


def poisoned(
    samples: np.ndarray, data_step: int, rank: int, poison: tuple[int, int] | None, vocab_size: int
) -> np.ndarray:
    """The rehearsed poison in place of a share of a batch, (rows, sequence_length + 1) int64.

    From data step to data step: its own tokens shuffled, one token repeated, tokens drawn at random.
    """
    if poison is None or not poison[0] <= data_step < poison[1]:
        return samples
    random = np.random.default_rng(data_step * 1009 + rank)
    noise = random.integers(0, vocab_size, samples.shape)
    kind = (data_step - poison[0]) % 3
    if kind == 0:
        noise = random.permuted(samples, axis=1)
    elif kind == 1:
        noise = np.broadcast_to(noise[:, :1], samples.shape)
    return np.where((samples < 0).all(1, keepdims=True), samples, noise)  # rows that fill up stay that


def validation_batches(
    settings: PretrainJob, rank: int, world: int, rows: int | None = None
) -> Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]]:
    """A function that yields this worker's samples of the validation split and their weights, ``rows`` at a time."""
    import torch

    source = reader(settings, "validation")
    rows = rows or microbatch(settings, world)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for samples, weights in source.in_order(settings.validation_samples, rank, world, rows):
            yield torch.from_numpy(samples), torch.from_numpy(weights)

    return batches


def byte_lengths(settings: PretrainJob, vocab_size: int) -> torch.Tensor:
    """Bytes that each token stands for, (vocab_size,) int64; ids that the tokenizer does not have stand for none."""
    import torch

    from pipelines.tokenizer import Tokenizer

    known = Tokenizer.load(storage.join(settings.workspace, "tokenizer")).byte_lengths()
    lengths = torch.zeros(vocab_size, dtype=torch.int64)
    lengths[: len(known)] = torch.from_numpy(known)
    return lengths


def end_of_text(settings: PretrainJob) -> int:
    """The token that ends documents."""
    from pipelines.tokenizer import Tokenizer

    return Tokenizer.load(storage.join(settings.workspace, "tokenizer")).eot_id


def documents(settings: PretrainJob, places: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """What stands in samples of the training data.

    Args:
        settings: of the run.
        places: data step and row in the global batch of each sample.

    Returns:
        For each sample id, source and url of the document that has most of it, and ``excerpt``, the beginning of its
        text there; ``others`` lists the ids of further documents in the sample.
    """
    from pipelines.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(storage.join(settings.workspace, "tokenizer"))
    source = reader(settings, "train")
    told = []
    for data_step, row in places:
        main, *others = source.documents(data_step, row)
        text = tokenizer.decode(main.pop("tokens")[:EXCERPT].tolist())[:EXCERPT]
        told.append({**main, "excerpt": text, "others": [other["id"] for other in others]})
    return told
