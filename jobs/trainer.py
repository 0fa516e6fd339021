"""Ray Train for a run: workers that may come and go, limits on failures, and a controller that may die."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import time
from typing import Any

from pyarrow.fs import PyFileSystem

from jobs import inputs, worker
from jobs.run_folder import StoredRun
from jobs.settings import PretrainJob
from models.training.run_folder import patiently
from pipelines import storage

log = logging.getLogger("ingot")

# How soon an announced end of a node is seen; clouds give 30 seconds to 2 minutes.
_NOTICE_SECONDS = 2.0
_LONGEST_PAUSE = 30.0

REQUEST = "request.json"  # under which name the run's controller has asked for nodes


def fit(settings: PretrainJob, folder: StoredRun, attempt: int, on_gpu: bool, callbacks: list[Any]) -> None:
    """Train until the workers are done; a controller that is lost is started again, as workers are by the controller.

    A controller is lost when its process dies, and when a storage that fails keeps it from its own notes. As many in
    a row as ``max_failures`` are stood, without a new checkpoint between them.

    Raises:
        InputError: the workers met files that they cannot go on with.
        ray.train.TrainingFailedError: the workers failed more often than the settings allow, or the controller did.
        ray.exceptions.RayError: the controller died more often than that.
    """
    from ray.exceptions import RayError
    from ray.train import ControllerError

    from jobs.controller import HOPELESS

    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(settings.start_timeout_seconds)
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", str(_NOTICE_SECONDS))
    lost, newest = 0, _newest(folder)
    while True:
        try:
            # Ray's own account of a run cannot be read any more when a kill tears it, and the ledger says more.
            patiently(folder.delete, "ray")
            trainer = _trainer(settings, folder, attempt, on_gpu, callbacks)
            _withdraw(folder, trainer.train_run_context.run_id)
            trainer.fit()
        except (ControllerError, RayError, OSError) as error:
            cause = error.controller_failure if isinstance(error, ControllerError) else error
            if isinstance(cause, HOPELESS):
                raise cause from None
            if not isinstance(cause, (RayError, OSError)) or not _ray_lives():
                raise
            before, newest = newest, _newest(folder)
            lost = 1 if newest != before else lost + 1
            if 0 <= settings.max_failures < lost:
                raise
            pause = min(2.0**lost, _LONGEST_PAUSE)
            log.warning("pretrain: the controller is lost, started again in %.0f s: %s", pause, _first_line(cause))
            if not isinstance(error, ControllerError):  # it could not tell itself
                _tell(folder, error)
            time.sleep(pause)
            free_what_the_dead_held()
        else:
            return


def _tell(folder: StoredRun, error: Exception) -> None:
    told = {"time": time.time(), "event": "controller_failure", "error": _first_line(error)}
    with contextlib.suppress(OSError):  # of a storage that fails the workers' events tell
        folder.append_line("events.jsonl", json.dumps(told))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _newest(folder: StoredRun) -> Any:
    """The last checkpoint that the run tells of, None when the storage does not tell."""
    with contextlib.suppress(OSError):
        return [event["time"] for event in folder.events() if event["event"] == "checkpoint"][-1:]
    return None


def _ray_lives() -> bool:
    """Whether this process still has a cluster to start something on."""
    import ray
    from ray.exceptions import RayError

    try:
        return bool(ray.is_initialized() and ray.cluster_resources())
    except (RayError, OSError):
        return False


def free_what_the_dead_held() -> None:
    """Remove the placement groups of controllers that died, and with them workers that are left.

    Ray frees them only when the whole job ends. Ray Train's own cleaner asks the dashboard, which a session that was
    started for one job does without; a new group would wait for the cores of the old one forever.
    """
    import ray
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.util import remove_placement_group
    from ray.util.placement_group import PlacementGroup

    job = ray.get_runtime_context().get_job_id()
    for serialized in state._connect_and_get_accessor().get_placement_group_table():
        found = PlacementGroupTableData.FromString(serialized)
        # What was made by no actor, as by Ray Tune in a driver, counts as made by one that is dead.
        by_actor = not ray.ActorID(found.creator_actor_id).is_nil()
        ours = found.creator_job_id.hex() == job and by_actor and found.creator_actor_dead and not found.is_detached
        if ours and found.state != PlacementGroupTableData.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(found.placement_group_id)))


def _withdraw(folder: StoredRun, run_id: str) -> None:
    """Take back what a controller before this one has asked the cluster for, and note down who asks now.

    Ray keeps the request of a controller that was killed for three minutes; until then it sets the nodes that a run
    with elastic workers waits for aside for the dead.
    """
    import ray

    before = folder.read_json(REQUEST)
    if before is not None:
        with contextlib.suppress(ValueError):  # nobody has asked anything of this cluster yet
            coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
            coordinator.cancel_request.remote(before["requester"])
    folder.write_json(REQUEST, {"requester": f"train-{run_id}"})


def _trainer(settings: PretrainJob, folder: StoredRun, attempt: int, on_gpu: bool, callbacks: list[Any]) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from jobs import validation
    from jobs.controller import RunController
    from jobs.elastic import ElasticTrainer
    from jobs.ray_storage import PatientStorage

    elastic = settings.min_workers is not None
    _, path = storage.filesystem(folder.folder)
    shape = None if settings.init_from is None else inputs.of_run(settings, folder)[1]
    make = functools.partial(ElasticTrainer, sizes=settings.worker_counts(shape)) if elastic else TorchTrainer
    return make(
        worker.train,
        train_loop_config={"settings": settings, "folder": folder.folder, "attempt": attempt},
        # Both backends on GPUs: object collectives and checkpoints' planning go over gloo.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(settings.min_workers, settings.workers) if elastic else settings.workers,
            use_gpu=on_gpu,
            resources_per_worker=_worker_resources(settings, on_gpu),
            elastic_resize_monitor_interval_s=settings.resize_every_seconds,
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=path,
            # Without patience one write that fails would cost all workers their start.
            storage_filesystem=PyFileSystem(PatientStorage(folder.folder)),
            # Collectives stay strict under a preemption and survivors get no time beyond it: the model is sharded over
            # all of them, so that those who are left can neither train nor save.
            failure_config=FailureConfig(
                max_failures=settings.max_failures, max_preemption_failures=settings.max_preemptions
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            callbacks=[RunController(folder.folder), *callbacks],
        ),
        validation_config=validation.config(settings, folder),
    )


def _worker_resources(settings: PretrainJob, on_gpu: bool) -> dict[str, float]:
    return {"CPU": settings.cpus_per_worker, **({"GPU": settings.gpus_per_worker} if on_gpu else {})}
