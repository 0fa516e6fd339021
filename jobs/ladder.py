"""``ingot tune ladder``: small models tell what a big one will reach, and how big it should be.

A ladder of sizes, which are the target in narrow, is trained at compute-optimal token counts (Hoffmann et al. 2022); a
scaling law (``jobs.scaling_law``) fitted to their final losses predicts the target's, and the best size and number of
tokens for a budget of GPU hours. The learning rate carries over between the widths by muP (``models.widths``).

The intervals are about how losses scatter, not about whether a power law holds at all: rungs that see a few million
tokens have not got to where it does, and the target then lies outside.

Sizes are counted in parameters of matrix products, the output head with them and the input embedding not: those that
training spends its floating-point operations on (``ModelConfig.n_matmul_params``).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from jobs.charts import Plot, number, picture, standalone
from jobs.inputs import check_fits
from jobs.page import figure, folded, page, table, tiles
from jobs.pretrain import finished, pretrain, require_gpus
from jobs.run_folder import StoredRun, valid_steps
from jobs.scaling_law import Fitted, Law, constants, fit_with_uncertainty
from jobs.session import ray_session
from jobs.settings import LadderJob, PretrainJob, SettingsError
from models.config import ModelConfig
from pipelines import storage

log = logging.getLogger("ingot")

CONFIDENCE = 0.9
_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4)  # of the target's parameters, when no widths are given
_FEW_STEPS = 200  # below, a run is mostly warmup and decay, and lies above the law
_MOST_EPOCHS = 4.0  # beyond, tokens seen again are worth less than new ones (Muennighoff et al. 2023)
_TELL_SECONDS = 30.0


@dataclass(frozen=True)
class Rung:
    """One run of the ladder."""

    name: str
    settings: PretrainJob
    config: ModelConfig

    @property
    def parameters(self) -> int:
        """N: parameters in matrix products."""
        return self.config.n_matmul_params()

    @property
    def tokens(self) -> int:
        """D: tokens it trains on."""
        return tokens_of(self.settings)


def run(settings: LadderJob) -> dict[str, Any]:
    """Train the rungs that are not there yet, fit the law and predict; returns what ``ladder.json`` holds.

    Raises:
        SettingsError: the shapes do not make a ladder, or a rung was trained with other settings.
        RuntimeError: too few rungs got to their end.
    """
    workspace = storage.absolute(settings.workspace)
    folder = storage.join(workspace, "sweeps", settings.name)
    base = dataclasses.replace(settings.pretrain, workspace=workspace, on_change="refuse")
    manifest, target = check_fits(base)
    base.model = dataclasses.replace(base.model, base_width=base.model.base_width or target.d_model)
    rungs = plan(settings, base, target, manifest["vocab_size"])
    _warn(rungs, base, target, manifest["tokens"])
    failed = _train(settings, rungs)
    measured = [row for rung in rungs if (row := _row(workspace, settings.name, rung))]
    try:
        fitted = fit_with_uncertainty(*(np.array([r[k] for r in measured]) for k in ("parameters", "tokens", "loss")))
    except ValueError as error:
        raise RuntimeError(f"{folder}: {error}; failed: {', '.join(failed) or 'none'}") from None
    result = {
        "rungs": measured,
        "failed": failed,
        "law": constants(fitted.law),
        "free": fitted.form.value,
        "noise": float(np.median(fitted.noise)),
        "confidence": CONFIDENCE,
        "target": predict(fitted, target, tokens_of(base)),
    }
    if settings.gpu_hours is not None:
        result["budget"] = best_for(settings, fitted, target, measured, base.length())
    storage.write_bytes(storage.join(folder, "best.yaml"), recipe(base, result).encode())
    svg = draw(fitted, result, target, base.length())
    storage.write_bytes(storage.join(folder, "ladder.svg"), standalone(svg).encode())
    storage.write_bytes(storage.join(folder, "report.html"), report(settings, fitted, result, svg).encode())
    storage.write_json(storage.join(folder, "ladder.json"), result)
    _tell(result)
    log.info("ladder: picture, report.html and best.yaml in %s", folder)
    return result


# The ladder


def unit(target: ModelConfig) -> int:
    """Widths come in multiples of this: whole heads of the target's size, in its groups."""
    return target.head_dim * (target.n_heads // target.n_kv_heads)


def default_widths(target: ModelConfig) -> list[int]:
    """Four widths whose parameters are about a 32nd to a quarter of the target's.

    Raises:
        SettingsError: the target has too few heads for four narrower models.
    """
    step = unit(target)
    possible = list(range(step, target.d_model, step))
    sizes = np.array([shaped(target, width).n_matmul_params() for width in possible], float)
    wanted = [share * target.n_matmul_params() for share in _SHARES]
    found = sorted({possible[int(np.argmin(np.abs(np.log(sizes / size))))] for size in wanted}) if possible else []
    if len(found) < len(_SHARES):
        raise SettingsError(
            f"widths is null, and the target's heads, {target.n_heads} of {target.head_dim} in groups of "
            f"{target.n_heads // target.n_kv_heads}, allow only the widths {found}; give widths, or a shape with more "
            "and narrower heads"
        )
    return found


def shaped(target: ModelConfig, width: int, layers: int | None = None) -> ModelConfig:
    """The target in narrow or wide: heads of the same size, all else in proportion."""
    heads = width // target.head_dim
    return dataclasses.replace(
        target,
        d_model=width,
        n_layers=layers or target.n_layers,
        n_heads=heads,
        n_kv_heads=heads * target.n_kv_heads // target.n_heads,
        d_ff=8 * max(round(target.d_ff * width / target.d_model / 8), 1),
    )


def plan(settings: LadderJob, base: PretrainJob, target: ModelConfig, vocab_size: int) -> list[Rung]:
    """All rungs, the cheapest first.

    Raises:
        SettingsError: a width is no multiple of the target's heads.
    """
    widths = settings.widths or default_widths(target)
    layers = settings.layers or [target.n_layers] * len(widths)
    rungs = []
    for width, depth in zip(widths, layers, strict=True):
        if width % unit(target):
            raise SettingsError(f"widths has {width}; it has to be a multiple of {unit(target)}, the target's heads")
        config = shaped(target, width, depth)
        for ratio in settings.tokens_per_parameter:
            name = f"w{width}-l{depth}-t{ratio:g}"
            rung = dataclasses.replace(in_shape(base, config, ratio * config.n_matmul_params()), name=name)
            rung = dataclasses.replace(rung, validate_every=rung.steps, keep_checkpoints=1)
            if rung.validation == "beside":
                rung.checkpoint_every = rung.steps  # the one that is measured
            rungs.append(Rung(name, rung, rung.model.config(vocab_size, base.length())))
    return sorted(rungs, key=lambda rung: rung.parameters * rung.tokens)


def in_shape(base: PretrainJob, config: ModelConfig, tokens: float) -> PretrainJob:
    """The target's settings for another shape and number of tokens; warmup takes the same share of the steps."""
    model = dataclasses.replace(
        base.model,
        **{k: getattr(config, k) for k in ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff")},
    )
    steps = max(round(tokens / (base.global_batch * base.length())), 1)
    warmup = round(steps * base.schedule.warmup_steps / base.steps)
    return dataclasses.replace(
        base, model=model, steps=steps, schedule=dataclasses.replace(base.schedule, warmup_steps=warmup)
    )


def tokens_of(settings: PretrainJob) -> int:
    """Tokens that a run trains on."""
    return settings.steps * settings.global_batch * settings.length()


def _warn(rungs: list[Rung], base: PretrainJob, target: ModelConfig, there: int) -> None:
    if few := [f"{rung.name} ({rung.settings.steps})" for rung in rungs if rung.settings.steps < _FEW_STEPS]:
        log.warning(
            "ladder: so few steps tell little about long runs: %s; a smaller pretrain.global_batch makes more",
            ", ".join(few),
        )
    epochs = max(*(rung.tokens for rung in rungs), tokens_of(base)) / there
    if epochs > _MOST_EPOCHS:
        log.warning("ladder: the longest run sees the tokens %.1f times, and the law takes all for new ones", epochs)
    log.info(
        "ladder: %d rungs from %s to %s parameters, for a target of %s and %s tokens",
        len(rungs),
        number(rungs[0].parameters),
        number(rungs[-1].parameters),
        number(target.n_matmul_params()),
        number(tokens_of(base)),
    )


# Training


def _folder_name(ladder: str, rung: Rung) -> str:
    return f"sweeps/{ladder}/rungs/{rung.name}"


def _stored(workspace: str, ladder: str, rung: Rung) -> StoredRun:
    return StoredRun(storage.join(workspace, _folder_name(ladder, rung)))


def _train(settings: LadderJob, rungs: list[Rung]) -> list[str]:
    """Train what is not trained, several rungs at a time where there is room; returns the names of those that failed.

    Raises:
        SettingsError: a rung of this name was trained with other settings.
    """
    workspace = rungs[0].settings.workspace
    missing = []
    for rung in rungs:
        if finished(_stored(workspace, settings.name, rung), rung.settings.steps):
            pretrain(rung.settings, folder_name=_folder_name(settings.name, rung))  # checks that it is the same run
        else:
            missing.append(rung)
    if not missing:
        return []
    first = rungs[0].settings
    with ray_session(math.ceil(first.workers * first.cpus_per_worker)) as only_this_machine:
        if only_this_machine:
            require_gpus(first)
        return _train_missing(settings, missing)


def _train_missing(settings: LadderJob, missing: list[Rung]) -> list[str]:
    import ray
    from ray.exceptions import RayError, RayTaskError

    # The task only waits for its Ray Train workers, which reserve what they need.
    task = ray.remote(num_cpus=0, max_retries=0)(_train_rung)
    waiting, running, failed, done = list(missing), {}, [], 0
    room = settings.concurrent or _room(missing[0].settings)
    told = time.monotonic()
    while waiting or running:
        while waiting and len(running) < room:
            rung = waiting.pop(0)
            running[task.remote(rung.settings, _folder_name(settings.name, rung))] = rung
        ended, _ = ray.wait(list(running), timeout=5)
        for reference in ended:
            rung = running.pop(reference)
            try:
                loss = ray.get(reference)["validation_loss"]
            except RayError as error:
                cause = error.cause if isinstance(error, RayTaskError) else error
                if isinstance(cause, SettingsError | FileNotFoundError):
                    raise cause from None
                failed.append(rung.name)
                log.warning("ladder: %s failed, the others go on: %s", rung.name, str(cause).splitlines()[-1:])
            else:
                done += 1
                facts = rung.name, number(rung.parameters), number(rung.tokens), loss, done, len(missing)
                log.info("ladder: %s, %s parameters, %s tokens: validation loss %.4f (%d of %d)", *facts)
        if running and time.monotonic() - told > _TELL_SECONDS:
            told = time.monotonic()
            log.info("ladder: %s", "; ".join(_progress(settings.name, rung) for rung in running.values()))
    return failed


def _train_rung(settings: PretrainJob, folder_name: str) -> dict[str, float]:
    return pretrain(settings, folder_name=folder_name, watch=False)


def _room(settings: PretrainJob) -> int:
    """Rungs that the cluster has room for at a time."""
    import ray

    there = ray.cluster_resources()
    gpus = settings.device == "gpu" or (settings.device == "auto" and there.get("GPU", 0) >= settings.workers)
    kind, need = ("GPU", settings.workers) if gpus else ("CPU", settings.workers * settings.cpus_per_worker)
    return max(int(there.get(kind, 0) // need), 1)


def _progress(ladder: str, rung: Rung) -> str:
    rows = [r for r in _stored(rung.settings.workspace, ladder, rung).newest_metrics() if r.get("loss") is not None]
    at = f"step {rows[-1]['step']}/{rung.settings.steps}, loss {rows[-1]['loss']:.3f}" if rows else "starts"
    return f"{rung.name} {at}"


def _row(workspace: str, ladder: str, rung: Rung) -> dict[str, Any] | None:
    """What a rung has shown; None when it did not get to its end."""
    stored = _stored(workspace, ladder, rung)
    end = finished(stored, rung.settings.steps)
    if end is None or "validation_loss" not in end:
        return None
    rows = list(valid_steps(stored.metrics()).values())
    speed = statistics.median(row["tokens_per_second"] for row in rows[len(rows) // 10 :])
    per_token = rung.config.flops_per_token(rung.settings.length())
    mfu = [row["mfu"] for row in rows if row.get("mfu")]
    return {
        "name": rung.name,
        "d_model": rung.config.d_model,
        "n_layers": rung.config.n_layers,
        "parameters": rung.parameters,
        "all_parameters": rung.config.n_params(),
        "tokens": rung.tokens,
        "steps": rung.settings.steps,
        "flops": per_token * rung.tokens,
        "loss": end["validation_loss"],
        "tokens_per_second": speed,
        "flops_per_second_and_worker": speed * per_token / rung.settings.workers,
        "mfu": statistics.median(mfu) if mfu else None,
        "hours": sum(row["seconds"] for row in rows) * rung.settings.workers / 3600,
    }


# What the law says


def predict(fitted: Fitted, config: ModelConfig, tokens: float) -> dict[str, Any]:
    """The loss that a run will end with, and between which losses it will be measured."""
    n = config.n_matmul_params()
    return {
        "d_model": config.d_model,
        "n_layers": config.n_layers,
        "parameters": n,
        "all_parameters": config.n_params(),
        "tokens": float(tokens),
        "flops": float(config.flops_per_token(config.max_seq_len) * tokens),
        "loss": float(fitted.law.loss(n, tokens)),
        "interval": list(fitted.measured(n, tokens, CONFIDENCE)),
    }


def shapes(target: ModelConfig) -> list[ModelConfig]:
    """The target in all widths up to 16 times its own, a few percent apart where they lie close."""
    step, found = unit(target), []
    width = step
    while width <= 16 * target.d_model:
        found.append(shaped(target, width))
        width += step * max(round(0.02 * width / step), 1)
    return found


def best_for(
    settings: LadderJob, fitted: Fitted, target: ModelConfig, measured: list[dict[str, Any]], length: int
) -> dict[str, Any]:
    """The width and tokens with the lowest predicted loss that the budget of GPU hours pays for."""
    speed = settings.flops_per_second or max(measured, key=lambda r: r["flops"])["flops_per_second_and_worker"]
    flops = settings.gpu_hours * 3600 * speed
    family = shapes(target)
    sizes = np.array([config.n_matmul_params() for config in family], float)
    tokens = flops / np.array([config.flops_per_token(length) for config in family], float)

    def place(law: Law) -> int:
        return int(np.argmin(law.loss(sizes, tokens)))

    at = place(fitted.law)
    return {
        "gpu_hours": settings.gpu_hours,
        "flops_per_second": speed,
        "measured_speed": settings.flops_per_second is None,
        **predict(fitted, family[at], tokens[at]),
        "n_heads": family[at].n_heads,
        "parameters_interval": list(fitted.interval(lambda law: sizes[place(law)], CONFIDENCE)),
        "tokens_interval": list(fitted.interval(lambda law: tokens[place(law)], CONFIDENCE)),
        "at_the_edge": at in (0, len(family) - 1),
    }


def recipe(base: PretrainJob, result: dict[str, Any]) -> str:
    """A recipe for ``ingot pretrain --config``: the best shape for the budget, or the target when there is none."""
    found = result.get("budget", result["target"])
    target = base.model.config(256, base.length())
    settings = in_shape(base, shaped(target, found["d_model"], found["n_layers"]), found["tokens"])
    plain = json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(settings, name="best"))))
    low, high = found["interval"]
    why = f", the best for {found['gpu_hours']:g} GPU hours" if "gpu_hours" in found else ""
    head = (
        f"# Predicted from a ladder of {len(result['rungs'])} smaller runs{why}: validation loss {found['loss']:.4f} "
        f"({low:.4f} to {high:.4f} in {CONFIDENCE:.0%}).\n"
        f"# The learning rate is meant for width {plain['model']['base_width']} and carries over by model.base_width.\n"
    )
    return head + yaml.safe_dump(plain, sort_keys=False)


# Pictures and words


def draw(fitted: Fitted, result: dict[str, Any], target: ModelConfig, length: int) -> str:
    """Losses over size with the law through them, and what it says for the budget, as SVG."""
    plots = [_ladder_plot(fitted, result)]
    if "budget" in result:
        plots.append(_budget_plot(fitted, result["budget"], target, length))
    parts = [part for plot, label in plots for part in [*plot.svg(), *_powers(plot, label)]]
    return picture(960, 340 * len(plots), parts, "Scaling law")


def _powers(plot: Plot, label: str) -> list[str]:
    """Marks under a horizontal scale of powers of ten."""
    low, high = plot.x
    values = [m * 10.0**k for k in range(math.floor(low), math.ceil(high) + 1) for m in (1, 3)]
    inside = [v for v in values if low <= math.log10(v) <= high]
    if len(inside) > 10:
        inside = [v for v in inside if abs(math.log10(v) - round(math.log10(v))) < 0.01]
    out = [f'<text text-anchor="end" x="{plot.right}" y="{plot.bottom + 34:.0f}">{label}</text>']
    for value in inside:
        x = float(plot.px(math.log10(value)))
        out.append(f'<text text-anchor="middle" x="{x:.1f}" y="{plot.bottom + 17:.0f}">{number(value)}</text>')
    return out


def _what(run: dict[str, Any]) -> str:
    return f"{number(run['parameters'])} parameters, {number(run['tokens'])} tokens"


def _ladder_plot(fitted: Fitted, result: dict[str, Any]) -> tuple[Plot, str]:
    rungs, target = result["rungs"], result["target"]
    sizes = [r["parameters"] for r in [*rungs, target]]
    x = np.linspace(math.log10(min(sizes)) - 0.1, math.log10(max(sizes)) + 0.15, 80)
    ratio = target["tokens"] / target["parameters"]
    curves = np.array([law.loss(10**x, ratio * 10**x) for law in fitted.draws])
    low, high = np.quantile(curves, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    others = {float(f"{r['tokens'] / r['parameters']:.2g}") for r in rungs}
    lines = [(ratio, "train"), *((other, "undone") for other in others if abs(other / ratio - 1) > 0.1)]
    last = {each: float(fitted.law.loss(10 ** x[-1], each * 10 ** x[-1])) for each, _ in lines}
    losses = [*(r["loss"] for r in rungs), *target["interval"], *last.values()]
    spare = 0.08 * (max(losses) - min(losses))
    ends = min(losses) - spare, max(losses) + spare
    plot = Plot("Validation loss (nats) over parameters", (x[0], x[-1]), ends, 60, 830, 30, 285)
    shown = low <= ends[1]
    plot.band(x[shown], low[shown], high[shown], "train")
    for each, css in lines:
        loss = fitted.law.loss(10**x, each * 10**x)
        plot.line(x, np.where(loss <= ends[1], loss, np.nan), css)
    edge = sorted((float(plot.py(loss)), each) for each, loss in last.items())
    below = 0.0
    for y, each in edge:
        below = max(y, below + 14)  # names must not overlap
        plot.parts.append(f'<text x="838" y="{below + 4:.1f}">{each:.3g} tokens each</text>')
    notes = [
        f"{r['name']}: {_what(r)}: {r['loss']:.4f}; the law: {fitted.law.loss(r['parameters'], r['tokens']):.4f}"
        for r in rungs
    ]
    plot.dots(np.log10([r["parameters"] for r in rungs]), np.array([r["loss"] for r in rungs]), "validation", notes)
    at = math.log10(target["parameters"])
    plot.line(np.array([at, at]), np.array(target["interval"]), "restart")
    told = f"target: {_what(target)}, predicted {target['loss']:.4f}"
    plot.dots(np.array([at]), np.array([target["loss"]]), "restart", [told])
    plot.now = told
    return plot, "parameters"


def _budget_plot(fitted: Fitted, budget: dict[str, Any], target: ModelConfig, length: int) -> tuple[Plot, str]:
    flops = budget["gpu_hours"] * 3600 * budget["flops_per_second"]
    family = shapes(target)
    sizes = np.array([config.n_matmul_params() for config in family], float)
    near = (sizes > budget["parameters"] / 30) & (sizes < budget["parameters"] * 30)
    sizes = sizes[near]
    tokens = flops / np.array([config.flops_per_token(length) for config in family], float)[near]
    curves = np.array([law.loss(sizes, tokens) for law in fitted.draws])
    low, high = np.quantile(curves, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    loss = fitted.law.loss(sizes, tokens)
    x = np.log10(sizes)
    bottom, top = min(low.min(), budget["interval"][0]), min(high.max(), 2 * loss.min())
    plot = Plot(
        f"Predicted loss over size, for {budget['gpu_hours']:g} GPU hours",
        (x[0], x[-1]), (bottom, top), 60, 830, 370, 625,
    )  # fmt: skip
    plot.band(x, low, high, "train")
    plot.line(x, loss, "train")
    told = (
        f"best: {number(budget['parameters'])} parameters, {number(budget['tokens'])} tokens, loss {budget['loss']:.4f}"
    )
    plot.dots(np.array([math.log10(budget["parameters"])]), np.array([budget["loss"]]), "restart", [told])
    plot.now = told
    return plot, "parameters"


def report(settings: LadderJob, fitted: Fitted, result: dict[str, Any], svg: str) -> str:
    """The ladder as one HTML page."""
    target, law = result["target"], result["law"]
    low, high = target["interval"]
    facts = [
        ("target: parameters", number(target["parameters"])),
        ("target: tokens", number(target["tokens"])),
        ("target: predicted loss", f"{target['loss']:.3f}"),
        (f"in {CONFIDENCE:.0%}", f"{low:.3f} to {high:.3f}"),
    ]
    if budget := result.get("budget"):
        facts += [(f"best for {budget['gpu_hours']:g} GPU hours", f"{number(budget['parameters'])} parameters")]
        facts += [("on", f"{number(budget['tokens'])} tokens"), ("its loss", f"{budget['loss']:.3f}")]
    rows = []
    for r in result["rungs"]:
        said = float(fitted.law.loss(r["parameters"], r["tokens"]))
        sizes = [number(r["parameters"]), number(r["tokens"]), f"{r['flops']:.2e}".replace("e+", "e")]
        speed = f"{r['mfu']:.1%}" if r["mfu"] else f"{number(r['flops_per_second_and_worker'])} FLOP/s"
        losses = [f"{r['loss']:.4f}", f"{said:.4f}", f"{r['loss'] / said - 1:+.2%}"]
        rows.append([r["name"], *sizes, *losses, number(r["tokens_per_second"]), speed])
    header = ["rung", "parameters", "tokens", "FLOP", "loss", "law", "off by", "tokens/s", "MFU or FLOP/s a worker"]
    note = (
        "Dots: measured. Line and band: the law at the target's ratio of tokens to parameters, with its uncertainty; "
        "grey: the law at the rungs' other ratios. The bar at the target is where its loss will be measured."
    )
    formula = (
        f"<p>L(N, D) = {law['E']:.4g} + {law['A']:.4g} / N^{law['alpha']:.4g} + {law['B']:.4g} / D^{law['beta']:.4g}, "
        f"fitted with these free: {result['free']}. N: parameters in matrix products.</p>"
    )
    head = f"<header><h1>{settings.name}: a ladder of {len(rows)} runs</h1>{formula}</header>"
    body = [head, tiles(facts), figure("Scaling law", svg, note), table("Rungs", header, rows)]
    body.append(folded("All numbers", f"<pre>{json.dumps(result, indent=1)}</pre>"))
    return page(f"{settings.name}: Ingot ladder", "\n".join(body))


def _tell(result: dict[str, Any]) -> None:
    law, target = result["law"], result["target"]
    print("L(N, D) = {E:.4g} + {A:.4g} / N^{alpha:.4g} + {B:.4g} / D^{beta:.4g}".format(**law))
    low, high = target["interval"]
    print(f"target: {_what(target)}: loss {target['loss']:.4f} ({low:.4f} to {high:.4f} in {CONFIDENCE:.0%})")
    if budget := result.get("budget"):
        (n, m), (d, t) = budget["parameters_interval"], budget["tokens_interval"]
        how = "measured" if budget["measured_speed"] else "given"
        print(
            f"best for {budget['gpu_hours']:g} GPU hours at {number(budget['flops_per_second'])} FLOP/s ({how}): "
            f"{number(budget['parameters'])} parameters ({number(n)} to {number(m)}), d_model {budget['d_model']}, "
            f"{number(budget['tokens'])} tokens ({number(d)} to {number(t)}), loss {budget['loss']:.4f}"
        )
        if budget["at_the_edge"]:
            print("that is as far as the widths go that were looked at: another depth suits this budget better")
    if result["failed"]:
        print(f"failed: {', '.join(result['failed'])}; run the same command again to try them once more")
