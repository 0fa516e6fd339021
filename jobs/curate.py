"""``ingot curate``: sources to deduplicated documents."""

from __future__ import annotations

from jobs.session import ray_session
from jobs.settings import CurateJob
from pipelines import storage
from pipelines.curate import curate


def run(settings: CurateJob) -> None:
    """Run the stages that are not up to date."""
    with ray_session():
        curate(storage.join(storage.absolute(settings.workspace), "corpus"), settings)
