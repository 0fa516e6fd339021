"""``ingot tune``: Ray Tune over training settings; each trial is a Ray Train run that ASHA may stop early.

ASHA: Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning".
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import logging
import math
import os
from typing import Any

import yaml

from jobs.inputs import check_fits
from jobs.pretrain import finished, pretrain, require_gpus
from jobs.run_folder import StoredRun, valid_steps
from jobs.session import ray_session
from jobs.settings import PretrainJob, SearchDimension, SettingsError, TuneJob, with_setting
from pipelines import storage

log = logging.getLogger("ingot")

METRIC = "validation_loss"


def run(settings: TuneJob) -> list[dict[str, Any]]:
    """Run the sweep, going on where it was; returns its table, best trial first.

    Raises:
        RuntimeError: no trial got as far as a validation.
    """
    workspace, space = storage.absolute(settings.workspace), list(settings.dimensions())
    folder = storage.join(workspace, "sweeps", settings.name)
    base = dataclasses.replace(settings.pretrain, workspace=workspace)
    manifest, _ = check_fits(base)
    every = max(base.steps // settings.comparisons, 1)
    base = dataclasses.replace(base, validate_every=every, checkpoint_every=every, keep_checkpoints=1)
    _remember(folder, settings, manifest["fingerprint"])
    results = storage.join(folder, "results.json")
    if storage.exists(results) and not (done := storage.read_json(results))["failed"]:
        log.info("tune: sweep %s is done already, nothing to do", settings.name)
        _tell(done["trials"], space, 0)
        return done["trials"]
    # Ray Train frees the cores of a trial that ASHA stopped by asking the dashboard whether its controller is gone.
    with ray_session(math.ceil(base.workers * base.cpus_per_worker), dashboard=True) as only_this_machine:
        if only_this_machine:
            require_gpus(base)
        tuner = _tuner(settings, base, folder, every)
        log.info("tune: sweep %s, %d trials of %d steps", settings.name, settings.trials, base.steps)
        errors = [str(result.error) for result in tuner.fit() if result.error is not None]
    table = _table(folder, space)
    if not table:
        raise RuntimeError(f"{folder}: no trial got as far as a validation; the first error: {errors[:1]}")
    storage.write_bytes(storage.join(folder, "best.yaml"), best_recipe(base, table[0]).encode())
    storage.write_bytes(storage.join(folder, "sweep.svg"), picture(folder, table, space))
    storage.write_json(results, {"space": space, "trials": table, "failed": len(errors)})  # last: it says all is done
    _tell(table, space, len(errors))
    log.info("tune: best settings in %s", storage.join(folder, "best.yaml"))
    return table


def _remember(folder: str, settings: TuneJob, tokens: str) -> None:
    """Refuse to go on with a sweep that searched something else, or trained on other tokens.

    Raises:
        SettingsError: it did.
    """
    uri = storage.join(folder, "sweep.json")
    now = {**json.loads(json.dumps(dataclasses.asdict(settings))), "tokens": tokens}
    for free in ("workspace", "concurrent_trials"):
        now.pop(free)
    if storage.exists(uri) and storage.read_json(uri) != now:
        raise SettingsError(
            f"the sweep {settings.name} in {folder} was started with other settings or tokens; choose another "
            "--name, or delete that folder"
        )
    storage.write_json(uri, now)


def _tuner(settings: TuneJob, base: PretrainJob, folder: str, every: int) -> Any:
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search import BasicVariantGenerator

    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its table of the search settings says nothing new
    need, kind = (base.workers, "GPU") if base.device == "gpu" else (base.workers * base.cpus_per_worker, "CPU")
    concurrent = settings.concurrent_trials or max(int(ray.cluster_resources().get(kind, 0) // need), 1)
    # The trial's own process only waits for its Ray Train workers, which reserve what they need: it takes no core.
    trainable = tune.with_resources(tune.with_parameters(_trial, base=base, folder=folder), {"memory": 2**26})
    if tune.Tuner.can_restore(storage.join(folder, "tune")):
        log.info("tune: goes on with the sweep in %s", folder)
        return tune.Tuner.restore(storage.join(folder, "tune"), trainable, resume_unfinished=True, restart_errored=True)
    return tune.Tuner(
        trainable,
        param_space={name: _domain(base, name, dimension) for name, dimension in settings.dimensions().items()},
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="min",
            num_samples=settings.trials,
            search_alg=BasicVariantGenerator(random_state=settings.seed, max_concurrent=concurrent),
            scheduler=ASHAScheduler(
                time_attr="step", max_t=base.steps, grace_period=every, reduction_factor=settings.reduction_factor
            ),
        ),
        run_config=tune.RunConfig(name="tune", storage_path=folder, verbose=0, callbacks=[_progress(base.steps)]),
    )


def _domain(base: PretrainJob, name: str, dimension: SearchDimension) -> Any:
    from ray import tune

    if dimension.values is not None:
        return tune.choice(dimension.values)
    lowest = functools.reduce(getattr, name.split("."), with_setting(base, name, dimension.low))
    if isinstance(lowest, int):
        draw = tune.lograndint if dimension.scale == "log" else tune.randint
        return draw(max(lowest, 1) if dimension.scale == "log" else lowest, round(dimension.high) + 1)
    draw = tune.loguniform if dimension.scale == "log" else tune.uniform
    return draw(dimension.low, dimension.high)


def _progress(steps: int) -> Any:
    from ray.tune import Callback

    class Progress(Callback):
        def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
            facts = trial.trial_id, result["step"], steps, result.get(METRIC, float("nan")), trial.config
            log.info("tune: trial %s, step %d/%d, validation loss %.4f, %s", *facts)

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            log.warning("tune: trial %s failed, the others go on; its log: %s", trial.trial_id, trial.local_path)

    return Progress()


def _trial(config: dict[str, Any], base: PretrainJob, folder: str) -> None:
    """One trial: a pretraining run in the sweep's folder; started again after a kill, it goes on from its ledger."""
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    settings = base
    for name, value in config.items():
        settings = with_setting(settings, name, value)
    trial = tune.get_context().get_trial_id()
    where = storage.join(folder, "trials", trial)
    before = StoredRun(where)
    for step, row in valid_steps(before.metrics(), METRIC).items():
        # A killed sweep has forgotten the last that its trials told; ASHA compares the others with it.
        tune.report({"step": step, METRIC: row[METRIC]})
    if finished(before, settings.steps):
        return
    storage.write_json(storage.join(where, "trial.json"), {"trial": trial, "config": config})
    inside = where.removeprefix(base.workspace.rstrip("/") + "/")
    pretrain(
        dataclasses.replace(settings, name=trial), folder_name=inside, callbacks=[TuneReportCallback()], watch=False
    )


