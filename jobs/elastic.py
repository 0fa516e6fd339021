"""Ray Train groups that shrink and grow between some sizes only: those that a run's parallelism can be laid out over.

The policy and the place where Ray Train takes it from are its internals: there is no setting for either.
"""

from __future__ import annotations

from typing import Any

from ray.train import Result, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2._internal.util import time_monotonic


class SizedPolicy(ElasticScalingPolicy):
    """Ray Train's elastic policy, for groups of the largest of ``sizes`` that the nodes at hand suffice for.

    Args:
        scaling_config: with the smallest and the largest size.
        sizes: numbers of workers.
    """

    def __init__(self, scaling_config: ScalingConfig, sizes: list[int]) -> None:
        super().__init__(scaling_config)
        self.sizes = sizes

    def _get_reserved_resources(self) -> Any:
        if time_monotonic() - self._latest_reserved_resources_query_time >= self.GET_RESERVED_RESOURCES_INTERVAL_S:
            # By itself Ray's coordinator looks at the nodes every 20 seconds: for so long a group would wait for one
            # that is gone, or not see one that has come. What this finds the question after it is answered with.
            self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
        return super()._get_reserved_resources()

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        possible = super()._count_possible_workers(reserved_resources)
        return max((size for size in self.sizes if size <= possible), default=0)


class ElasticTrainer(TorchTrainer):
    """``TorchTrainer`` for an elastic group; takes its arguments, and the ``sizes`` that the group may have."""

    def __init__(self, *args: Any, sizes: list[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sizes = sizes

    def _initialize_and_run_controller(self, **given: Any) -> Result:
        given["scaling_policy"] = SizedPolicy(self.scaling_config, self.sizes)
        return super()._initialize_and_run_controller(**given)
