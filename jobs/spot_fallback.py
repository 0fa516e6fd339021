"""``python -m jobs.spot_fallback``: take on-demand machines for as long as the cloud refuses spot ones.

Ray's autoscaler passes over a kind of node that comes late, but asks again and again for one that the cloud refuses at
once: of the two, its monitor (`ray.autoscaler.v2`, Ray 2.60) only counts the first. It reads its file anew at each
round, though. This runs on the head beside it and, when the launch of a kind `NAME-spot` has failed and there is a
`NAME-on-demand`, keeps it at the nodes that it has for some minutes, by `max_workers` in that file; then spot is tried
again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections import Counter
from typing import Any

import yaml

from pipelines import storage

log = logging.getLogger("ingot.spot_fallback")


class Fallback:
    """Holds kinds that are refused, and lets them go again.

    What a kind was allowed stands beside the file, so that one who comes after a restart of the head can give it back.

    Args:
        path: the autoscaler's file.
        seconds: how long a kind is held after it was refused last.
    """

    def __init__(self, path: str, seconds: float = 600.0):
        self.path, self.kept, self.seconds = path, f"{path}.spot.json", seconds
        self.until = dict.fromkeys(self._allowed(), 0.0)

    def look(self, status: Any, now: float) -> list[str]:
        """Change the file if the cluster's state asks for it; returns what was done, in words.

        Args:
            status: of `ray.autoscaler.v2.sdk.get_cluster_status`.
            now: seconds since 1970.
        """
        with open(self.path) as file:
            config = yaml.safe_load(file)
        kinds = config["available_node_types"]
        refused = {
            launch.ray_node_type_name: launch.details
            for launch in status.failed_launches
            # those that failed while the kind was held are no news, nor are those from before
            if (launch.failed_ts_s or 0) > max(now - 60, self.until.get(launch.ray_node_type_name, 0) - self.seconds)
        }
        nodes = Counter(
            node.ray_node_type_name for node in (*status.active_nodes, *status.idle_nodes, *status.pending_nodes)
        )
        allowed = self._allowed()
        done = []
        for name, why in refused.items():
            twin = kinds.get(f"{name.removesuffix('-spot')}-on-demand")
            if name in kinds and name.endswith("-spot") and twin and twin["max_workers"]:
                allowed.setdefault(name, {"max_workers": kinds[name]["max_workers"]})["held_at"] = nodes[name]
                kinds[name]["max_workers"] = nodes[name]
                self.until[name] = now + self.seconds
                done.append(f"{name} stays at {nodes[name]} nodes for {self.seconds:.0f} s, it was refused: {why}")
        for name in [name for name, until in self.until.items() if until <= now]:
            del self.until[name]
            before = allowed.pop(name, None)
            # `ray up` may have written the file anew since: then there is nothing to give back
            if before and kinds.get(name, {}).get("max_workers") == before["held_at"]:
                kinds[name]["max_workers"] = before["max_workers"]
                done.append(f"{name} may have {before['max_workers']} nodes again")
        if done:
            storage.write_bytes(self.kept, json.dumps(allowed).encode())
            storage.write_bytes(self.path, yaml.safe_dump(config).encode())
        return done

    def _allowed(self) -> dict[str, dict[str, int]]:
        return storage.read_json(self.kept) if storage.exists(self.kept) else {}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jobs.spot_fallback", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--file", default="~/ray_bootstrap_config.yaml", help="of the autoscaler (default: %(default)s)"
    )
    parser.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between looks (default: 2)")
    parser.add_argument("--hold", type=float, default=600.0, metavar="S", help="seconds without spot (default: 600)")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    from ray._private.services import canonicalize_bootstrap_address_or_die
    from ray.autoscaler.v2.sdk import get_cluster_status

    fallback = Fallback(os.path.expanduser(chosen.file), chosen.hold)
    trouble = ""
    while True:
        now = ""
        try:
            for line in fallback.look(get_cluster_status(canonicalize_bootstrap_address_or_die(None)), time.time()):
                log.info("%s", line)
        except (OSError, RuntimeError, ValueError, KeyError) as error:  # of Ray, which may not be there yet
            now = f"{type(error).__name__}: {error}"
        if now and now != trouble:
            log.warning("%s; trying again every %g s", now, chosen.every)
        trouble = now
        time.sleep(chosen.every)


if __name__ == "__main__":
    sys.exit(main())