def _table(folder: str, space: list[str]) -> list[dict[str, Any]]:
    """A row for every trial with its settings, last step and validation loss; the furthest and best first."""
    trials = storage.join(folder, "trials")
    names = sorted({file.uri.removeprefix(trials).strip("/").split("/")[0] for file in storage.list_files(trials)})
    rows = []
    for name in names:
        stored = StoredRun(storage.join(trials, name))
        losses = valid_steps(stored.metrics(), METRIC)
        if losses:
            last = max(losses)
            config = stored.read_json("trial.json")["config"]
            rows.append({"trial": name, **{k: config[k] for k in space}, "step": last, METRIC: losses[last][METRIC]})
    return sorted(rows, key=lambda row: (-row["step"], row[METRIC]))


def _tell(table: list[dict[str, Any]], space: list[str], failed: int) -> None:
    header = ["trial", *space, "step", METRIC]
    lines = [header] + [
        [f"{row[k]:.4g}" if isinstance(row[k], float) else str(row[k]) for k in header] for row in table
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if failed:
        print(f"{failed} trials failed; run the same command again to try them once more")


def best_recipe(base: PretrainJob, best: dict[str, Any]) -> str:
    """A recipe for ``ingot pretrain --config``: the base settings with the best trial's values."""
    settings = base
    for name, value in best.items():
        if name not in ("trial", "step", METRIC):
            settings = with_setting(settings, name, value)
    plain = json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(settings, name="best"))))
    for every in ("validate_every", "checkpoint_every", "keep_checkpoints"):
        plain[every] = getattr(PretrainJob(), every)  # the sweep's own rhythm is not part of what it found
    head = f"# Found by a sweep: validation loss {best[METRIC]:.4f} after {best['step']} steps.\n"
    return head + yaml.safe_dump(plain, sort_keys=False)


def picture(folder: str, table: list[dict[str, Any]], space: list[str]) -> bytes:
    """The trials' validation losses over steps, and their last one over each setting, as SVG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 1 + len(space), figsize=(5 * (1 + len(space)), 4), squeeze=False)
    for row in table:
        losses = valid_steps(StoredRun(storage.join(folder, "trials", row["trial"])).metrics(), METRIC)
        axes[0][0].plot(list(losses), [v[METRIC] for v in losses.values()], marker="o", label=row["trial"][-5:])
    axes[0][0].set(xlabel="step", ylabel="validation loss (nats)", title="trials")
    for axis, name in zip(axes[0][1:], space, strict=True):
        values = [row[name] for row in table]
        numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        axis.scatter(values if numeric else [str(v) for v in values], [r[METRIC] for r in table], c="tab:orange")
        if numeric and min(values) > 0 and max(values) / min(values) > 20:
            axis.set_xscale("log")
        axis.set(xlabel=name, ylabel="last validation loss", title=name)
    figure.tight_layout()
    out = io.BytesIO()
    figure.savefig(out, format="svg")
    plt.close(figure)
    return out.getvalue()
