"""Start Ray on this machine, or join the cluster that ``RAY_ADDRESS`` names (the job server sets it)."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

from jobs import logs

log = logging.getLogger("ingot")


@contextlib.contextmanager
def ray_session(cpus: int = 1, *, dashboard: bool = False) -> Iterator[bool]:
    """Ray for the time of a job: joined when a cluster is given or it runs already, else started and stopped after.

    Args:
        cpus: cores that the job needs at least; a smaller machine shares what it has.
        dashboard: whether a Ray that is started here needs its dashboard, which takes some seconds.

    Yields:
        Whether Ray was started here and so will never have more than this machine has.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how soon a lost worker is seen
    import ray

    if ray.is_initialized():
        yield False
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**logs.ray_arguments())
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        cores = max(os.cpu_count() or 1, cpus)
        log.info("ray: starts on this machine with %d cores", cores)
        ray.init(address="local", num_cpus=cores, include_dashboard=dashboard, **logs.ray_arguments())
    logs.after_ray_started()
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    try:
        yield not os.environ.get("RAY_ADDRESS")
    finally:
        ray.shutdown()
