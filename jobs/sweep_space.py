"""The space that a sweep searches: how a setting is drawn, and how it is moved a little, which PBT does.

Every number lies in the unit interval, in which searches work: 0 is the lowest of the range, 1 the highest, on its
scale. What is whole or lies on a grid is rounded on the way out.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Protocol

from jobs.settings import PretrainJob, SearchDimension, with_setting

Setting = Any
Settings = dict[str, Setting]

# Jaderberg et al. 2017, "Population Based Training of Neural Networks", sections 4.1 and 4.2.
_FACTORS = (0.8, 1.25)
_RESAMPLE = 0.25


class Source(Protocol):
    """Where draws come from."""

    def number(self, name: str) -> float:
        """In the unit interval, for the dimension of that name."""

    def choice(self, name: str, among: int) -> int:
        """From 0 up to ``among``, for the dimension of that name."""


class Dice:
    """Draws that nothing is known of.

    Args:
        seed: of the draws.
    """

    def __init__(self, *seed: int | str) -> None:
        self.random = Random(":".join(map(str, seed)))

    def number(self, name: str) -> float:
        """Uniform in the unit interval."""
        return self.random.random()

    def choice(self, name: str, among: int) -> int:
        """All alike."""
        return self.random.randrange(among)


@dataclass(frozen=True)
class Dimension:
    """One setting of the space.

    Attributes:
        name: dotted name of the setting.
        given: what it is drawn from.
        whole: whether the setting is a whole number.
    """

    name: str
    given: SearchDimension
    whole: bool

    def applies(self, settings: Settings) -> bool:
        """Whether the setting is drawn, next to those that were drawn before it."""
        return all(name in settings and settings[name] in wanted for name, wanted in (self.given.when or {}).items())

    def draw(self, source: Source) -> Setting:
        """A value for the setting."""
        if self.given.values is not None:
            return self.given.values[source.choice(self.name, len(self.given.values))]
        return self.value(source.number(self.name))

    def value(self, unit: float) -> Setting:
        """The number at a place in the unit interval."""
        given, low = self.given, self._bend(self.given.low)
        if given.step is not None:
            if given.scale == "linear":  # as many places for the ends as for the rest
                return self._on_grid(given.low + math.floor(unit * (self._cells() + 1)) * given.step)
            return self._on_grid(self._unbend(low + unit * (self._bend(given.high) - low)))
        if self.whole:
            drawn = math.floor(self._unbend(low + unit * (self._bend(given.high + 1) - low)))
            return min(max(drawn, math.ceil(given.low)), math.floor(given.high))
        drawn = self._unbend(low + unit * (self._bend(given.high) - low))
        return min(max(float(f"{drawn:.4g}"), given.low), given.high)  # more digits only make recipes hard to read

    def unit(self, value: float) -> float:
        """The place of a number in the unit interval: the middle of what is rounded to it."""
        given = self.given
        if given.step is not None and given.scale == "linear":
            return (round((value - given.low) / given.step) + 0.5) / (self._cells() + 1)
        rounds = self.whole and given.step is None
        low, high = self._bend(given.low), self._bend(given.high + 1 if rounds else given.high)
        return min(max((self._bend(value + 0.5 if rounds else value) - low) / (high - low), 0.0), 1.0)

    def moved(self, value: Setting, random: Random) -> Setting:
        """A value next to this one: a neighbour in the list, a fifth less or a quarter more; or now and then any other.

        On a linear scale a tenth of the range more or less, as nothing says that 0 means little there.
        """
        given, up = self.given, random.random() < 0.5
        if random.random() < _RESAMPLE:
            return self.draw(Dice(random.random()))
        if given.values is not None:
            place = given.values.index(value) + (1 if up else -1)
            return given.values[min(max(place, 0), len(given.values) - 1)]
        tenth = (given.high - given.low) / 10
        to = value * _FACTORS[up] if given.scale == "log" else value + (tenth if up else -tenth)
        least = given.step or (1 if self.whole else 0)
        if abs(to - value) < least:  # rounding must not undo it
            to = value + (least if up else -least)
        to = min(max(to, given.low), given.high)
        if given.step is not None:
            return self._on_grid(to)
        return round(to) if self.whole else min(max(float(f"{to:.4g}"), given.low), given.high)

    def _cells(self) -> int:
        return math.floor((self.given.high - self.given.low) / self.given.step + 1e-9)

    def _on_grid(self, number: float) -> float | int:
        given = self.given
        place = min(max(round((number - given.low) / given.step), 0), self._cells())
        drawn = float(f"{given.low + place * given.step:.12g}")  # 0.1 + 2 · 0.1 is 0.3
        return round(drawn) if self.whole else drawn

    def _bend(self, number: float) -> float:
        return math.log(number) if self.given.scale == "log" else number

    def _unbend(self, number: float) -> float:
        return math.exp(number) if self.given.scale == "log" else number


def space_of(dimensions: dict[str, SearchDimension], base: PretrainJob) -> list[Dimension]:
    """The space of a sweep over the settings of ``base``."""

    def held(name: str, value: Any) -> Setting:
        """A value as the settings hold it: YAML takes 1e-3 for a text."""
        return functools.reduce(getattr, name.split("."), with_setting(base, name, value))

    space = []
    for name, given in dimensions.items():
        if given.values is not None:
            numbers = [held(name, value) if isinstance(value, str) else value for value in given.values]
            space.append(Dimension(name, replace(given, values=numbers), whole=False))
        else:
            space.append(Dimension(name, given, whole=isinstance(held(name, given.low), int)))
    return space


def draw(space: list[Dimension], source: Source) -> Settings:
    """One value for each setting that is to have one."""
    drawn: Settings = {}
    for dimension in space:
        if dimension.applies(drawn):
            drawn[dimension.name] = dimension.draw(source)
    return drawn


def moved(space: list[Dimension], settings: Settings, random: Random) -> Settings:
    """Settings next to some that did well."""
    changed: Settings = {}
    for dimension in space:
        if dimension.applies(changed):
            name = dimension.name
            known = name in settings
            changed[name] = dimension.moved(settings[name], random) if known else dimension.draw(Dice(random.random()))
    return changed
