"""``ingot tokenizer``: train a byte-level BPE on the curated corpus."""

from __future__ import annotations

from jobs.session import ray_session
from jobs.settings import TokenizerJob, part_of
from pipelines import storage, tokenizer
from pipelines.curate import final_corpus


def run(settings: TokenizerJob) -> None:
    """Train it unless it is up to date."""
    workspace = storage.absolute(settings.workspace)
    corpus, manifest = final_corpus(storage.join(workspace, "corpus"))
    with ray_session():
        tokenizer.train(
            storage.join(workspace, "tokenizer"), corpus, manifest, part_of(settings, tokenizer.TokenizerSettings)
        )
