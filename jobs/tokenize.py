"""``ingot tokenize``: the curated corpus to packed token shards."""

from __future__ import annotations

from jobs.session import ray_session
from jobs.settings import TokenizeJob, part_of
from pipelines import storage, tokenize
from pipelines.curate import final_corpus
from pipelines.stage import require_manifest


def run(settings: TokenizeJob) -> None:
    """Encode and pack unless the shards are up to date."""
    workspace = storage.absolute(settings.workspace)
    corpus, manifest = final_corpus(storage.join(workspace, "corpus"))
    tokenizer = storage.join(workspace, "tokenizer")
    require_manifest(tokenizer, "tokenizer")
    with ray_session():
        tokenize.tokenize(
            storage.join(workspace, "tokens"), corpus, manifest, tokenizer, part_of(settings, tokenize.TokenizeSettings)
        )
