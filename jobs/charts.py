"""Charts as SVG text that follow the reader's light or dark setting, alone or inside a page.

Colours are CSS classes: a page carries ``STYLE`` once, a picture of its own carries it in itself.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

# Okabe and Ito's colours, which people who do not tell red from green tell apart; lighter ones on dark.
STYLE = """
:root, svg { --paper: #ffffff; --ink: #1c2330; --soft: #667085; --grid: #e4e7ec; --panel: #f7f8fa;
  --train: #0072b2; --validation: #d55e00; --undone: #98a2b3; --rollback: #c0265e; --restart: #7a4fd0;
  --kept: #0072b2; --dropped: #e8b4a0; --good: #067a57; }
@media (prefers-color-scheme: dark) { :root, svg { --paper: #14181f; --ink: #e6e9ef; --soft: #98a2b3; --grid: #2b323d;
  --panel: #1b212b; --train: #56b4e9; --validation: #f09a4a; --undone: #8b95a5; --rollback: #ff7eaa;
  --restart: #b79cff; --kept: #56b4e9; --dropped: #6b4a40; --good: #4cc38a; } }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
svg text.ink { fill: var(--ink); } svg text.bold { font-weight: 600; fill: var(--ink); }
svg .paper { fill: var(--paper); } svg .grid { stroke: var(--grid); } svg .clear { fill: transparent; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; } svg .thin { stroke-width: 1; opacity: .4; }
svg .dashed { stroke-dasharray: 3 3; } svg .rule { stroke-width: 1.5; }
svg .train { stroke: var(--train); } svg .validation { stroke: var(--validation); }
svg .undone { stroke: var(--undone); stroke-width: 1.5; } svg .rollback { stroke: var(--rollback); }
svg .restart { stroke: var(--restart); } svg .dot.validation { fill: var(--validation); }
svg .dot.rollback { fill: var(--rollback); } svg .dot.restart { fill: var(--restart); }
svg .kept { fill: var(--kept); } svg .dropped { fill: var(--dropped); }
"""

MOST_POINTS = 1200  # on a line; more than the picture has columns only makes the page heavy


def number(value: float) -> str:
    """A number for people: 950, 1.2k, 34M, 0.0012, 3e-07."""
    size = abs(value)
    if size and size < 0.001:
        return f"{value:.3g}".replace("e-0", "e-")
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if size >= scale:
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
class Chart:
    """Lines over an x axis; add to it, then ask for its ``svg``."""

    title: str
    x: tuple[float, float]
    y: tuple[float, float]
    x_label: str = "step"
    width: int = 960
    height: int = 360
    log: bool = False
    head: int = 34
    """Pixels above the plot, for the title and marks."""
    parts: list[str] = field(default_factory=list)
    legend: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        low, high = self.y
        if self.log:
            low = max(low, high * 1e-6, 1e-12)
            high = max(high, low * 1.01)
            self.y = (low / 1.1, high * 1.1)
        else:
            pad = (high - low or abs(high) or 1.0) * 0.05
            self.y = (low - pad, high + pad)
        if self.x[0] == self.x[1]:
            self.x = (self.x[0], self.x[1] + 1)
        self.left, self.right, self.bottom = 58, self.width - 14, self.height - 40

    def px(self, x: float) -> float:
        """Horizontal place of a value, in pixels."""
        return self.left + (x - self.x[0]) / (self.x[1] - self.x[0]) * (self.right - self.left)

    def py(self, y: float) -> float:
        """Vertical place of a value, in pixels, kept within the plot."""
        low, high = self.y
        if self.log:
            y, low, high = math.log(max(y, low)), math.log(low), math.log(high)
        share = min(max((y - low) / (high - low), 0.0), 1.0)
        return self.bottom - share * (self.bottom - self.head)

    def line(self, x: Sequence[float], y: Sequence[float], css: str, label: str = "") -> None:
        """A line through points; what is not finite interrupts it."""
        xs, ys = np.asarray(x, float), np.asarray(y, float)
        finite = np.isfinite(ys)
        edges = np.flatnonzero(np.diff(finite.astype(int))) + 1
        for piece in np.split(np.arange(len(xs)), edges):
            if len(piece) and finite[piece[0]]:
                points = zip(*thin_out(xs[piece], ys[piece]), strict=True)
                path = " ".join(f"{self.px(a):.1f},{self.py(b):.1f}" for a, b in points)
                self.parts.append(f'<polyline class="line {css}" points="{path}"/>')
        if label:
            self.legend.append((f"line {css}", label))

    def dots(self, x: Sequence[float], y: Sequence[float], css: str, notes: Sequence[str]) -> None:
        """A dot for every point, with a note to show under the pointer."""
        for a, b, note in zip(x, y, notes, strict=True):
            if math.isfinite(b):
                self.parts.append(
                    f'<circle class="dot {css}" cx="{self.px(a):.1f}" cy="{self.py(b):.1f}" r="3">'
                    f"<title>{html.escape(note)}</title></circle>"
                )

    def rule(self, x: float, css: str, note: str) -> None:
        """A vertical line with a handle above the plot that shows a note under the pointer."""
        a = self.px(x)
        self.parts.append(
            f'<g><title>{html.escape(note)}</title><line class="rule dashed {css}" x1="{a:.1f}" x2="{a:.1f}" '
            f'y1="{self.head}" y2="{self.bottom}"/><circle class="dot {css}" cx="{a:.1f}" cy="{self.head}" r="4"/></g>'
        )

    def leap(self, start: float, end: float, css: str, note: str) -> None:
        """An arrow above the plot from one x back to another."""
        a, b, y = self.px(start), self.px(end), self.head - 2
        top = y - 14
        self.parts.append(
            f'<g><title>{html.escape(note)}</title><path class="line {css}" d="M{a:.1f},{y} C{a:.1f},{top} '
            f'{b:.1f},{top} {b:.1f},{y}"/><path class="line {css}" d="M{b - 4:.1f},{y - 6} L{b:.1f},{y} '
            f'L{b + 4:.1f},{y - 6}"/></g>'
        )

    def block(self, x: float, css: str, note: str) -> None:
        """A small mark on the x axis with a note."""
        a = self.px(x)
        self.parts.append(
            f'<g><title>{html.escape(note)}</title><path class="dot {css}" d="M{a - 5:.1f},{self.bottom + 7} '
            f'L{a + 5:.1f},{self.bottom + 7} L{a:.1f},{self.bottom - 1} Z"/></g>'
        )

    def svg(self) -> str:
        """The chart."""
        out = [f'<text class="bold" x="{self.left}" y="14">{html.escape(self.title)}</text>']
        if self.log:
            low, high = (math.log10(v) for v in self.y)
            decades = [10.0**k for k in range(math.ceil(low), math.floor(high) + 1)]
            ys = decades if len(decades) >= 2 else [10**v for v in ticks(low, high, 4)]
        else:
            ys = ticks(*self.y, about=6)
        for value in ys:
            y = self.py(value)
            out.append(f'<line class="grid" x1="{self.left}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            out.append(f'<text text-anchor="end" x="{self.left - 7}" y="{y + 4:.1f}">{number(value)}</text>')
        for value in ticks(*self.x, about=8 if self.width > 600 else 4):
            x, y = self.px(value), self.bottom + 20
            out.append(f'<text text-anchor="middle" x="{x:.1f}" y="{y}">{number(value)}</text>')
        x, y = self.right, self.bottom + 36
        out.append(f'<text text-anchor="end" x="{x}" y="{y}">{html.escape(self.x_label)}</text>')
        out += self.parts
        place = self.left
        for css, label in self.legend:
            y = self.bottom + 32
            if css.startswith("line"):
                out.append(f'<line class="{css}" x1="{place}" x2="{place + 20}" y1="{y}" y2="{y}"/>')
            else:
                out.append(f'<circle class="{css}" cx="{place + 10}" cy="{y}" r="4"/>')
            out.append(f'<text class="ink" x="{place + 26}" y="{y + 4}">{html.escape(label)}</text>')
            place += 42 + 6.6 * len(label)
        return picture(self.width, self.height, out, self.title)


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
