"""Charts as SVG text that follow the reader's light or dark setting, alone or inside a page.

Colours are CSS classes: a page carries ``STYLE`` once, a picture of its own carries it in itself.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

# Okabe and Ito's colours, which people who do not tell red from green tell apart; lighter ones on dark.
STYLE = """
:root, svg { --paper: #ffffff; --ink: #1c2330; --soft: #667085; --grid: #e4e7ec; --panel: #f7f8fa;
  --train: #0072b2; --validation: #d55e00; --undone: #98a2b3; --rollback: #c0265e; --restart: #7a4fd0;
  --resize: #00866a; --kept: #0072b2; --dropped: #e8b4a0; --good: #067a57; }
@media (prefers-color-scheme: dark) { :root, svg { --paper: #14181f; --ink: #e6e9ef; --soft: #98a2b3; --grid: #2b323d;
  --panel: #1b212b; --train: #56b4e9; --validation: #f09a4a; --undone: #8b95a5; --rollback: #ff7eaa;
  --restart: #b79cff; --resize: #3fc59c; --kept: #56b4e9; --dropped: #6b4a40; --good: #4cc38a; } }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
svg text.ink { fill: var(--ink); } svg text.small { font-size: 10.5px; }
svg text.bold { font-weight: 600; fill: var(--ink); }
svg .paper { fill: var(--paper); } svg .grid { stroke: var(--grid); } svg .clear { fill: transparent; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; } svg .thin { stroke-width: 1; opacity: .4; }
svg .slim { stroke-width: 1.5; } svg .dashed { stroke-dasharray: 3 3; } svg .rule { stroke-width: 1.5; }
svg .train { stroke: var(--train); } svg .validation { stroke: var(--validation); }
svg .undone { stroke: var(--undone); stroke-width: 1.5; } svg .rollback { stroke: var(--rollback); }
svg .restart { stroke: var(--restart); } svg .resize { stroke: var(--resize); }
svg .checkpoint { stroke: var(--soft); } svg .rule.checkpoint { stroke-width: 1; opacity: .28; }
svg .dot.validation { fill: var(--validation); } svg .dot.rollback { fill: var(--rollback); }
svg .dot.restart { fill: var(--restart); } svg .dot.resize { fill: var(--resize); }
svg .band, svg .shade { stroke: none; opacity: .2; } svg .shade { opacity: .1; }
svg .band.train { fill: var(--train); } svg .shade.rollback { fill: var(--rollback); }
svg .shade.restart { fill: var(--restart); } svg .shade.resize { fill: var(--resize); }
svg .kept { fill: var(--kept); } svg .dropped { fill: var(--dropped); } svg .again { fill: var(--undone); }
svg .down { fill: none; stroke: var(--rollback); stroke-dasharray: 2 2; }
"""

MOST_POINTS = 1200  # on a line; more than the picture has columns only makes the page heavy


def number(value: float) -> str:
    """A number for people: 950, 1.2k, 34M, 0.0012, 3e-07."""
    size = abs(value)
    if size and size < 0.001:
        return f"{value:.3g}".replace("e-0", "e-")
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e4)):
        # what rounds to 1000 of a unit is 1 of the next
        if size >= (scale if unit == "k" else 0.9995 * scale):
            return f"{value / (1e3 if unit == 'k' else scale):.3g}{unit}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"


def byte_size(value: float) -> str:
    """Bytes for people, in powers of 1000: 812 B, 24.1 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError


def thin_out(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most about ``most`` points, among them the lowest and highest of every stretch, so that no spike is lost."""
    if len(x) <= most:
        return x, y
    kept: set[int] = {0, len(x) - 1}
    for stretch in np.array_split(np.arange(len(x)), most // 2):
        kept |= {int(stretch[np.argmin(y[stretch])]), int(stretch[np.argmax(y[stretch])])}
    index = np.array(sorted(kept))
    return x[index], y[index]


def smooth(y: np.ndarray, window: int) -> np.ndarray:
    """Mean over ``window`` values around each, over fewer at the ends."""
    half = window // 2
    sums = np.concatenate([[0.0], np.cumsum(y)])
    low = np.maximum(np.arange(len(y)) - half, 0)
    high = np.minimum(np.arange(len(y)) + half + 1, len(y))
    return (sums[high] - sums[low]) / (high - low)


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round values between two numbers."""
    span = (high - low) or 1.0
    raw = span / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass
class Plot:
    """One rectangle of a picture with lines over a vertical scale of its own; add to it, then ask for its ``svg``.

    Attributes:
        title: stands above it.
        x: first and last value of the horizontal scale.
        y: first and last value of the vertical scale; on a logarithmic one both above 0.
        left, right, top, bottom: of the rectangle, in pixels.
        log: logarithmic vertical scale.
        now: stands above it at the right, the newest value for one.
    """

    title: str
    x: tuple[float, float]
    y: tuple[float, float]
    left: float
    right: float
    top: float
    bottom: float
    log: bool = False
    now: str = ""
    parts: list[str] = field(default_factory=list)

    def px(self, x: np.ndarray | float) -> np.ndarray:
        """Horizontal places of values, in pixels."""
        return self.left + (np.asarray(x, float) - self.x[0]) / (self.x[1] - self.x[0]) * (self.right - self.left)

    def py(self, y: np.ndarray | float) -> np.ndarray:
        """Vertical places of values, in pixels, kept within the rectangle."""
        y, (low, high) = np.asarray(y, float), self.y
        if self.log:
            y, low, high = np.log(np.maximum(y, low)), math.log(low), math.log(high)
        share = np.clip((y - low) / (high - low), 0.0, 1.0)
        return self.bottom - share * (self.bottom - self.top)

    def line(self, x: np.ndarray, y: np.ndarray, css: str) -> None:
        """A line through points, sorted by ``x``; what is not finite interrupts it."""
        finite = np.isfinite(y)
        for piece in np.split(np.arange(len(x)), np.flatnonzero(np.diff(finite.astype(int))) + 1):
            if len(piece) and finite[piece[0]]:
                points = _points(*thin_out(self.px(x[piece]), self.py(y[piece])))
                self.parts.append(f'<polyline class="line {css}" points="{points}"/>')

    def band(self, x: np.ndarray, low: np.ndarray, high: np.ndarray, css: str) -> None:
        """The surface between two lines, all of it finite."""
        across = np.concatenate([self.px(x), self.px(x)[::-1]])
        points = _points(across, np.concatenate([self.py(low), self.py(high)[::-1]]))
        self.parts.append(f'<polygon class="band {css}" points="{points}"/>')

    def dots(self, x: np.ndarray, y: np.ndarray, css: str, notes: Sequence[str]) -> None:
        """A dot for every point, with a note to show under the pointer."""
        for a, b, note in zip(self.px(x), self.py(y), notes, strict=True):
            self.parts.append(
                f'<circle class="dot {css}" cx="{a:.1f}" cy="{b:.1f}" r="3"><title>{html.escape(note)}</title></circle>'
            )

    def svg(self) -> list[str]:
        """The parts of the picture: title, scale, and what was added."""
        out = [f'<text class="bold" x="{self.left}" y="{self.top - 7:.0f}">{html.escape(self.title)}</text>']
        if self.now:
            where = f'text-anchor="end" x="{self.right}" y="{self.top - 7:.0f}"'
            out.append(f'<text class="ink" {where}>{html.escape(self.now)}</text>')
        for value in self._marks():
            y = self.py(value)
            out.append(f'<line class="grid" x1="{self.left}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            out.append(f'<text text-anchor="end" x="{self.left - 7}" y="{y + 4:.1f}">{number(value)}</text>')
        return out + self.parts

    def _marks(self) -> list[float]:
        about = max(2, round((self.bottom - self.top) / 40))
        if not self.log:
            return ticks(*self.y, about)
        low, high = (math.log10(v) for v in self.y)
        decades = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
        if len(decades) >= 2:
            return [10.0**k for k in decades][:: -(-len(decades) // (about + 1))]
        return [value for value in ticks(*self.y, about) if value > 0]


def _points(x: np.ndarray, y: np.ndarray) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True))


class Buckets(NamedTuple):
    """Many points drawn as few: of each stretch of the horizontal axis the middle place and what the points span."""

    x: np.ndarray
    low: np.ndarray
    median: np.ndarray
    high: np.ndarray


def bucketed(x: np.ndarray, y: np.ndarray, ends: tuple[float, float], count: int) -> Buckets:
    """Lowest, median and highest point of each of ``count`` equal stretches that has any.

    Args:
        x: (n,) sorted, within ``ends``.
        y: (n,); what is not finite is left out.
        ends: first and last value of the axis.
        count: of stretches.
    """
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    place = np.minimum(((x - ends[0]) / (ends[1] - ends[0]) * count).astype(int), count - 1)
    starts = np.flatnonzero(np.diff(place, prepend=-1))
    if not len(starts):
        return Buckets(*(np.empty(0),) * 4)
    stops = np.append(starts[1:], len(place))
    ordered = y[np.lexsort((y, place))]
    middle = ordered[(starts + stops - 1) // 2]
    return Buckets((x[starts] + x[stops - 1]) / 2, ordered[starts], middle, ordered[stops - 1])


def picture(width: int, height: float, parts: list[str], title: str) -> str:
    """An SVG element of its parts, as wide as the page lets it."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" width="{width}" '
        f'role="img" aria-label="{html.escape(title)}">' + "".join(parts) + "</svg>"
    )


def standalone(svg: str) -> str:
    """The chart as a file of its own, with its colours and a background."""
    start = svg.index(">") + 1
    box = svg.split('viewBox="')[1].split('"')[0]
    width, height = (int(side) + 32 for side in box.split()[2:])
    head = svg[:start].replace(f'viewBox="{box}" width="{width - 32}"', f'viewBox="-16 -16 {width} {height}"')
    head = head.replace("<svg ", f'<svg width="{width}" height="{height}" ', 1)
    paper = f'<rect class="paper" x="-16" y="-16" width="{width}" height="{height}" rx="8"/>'
    return f"{head}<style>{html.escape(STYLE, quote=False)}</style>{paper}{svg[start:]}\n"
