"""Log lines for people, or one JSON object a line for machines: here it is decided, for all processes of a job.

JSON it is where the environment of the driver has ``RAY_LOGGING_CONFIG_ENCODING=JSON``, the variable that switches
Ray's own lines: then every worker's have it too, wherever it runs, and what they say at INFO. Each object has
``asctime``, ``levelname`` and ``message``; from processes of a cluster ``job_id``, ``node_id`` and ``worker_id`` too;
from training workers ``run`` and ``rank``. In Ray's session folder of each node (``/tmp/ray/session_latest/logs``) the
lines of training workers lie in ``train/ray-train-app-*.log``, those of other tasks in ``worker-*.err``: what a log
collector follows.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

_VARIABLE = "RAY_LOGGING_CONFIG_ENCODING"


def as_json() -> bool:
    """Whether lines are to be JSON."""
    return os.environ.get(_VARIABLE, "").upper() == "JSON"


def configure() -> None:
    """Set up the log of a command: this program's lines from INFO on, others' from WARNING on, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    handler.setFormatter(_Json() if as_json() else text)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("ingot").setLevel(logging.INFO)


def ray_arguments() -> dict[str, Any]:
    """What ``ray.init`` has to be told, for the processes that it starts to log alike."""
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if not as_json():
        return quiet
    import ray

    return {**quiet, "logging_config": ray.LoggingConfig(encoding="JSON", log_level="INFO")}


def after_ray_started() -> None:
    """Ray has put a handler of its own beside the command's, whose lines know their job: that one stays."""
    if as_json():
        root = logging.getLogger()
        for handler in root.handlers[:]:
            if isinstance(handler.formatter, _Json):
                root.removeHandler(handler)
        root.setLevel(logging.WARNING)
        logging.getLogger("ray").setLevel(logging.ERROR)


def mark(**facts: Any) -> None:
    """Have all further lines of this process carry these facts, such as its rank, when they are JSON."""
    before = logging.getLogRecordFactory()

    def factory(*arguments: Any, **more: Any) -> logging.LogRecord:
        record = before(*arguments, **more)
        record.__dict__.update(facts)
        return record

    logging.setLogRecordFactory(factory)


_STANDARD = set(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}


class _Json(logging.Formatter):
    """Lines as Ray's JSON formatter writes them, before there is a Ray."""

    def format(self, record: logging.LogRecord) -> str:
        told = {
            "asctime": self.formatTime(record),
            "levelname": record.levelname,
            "message": record.getMessage(),
            "filename": record.filename,
            "lineno": record.lineno,
        }
        if record.exc_info:
            told["exc_text"] = self.formatException(record.exc_info)
        told |= {name: value for name, value in record.__dict__.items() if not (name in _STANDARD or name[0] == "_")}
        return json.dumps(told, default=str)
