"""``ingot tokenizer``: train a byte-level BPE on the curated corpus, or take a model's."""

from __future__ import annotations

from jobs.model_folder import eos_id, model_folder
from jobs.session import ray_session
from jobs.settings import TokenizerJob, part_of
from pipelines import storage, tokenizer
from pipelines.curate import final_corpus


def run(settings: TokenizerJob) -> None:
    """Train or take it unless it is up to date.

    Raises:
        SettingsError: there is no such model.
        FileNotFoundError: it has no ``tokenizer.json``, or nothing was curated to train on.
    """
    workspace = storage.absolute(settings.workspace)
    if settings.from_model is not None:
        source = model_folder(settings.from_model, "from_model", weights=False)
        content = storage.json_if_there(storage.join(source, "config.json")) or {}
        tokenizer.take(storage.join(workspace, "tokenizer"), source, settings.from_model, eos_id(content))
        return
    corpus, manifest = final_corpus(storage.join(workspace, "corpus"))
    with ray_session():
        tokenizer.train(
            storage.join(workspace, "tokenizer"), corpus, manifest, part_of(settings, tokenizer.TokenizerSettings)
        )
