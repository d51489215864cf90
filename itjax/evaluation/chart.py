"""Curves over steps as inline SVG, small enough to read; a few lines of script show the values under the pointer.

A curve of many points is drawn as the mean of each of a few hundred stretches, with a band from its least to its greatest
value, so that a spike is always seen.
"""

import html
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 540, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 24, 10, 26  # margins around the plotted area
STRETCHES = 200
NUM_COLORS = 8
MANY = 8  # more curves than this are drawn thin and grey, without a legend

STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)); gap: 14px; }
figure { margin: 0; position: relative; } figcaption { font-weight: 600; font-size: 14px; margin-bottom: 4px; }
svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
svg text { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--grid); } .cursor { stroke: var(--soft); visibility: hidden; }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; } .many { stroke: var(--soft); stroke-width: 1; opacity: .35; }
.band { opacity: .18; stroke: none; } .dashed { stroke-dasharray: 5 4; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12.5px; color: var(--soft); }
.legend svg { display: inline-block; width: 20px; height: 8px; margin-right: 5px; vertical-align: middle; }
.tip { position: absolute; top: 26px; pointer-events: none; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: 4px 8px; font-size: 12px; white-space: pre; display: none; z-index: 2; }
"""

SCRIPT = """
for (const figure of document.querySelectorAll("figure[data-curves]")) {
  const {curves, left, right, width, first, last} = JSON.parse(figure.dataset.curves);
  const plot = figure.querySelector("svg.plot"), cursor = figure.querySelector(".cursor"), tip = figure.querySelector(".tip");
  const nearest = (steps, x) => steps.reduce((best, step, i) => Math.abs(step - x) < Math.abs(steps[best] - x) ? i : best, 0);
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect(), share = (event.clientX - box.left) / box.width * width;
    const x = first + (share - left) / (right - left) * (last - first);
    const found = curves.map(curve => ({name: curve.name, i: nearest(curve.steps, x), curve}));
    const step = found.map(f => f.curve.steps[f.i]).reduce((a, b) => Math.abs(b - x) < Math.abs(a - x) ? b : a);
    const lines = found.filter(f => f.curve.steps[f.i] === step).map(f => `${f.curve.shown[f.i]}  ${f.name}`);
    const at = left + (last > first ? (step - first) / (last - first) : 0) * (right - left);
    cursor.setAttribute("x1", at); cursor.setAttribute("x2", at); cursor.style.visibility = "visible";
    tip.textContent = [`step ${step.toLocaleString("en")}`, ...lines.slice(0, 14),
      ...(lines.length > 14 ? [`and ${lines.length - 14} more`] : [])].join("\\n");
    tip.style.display = "block";
    const place = at / width * box.width;
    tip.style.left = (place > box.width / 2 ? Math.max(0, place - tip.offsetWidth - 10) : place + 10) + "px";
  });
  plot.addEventListener("pointerleave", () => { cursor.style.visibility = "hidden"; tip.style.display = "none"; });
}
"""


@dataclass(frozen=True)
class Curve:
    """Values by step. Those that are None (not finite, or not measured) leave no mark."""

    name: str
    points: Sequence[tuple[int, float | None]]
    color: int = 0
    dashed: bool = False
    main: bool = False  # stands out among many


@dataclass(frozen=True)
class Stretch:
    """Neighbouring points of a curve as one: the step they end at, their mean, least and greatest value."""

    step: int
    mean: float
    low: float
    high: float


def stretches(points: Sequence[tuple[int, float | None]], *, most: int = STRETCHES) -> list[Stretch]:
    """At most about `most` stretches of equally many points; short curves keep every point."""
    known = [(step, value) for step, value in points if value is not None]
    size = max(1, math.ceil(len(known) / most))
    groups = [known[start : start + size] for start in range(0, len(known), size)]
    return [
        Stretch(group[-1][0], math.fsum(values) / len(values), min(values), max(values))
        for group in groups
        for values in [[value for _, value in group]]
    ]


def number(value: float) -> str:
    """Short for an axis: 0.25, 12k, 3.4M, 6e-05."""
    if value == 0:
        return "0"
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{sign}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.2g}"


def percent(value: float) -> str:
    return f"{value:.1%}".replace(".0%", "%")


def ticks(low: float, high: float, *, about: int = 4) -> list[float]:
    """Round numbers that cover low to high: ticks(0, 1) is 0, 0.25, ... or the like."""
    if high <= low:
        low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
    raw = (high - low) / about
    size = 10.0 ** math.floor(math.log10(raw))
    step = size * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * size >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(count * step, 12) for count in range(first, last + 1)]


def plot(
    title: str,
    curves: Sequence[Curve],
    *,
    shown: Callable[[float], str] = number,
    from_zero: bool = False,
    to_one: bool = False,
) -> str:
    """One chart as a figure, or nothing where no curve has a value."""
    drawn = [(curve, found) for curve in curves if (found := stretches(curve.points))]
    if not drawn:
        return ""
    steps = [stretch.step for _, found in drawn for stretch in found]
    values = [value for _, found in drawn for stretch in found for value in (stretch.low, stretch.high)]
    marks = ticks(min(values + [0.0] * from_zero), max(values + [1.0] * to_one))
    area = _Area(min(steps), max(steps), marks[0], marks[-1])
    many = len(drawn) > MANY
    body = "".join(_mark(area, mark, shown) for mark in marks) + _step_labels(area)
    body += "".join(_curve(area, curve, found, many=many) for curve, found in drawn)
    legend = "" if len(drawn) == 1 else _many_legend(drawn) if many else _legend([curve for curve, _ in drawn])
    return (
        f'<figure class="card" data-curves="{html.escape(_data(area, drawn, shown))}">'
        f"<figcaption>{html.escape(title)}</figcaption>"
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">{body}'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>{legend}<div class="tip"></div></figure>'
    )


@dataclass(frozen=True)
class _Area:
    """Where steps and values lie in the picture."""

    first: int
    last: int
    low: float
    high: float

    def x(self, step: float) -> float:
        share = (step - self.first) / (self.last - self.first) if self.last > self.first else 0.0
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        return round(TOP + (self.high - value) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM), 1)


def _mark(area: _Area, value: float, shown: Callable[[float], str]) -> str:
    y = area.y(value)
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{html.escape(shown(value))}</text>'
    )


def _step_labels(area: _Area) -> str:
    inside = [mark for mark in ticks(area.first, area.last, about=5) if area.first <= mark <= area.last]
    whole = [int(mark) for mark in inside if mark == int(mark)] or [area.first]
    return "".join(f'<text x="{area.x(step)}" y="{HEIGHT - 8}" text-anchor="middle">{step:,}</text>' for step in whole)


def _curve(area: _Area, curve: Curve, found: Sequence[Stretch], *, many: bool) -> str:
    color = f"var(--c{curve.color % NUM_COLORS})"
    muted = many and not curve.main
    classes = "curve" + " many" * muted + " dashed" * curve.dashed
    paint = "" if muted else f' style="stroke:{color}"'
    name = f"<title>{html.escape(curve.name)}</title>"
    if len(found) == 1:
        return f'<circle cx="{area.x(found[0].step)}" cy="{area.y(found[0].mean)}" r="3" style="fill:{color}">{name}</circle>'
    path = " ".join(f"{area.x(stretch.step)},{area.y(stretch.mean)}" for stretch in found)
    line = f'<polyline class="{classes}"{paint} points="{path}">{name}</polyline>'
    if muted or all(stretch.low == stretch.high for stretch in found):
        return line
    edge = [(stretch.step, stretch.high) for stretch in found] + [(s.step, s.low) for s in reversed(found)]
    band = " ".join(f"{area.x(step)},{area.y(value)}" for step, value in edge)
    return f'<polygon class="band" style="fill:{color}" points="{band}"/>{line}'


def _legend(curves: Sequence[Curve]) -> str:
    return '<div class="legend">' + "".join(_key(curve) for curve in curves) + "</div>"


def _many_legend(drawn: Sequence[tuple[Curve, Sequence[Stretch]]]) -> str:
    main = [curve for curve, _ in drawn if curve.main]
    others = len(drawn) - len(main)
    grey = f"<span>{others} others in grey</span>" if others else ""
    return f'<div class="legend">{"".join(map(_key, main))}{grey}</div>'


def _key(curve: Curve) -> str:
    dashed = " dashed" * curve.dashed
    return (
        f'<span><svg viewBox="0 0 20 8"><line class="curve{dashed}" style="stroke:var(--c{curve.color % NUM_COLORS})" '
        f'x1="0" x2="20" y1="4" y2="4"/></svg>{html.escape(curve.name)}</span>'
    )


def _data(
    area: _Area, drawn: Sequence[tuple[Curve, Sequence[Stretch]]], shown: Callable[[float], str]
) -> str:  # what the script needs
    curves = [
        {"name": curve.name, "steps": [s.step for s in found], "shown": [shown(s.mean) for s in found]}
        for curve, found in drawn
    ]
    bounds = {"left": LEFT, "right": WIDTH - RIGHT, "width": WIDTH, "first": area.first, "last": area.last}
    return json.dumps({"curves": curves} | bounds)
