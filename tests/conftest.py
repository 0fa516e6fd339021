"""Ray starts once for the whole test session, small, and is shut down at its end."""

import os

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # results are held against fp32 references
# more would spin against the workers on the same cores, and a process that is forked would wait for them for ever
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(scope="session")
def ray_session():
    import ray

    # Workers unpickle the functions of test modules, so they have to find those.
    here = os.path.dirname(os.path.abspath(__file__))
    folders = [os.path.dirname(here), *(f"{here}/{name}" for name in ("pipelines", "models", "jobs", "cluster"))]
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    quick = {"metrics_report_interval_ms": 2000}  # a test waits for them
    if not ray.is_initialized():
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _system_config=quick)
    yield ray
    ray.shutdown()
