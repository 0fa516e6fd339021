"""``python -m jobs.spot_watch --cloud aws|gcp|azure``: tell Ray that the cloud is about to take this node.

It runs on every cloud worker beside Ray and asks the machine's own metadata service, which is the only place where a
spot machine's end is announced; Ray does not look there. The notice becomes a drain of the node with the deadline:
nothing new is started on it, training takes a checkpoint while there is time, the autoscaler looks for another.

- AWS, two minutes before: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
- Google Cloud, 30 s before: https://cloud.google.com/compute/docs/instances/create-use-spot#detect-preemption
- Azure, at least 30 s before: https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

METADATA = {
    "aws": "http://169.254.169.254",
    "gcp": "http://metadata.google.internal",
    "azure": "http://169.254.169.254",
}
REBALANCE_SECONDS = 120  # AWS gives no time with a recommendation: as much as its notice would have left
GOOGLE_SECONDS = 30
TIMEOUT_SECONDS = 5

log = logging.getLogger("ingot.spot_watch")


@dataclass(frozen=True)
class Notice:
    """The cloud's word that this machine goes."""

    deadline: float
    """When, in seconds since 1970."""
    message: str
    """What the cloud said."""


def aws_notice(metadata: str, rebalance: bool = False) -> Notice | None:
    """What IMDSv2 announces: a spot interruption or, if wanted, the recommendation to move elsewhere that may precede.

    Raises:
        OSError: the metadata service does not answer, or refuses.
    """
    lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = {"X-aws-ec2-metadata-token": _ask(f"{metadata}/latest/api/token", lifetime, method="PUT") or ""}
    action = _ask(f"{metadata}/latest/meta-data/spot/instance-action", token)
    if action is not None:
        said = json.loads(action)
        return Notice(_utc(said["time"]), f"spot interruption: {said['action']} at {said['time']}")
    advice = _ask(f"{metadata}/latest/meta-data/events/recommendations/rebalance", token) if rebalance else None
    if advice is not None:
        return Notice(
            time.time() + REBALANCE_SECONDS, f"rebalance recommendation of {json.loads(advice)['noticeTime']}"
        )
    return None


def google_notice(metadata: str) -> Notice | None:
    """Whether Compute Engine preempts this machine; it does not say when, only that 30 s are left at most.

    Raises:
        OSError: the metadata service does not answer, or refuses.
    """
    said = _ask(f"{metadata}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return Notice(time.time() + GOOGLE_SECONDS, "preempted") if said and said.strip() == "TRUE" else None


def azure_notice(metadata: str) -> Notice | None:
    """The first scheduled event that ends what runs on this machine; a scale set's machines see each other's too.

    Raises:
        OSError: the metadata service does not answer, or refuses.
    """
    header = {"Metadata": "true"}
    events = json.loads(_ask(f"{metadata}/metadata/scheduledevents?api-version=2020-07-01", header) or "{}")
    ending = [e for e in events.get("Events", []) if e["EventType"] in ("Preempt", "Terminate", "Redeploy", "Reboot")]
    if not ending:
        return None
    name = _ask(f"{metadata}/metadata/instance/compute/name?api-version=2021-02-01&format=text", header)
    for event in ending:
        if name in event["Resources"]:
            # NotBefore is empty once the event has started.
            deadline = parsedate_to_datetime(event["NotBefore"]).timestamp() if event["NotBefore"] else time.time()
            return Notice(deadline, f"{event['EventType']} {event['EventStatus'].lower()}, {event['NotBefore']}")
    return None


def drain(notice: Notice) -> list[str]:
    """Tell Ray that this machine's nodes end at the deadline; returns their ids, none while Ray does not run here.

    This is what ``ray drain-node`` does, whose start would take some of the seconds that are left.

    Raises:
        RuntimeError: Ray does not take it.
        ConnectionError: no cluster is known here.
    """
    from ray._private.services import canonicalize_bootstrap_address_or_die
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason
    from ray.core.generated.gcs_pb2 import GcsNodeInfo
    from ray.util import get_node_ip_address

    here = get_node_ip_address()  # by which `ray start` has named this machine
    cluster = GcsClient(address=canonicalize_bootstrap_address_or_die(None))
    nodes = [
        node.hex()
        for node, info in cluster.get_all_node_info().items()
        if info.state == GcsNodeInfo.ALIVE and info.node_manager_address == here
    ]
    for node in nodes:
        reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
        taken, why = cluster.drain_node(node, reason, notice.message, int(notice.deadline * 1000))
        if not taken:
            raise RuntimeError(why)
    return nodes


def watch(
    look: Callable[[], Notice | None], drain: Callable[[Notice], list[str]] = drain, every: float = 2.0
) -> list[str]:
    """Wait for a notice and drain this machine's nodes, once; returns their ids.

    Neither a metadata service that does not answer nor a Ray that is not there yet ends it.
    """
    trouble = ""
    while True:
        try:
            notice = look()
            if notice is not None and (nodes := drain(notice)):
                left = notice.deadline - time.time()
                log.info("%s; %.0f s left, drained %s", notice.message, left, ", ".join(nodes))
                return nodes
            now = ""
        except (OSError, ValueError, KeyError, RuntimeError) as error:  # of the metadata service and of Ray
            now = f"{type(error).__name__}: {error}"
        if now and now != trouble:
            log.warning("%s; trying again every %g s", now, every)
        trouble = now
        time.sleep(every)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jobs.spot_watch", description=__doc__.split("\n\n")[0])
    parser.add_argument("--cloud", choices=METADATA, required=True)
    parser.add_argument("--metadata", metavar="URL", help="the metadata service, when it is not where the cloud has it")
    parser.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between looks (default: 2)")
    parser.add_argument("--rebalance", action="store_true", help="AWS: leave at a rebalance recommendation already")
    chosen = parser.parse_args(arguments)
    if chosen.rebalance and chosen.cloud != "aws":
        parser.error("--rebalance: only AWS has rebalance recommendations")
    metadata = (chosen.metadata or METADATA[chosen.cloud]).rstrip("/")
    looks = {
        "aws": lambda: aws_notice(metadata, chosen.rebalance),
        "gcp": lambda: google_notice(metadata),
        "azure": lambda: azure_notice(metadata),
    }
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    import ray  # noqa: F401  now, rather than in the last seconds

    log.info("watching %s for the end of this machine", metadata)
    watch(looks[chosen.cloud], every=chosen.every)
    return 0


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    """What the metadata service answers; None when there is no such thing, which is how AWS says that all is well.

    Raises:
        OSError: it does not answer, or refuses.
    """
    request = urllib.request.Request(url, headers=headers, method=method)  # noqa: S310
    # Plain http is what the clouds have; no proxy, as the address is only reached from the machine itself.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=TIMEOUT_SECONDS) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def _utc(stamp: str) -> float:
    return datetime.strptime(stamp, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()


if __name__ == "__main__":
    sys.exit(main())
