"""What a run scored, as sections of its page."""

from __future__ import annotations

from typing import Any

from jobs.eval_pictures import curves_picture, group_picture, roots
from jobs.evaluate import RESULTS, evals_folder
from jobs.events import value
from jobs.page import figure, folded, table
from jobs.run_folder import StoredRun
from models.training.ledger import LEDGER, Ledger
from pipelines import storage

_HEADER = ["task", "n-shot", "questions", "metric", "filter", "score", "standard error"]


def evaluation_sections(workspace: str, run: str) -> str:
    """The newest checkpoint's scores as a table and pictures, and all checkpoints' as curves; empty without any."""
    checkpoints = measured(workspace, run)
    if not checkpoints:
        return ""
    newest = checkpoints[-1]
    names = ("validation_loss", "validation_bits_per_byte")
    lines = [[name.replace("_", " "), value(newest[name])] for name in names if name in newest]
    lines += [[f"{task} failed", reason] for task, reason in newest.get("failed", {}).items()]
    lines += [[f"{task} cut", told] for task, told in newest.get("cut", {}).items()]
    out = [table(f"Evaluation at step {newest['step']:,}", ["", ""], lines)]
    scores = newest.get("scores", [])
    out.append(table("" if lines else f"Evaluation at step {newest['step']:,}", _HEADER, _lines(scores, roots(scores))))
    for task in roots(scores):
        below = [row["task"] for row in scores if row["task"] != task and _root(scores, row) == task]
        if below:
            out.append(figure(task, group_picture(scores, task)))
            out.append(folded(f"{task}: each subject", table("", _HEADER, _lines(scores, below))))
    curves = curves_picture([(one["step"], one.get("scores", [])) for one in checkpoints])
    if curves:
        out.append(figure("Scores over checkpoints", curves, "Surfaces: one standard error to both sides."))
    return "\n".join(part for part in out if part)


def measured(workspace: str, run: str) -> list[dict[str, Any]]:
    """The results of a run's checkpoints, by rising step.

    Those of checkpoints that the run went back from are left out, as their losses are: in the ledger they are poisoned
    or not there, or another one of the same step, written after the results, has taken their place.
    """
    ledger = StoredRun(storage.join(workspace, "runs", run)).read_json(LEDGER)
    good = {e.step: e for e in Ledger.from_dict(ledger).entries if e.status in ("clean", "pending")}
    try:
        files = storage.list_files(storage.join(evals_folder(workspace, run), "step-*", RESULTS))
    except FileNotFoundError:
        return []
    found = [one for file in files if (one := storage.json_if_there(file.uri))]
    counting = [one for one in found if one["step"] in good and one["time"] >= good[one["step"]].time]
    return sorted(counting, key=lambda one: one["step"])


def _root(scores: list[dict[str, Any]], row: dict[str, Any]) -> str:
    group_of = {row["task"]: row["group"] for row in scores}
    task = row["task"]
    while group_of.get(task) is not None:
        task = group_of[task]
    return task


def _lines(scores: list[dict[str, Any]], tasks: list[str]) -> list[list[str]]:
    return [
        [
            row["task"],
            "" if row["n_shot"] is None else str(row["n_shot"]),
            f"{row['items']:,}" if row["items"] else "",
            row["metric"],
            "" if row["filter"] == "none" else row["filter"],
            f"{row['value']:.4f}",
            "" if row["stderr"] is None else f"{row['stderr']:.4f}",
        ]
        for row in scores
        if row["task"] in tasks
    ]
