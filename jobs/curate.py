"""``ingot curate``: sources to deduplicated documents, and a page that shows what became of them."""

from __future__ import annotations

import logging

from jobs.curation_report import build_report
from jobs.session import ray_session
from jobs.settings import CurateJob
from pipelines import storage
from pipelines.curate import curate

log = logging.getLogger("ingot")


def run(settings: CurateJob) -> None:
    """Run the stages that are not up to date and draw the report."""
    corpus = storage.join(storage.absolute(settings.workspace), "corpus")
    with ray_session():
        curate(corpus, settings)
    log.info("curate: report in %s", build_report(corpus))
