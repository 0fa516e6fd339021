"""Which trial a sweep starts next: drawn at random, by Optuna's TPE, as BOHB does it, or by population based training.

Nothing here remembers anything: each proposal follows from the trials so far and from the seed, so that a sweep that
was killed proposes what it would have proposed.

- TPE: Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization", in its multivariate form. Trials that were
  stopped early rank behind those that got further.
- BOHB: Falkner, Klein & Hutter 2018, section 3.2: the model is that of the losses at the latest step for which there
  are enough, of trials that still run too, and a third of the settings is drawn at random. Theirs goes with brackets of
  HyperBand, some of which stop nobody early; ours with ASHA, so that those who were stopped before that step have to be
  in the model, behind the others: among survivors alone there is little that is bad to keep away from.
- PBT: Jaderberg et al. 2017, "Population Based Training of Neural Networks". All members train to the same step, in
  turns where there is not room for all, then the worst quarter goes on from weights and settings of the best one.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from jobs.settings import SettingsError, TuneJob
from jobs.sweep_space import Dice, Dimension, Settings, draw, moved
from jobs.sweep_trials import Stretch, Trial, Trials

if TYPE_CHECKING:
    import optuna

Next = Trial | Literal["wait", "done"]

_RANDOM_SHARE = 1 / 3  # BOHB's rho
_QUARTER = 0.25  # PBT's truncation selection
_ENOUGH_FAILURES = 3  # to take it that the sweep itself cannot work


class Plan:
    """What a sweep does next.

    Args:
        settings: of the sweep.
        space: that it searches.
        trials: so far; those that were interrupted, or failed, are taken up again first.
        share: GPUs, or CPU cores, that a trial takes.
    """

    def __init__(self, settings: TuneJob, space: list[Dimension], trials: Trials, share: float) -> None:
        self.settings, self.space, self.trials, self.share = settings, space, trials, share
        self.interrupted = [trial.name for trial in trials.all.values() if trial.state == "running"]
        self.failed = [trial.name for trial in trials.all.values() if trial.state == "failed"]
        steps, count = settings.pretrain.steps, settings.comparisons
        self.comparisons = [round(steps * (i + 1) / count) for i in range(count)]
        if settings.search != "random":
            _require_optuna(settings.search)

    def spent(self) -> bool:
        """Whether the budget is used up."""
        budget = self.settings.budget_hours
        return budget is not None and self.trials.hours() * self.share >= budget

    def hopeless(self) -> bool:
        """Whether some trials have failed of this start, and nothing else has come of any."""
        states = [trial.state for trial in self.trials.all.values() if trial.name not in self.failed]
        measured = any(trial.losses for trial in self.trials.all.values())
        return not measured and states.count("failed") >= _ENOUGH_FAILURES

    def next(self) -> Next:
        """The trial to start, or to go on with; noted down already. "wait" until others are done, "done" for good."""
        if self.interrupted:
            return self.trials.all[self.interrupted.pop(0)]
        if self.spent() or self.hopeless():
            return "done"
        if self.failed:
            return self.trials.again(self.failed.pop(0))
        if len(self.trials.all) < self.settings.trials:
            return self.trials.begin(Stretch(0, self._first_end(), self._propose()))
        return self._generation() if self.settings.scheduler == "pbt" else "done"

    def _first_end(self) -> int:
        return self.comparisons[0] if self.settings.scheduler == "pbt" else self.settings.pretrain.steps

    def _propose(self) -> Settings:
        number, seed = len(self.trials.all), self.settings.seed
        dice = Dice(seed, number)
        outcome = _by_rank if self.settings.search == "tpe" else None
        if self.settings.search == "bohb" and dice.random.random() >= _RANDOM_SHARE:
            outcome = self._at_rung()
        if outcome is not None:
            return draw(self.space, _tpe(self.space, list(self.trials.all.values()), _seed(seed, number), outcome))
        return draw(self.space, dice)

    def _at_rung(self) -> Callable[[Trial], dict[str, Any]] | None:
        """How to tell Optuna of trials by the latest step at which enough have a loss; None when there is none yet."""
        enough = len(self.space) + 3  # the paper's N_min + 2, with N_min one more than there are dimensions
        trials = self.trials.all.values()
        steps = sorted({step for trial in trials for step in trial.losses if step}, reverse=True)
        rung = next((step for step in steps if sum(step in trial.losses for trial in trials) >= enough), None)
        if rung is None:
            return None

        def outcome(trial: Trial) -> dict[str, Any]:
            loss = trial.losses.get(rung, math.inf)
            return {"state": "COMPLETE", "value": loss} if math.isfinite(loss) else _by_rank(trial)

        return outcome

    # Population based training

    def _generation(self) -> Next:
        """The next member that goes on, once all have come to the same step."""
        members = [trial for trial in self.trials.all.values() if trial.state != "failed"]
        here = min((member.stretches[-1].end for member in members), default=self.settings.pretrain.steps)
        behind = [member for member in members if member.stretches[-1].end == here]
        if any(member.state == "running" for member in behind):
            return "wait"
        ranked = sorted(members, key=lambda member: (member.losses.get(here, math.inf), member.name))
        quarter = max(1, round(_QUARTER * len(ranked)))
        best = [member for member in ranked[:quarter] if math.isfinite(member.losses.get(here, math.inf))]
        worst = [member.name for member in ranked[quarter:][-quarter:]]
        if here >= self.settings.pretrain.steps or not best:
            return "done"
        member = behind[0]
        random = Random(f"{self.settings.seed}:{member.name}:{here}")
        stretch = Stretch(here, self.comparisons[self.comparisons.index(here) + 1], member.settings, member.name)
        if member.name in worst or member.state == "diverged":
            parent = random.choice(best)
            # Its settings of then: it may have gone on meanwhile.
            there = next(stretch for stretch in parent.stretches if stretch.end == here)
            stretch.parent, stretch.settings = parent.name, moved(self.space, there.settings, random)
        return self.trials.begin(stretch, member.name)


def _seed(*numbers: int) -> int:
    return zlib.crc32(":".join(map(str, numbers)).encode())


class _Asked:
    """Draws of an Optuna trial."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def number(self, name: str) -> float:
        return self.trial.suggest_float(name, 0.0, 1.0)

    def choice(self, name: str, among: int) -> int:
        return self.trial.suggest_categorical(name, range(among))


def _tpe(
    space: list[Dimension],
    trials: list[Trial],
    seed: int,
    outcome: Callable[[Trial], dict[str, Any]],
) -> _Asked:
    """A trial of a study that knows some others.

    Args:
        space: of them all.
        trials: what the study knows.
        seed: of the sampler.
        outcome: a trial's state, as Optuna names it, with a value or intermediate values.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # multivariate, group, constant_liar
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=len(space) + 3,
            multivariate=True,
            group=True,  # conditional dimensions
            constant_liar=True,  # keeps away from what is running
            seed=seed,
        )
    study = optuna.create_study(sampler=sampler)
    for trial in trials:
        told = outcome(trial)
        places, distributions = {}, {}
        for dimension in space:
            if dimension.name in trial.stretches[0].settings:
                value, choices = trial.stretches[0].settings[dimension.name], dimension.given.values
                if choices is None:
                    distributions[dimension.name] = optuna.distributions.FloatDistribution(0.0, 1.0)
                    places[dimension.name] = dimension.unit(value)
                else:
                    distributions[dimension.name] = optuna.distributions.CategoricalDistribution(range(len(choices)))
                    places[dimension.name] = choices.index(value)
        state = optuna.trial.TrialState[told.pop("state")]
        study.add_trial(optuna.trial.create_trial(state=state, params=places, distributions=distributions, **told))
    return _Asked(study.ask())


def _by_rank(trial: Trial) -> dict[str, Any]:
    """What Optuna is told of a trial: those that got furthest first, the ones that diverged last."""
    if trial.state == "running":
        return {"state": "RUNNING"}
    if trial.state == "finished" and math.isfinite(trial.loss):
        return {"state": "COMPLETE", "value": trial.loss}
    if trial.state == "failed":
        return {"state": "FAIL"}
    losses = {step: loss for step, loss in trial.losses.items() if math.isfinite(loss)}
    return {"state": "PRUNED", "intermediate_values": {} if trial.state == "diverged" else losses}


def _require_optuna(search: str) -> None:
    """Raise SettingsError unless Optuna is there.

    Raises:
        SettingsError: it is not installed.
    """
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise SettingsError(f"search is {search!r}; it needs Optuna: pip install 'ingot[tune]'") from None
