"""Where the parts of a chart lie, in the units of its drawing; template.html makes the SVG of it.

A panel is WIDTH wide, as wide as a phone, so that its letters are of the size of the page's.
"""

import dataclasses
import math

WIDTH, HEIGHT = 360, 236
LEFT, RIGHT, TOP, BOTTOM = 68, 16, 10, 40
STYLES = 7  # colours, markers and dashes that style.css tells apart
_LABEL_SPACE = (30, 11)  # labels nearer than this to another are left out
_WHOLE_DECADES = 3  # an axis longer than this has no ticks within its decades


@dataclasses.dataclass(frozen=True)
class Scale:
    """One axis: from low to high, linear or logarithmic."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def share(self, value):
        """Where a value lies: 0 at the low end, 1 at the high one."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return (value - low) / (high - low)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Points joined by a line; `notes` are shown beside them, `tips` when pointed at."""

    name: str
    style: int | str
    points: list[tuple[float, float]]
    tips: list[str] = dataclasses.field(default_factory=list)  # none: the points are not marked
    notes: list[str] = dataclasses.field(default_factory=list)
    intervals: list[tuple[float, float] | None] = dataclasses.field(default_factory=list)


def scale(values, *, log=False, ticks=None) -> Scale:
    """An axis that holds all of the values with a little room; linear where a logarithm does not exist."""
    low, high = min(values), max(values)
    log = log and low > 0
    if log:
        room = (high / low) ** 0.06 if high > low else 1.3
        low, high = low / room, high * room
    else:
        room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        low, high = (0.0 if 0 <= low < high / 3 else low - room), high + room
    if ticks is None:
        ticks = _ticks(low, high, log)
    return Scale(low, high, log, tuple(tick for tick in ticks if low <= tick <= high))


def panel(title, curves, x: Scale, y: Scale, *, x_label, y_label, rules=()) -> dict:
    """The geometry of one chart. `rules` are level lines [(style, y)]."""
    taken = []
    return {
        "title": title,
        "x_label": x_label,
        "y_label": y_label,
        "x_ticks": [(_across(x, tick), f"{tick:g}") for tick in x.ticks],
        "y_ticks": [(_down(y, tick), f"{tick:g}") for tick in y.ticks],
        "rules": [(style, _down(y, value)) for style, value in rules if y.low <= value <= y.high],
        "curves": [_curve(curve, x, y, taken) for curve in curves],
    }


def legend(curves) -> list[tuple[int | str, str]]:
    """(style, name) of each curve, once, in the order of the styles; those that are words come last."""
    return sorted({(curve.style, curve.name): None for curve in curves}, key=lambda entry: (str(entry[0]), entry[1]))


def thinned(points, most=120) -> list[tuple[float, float]]:
    """At most that many points: the means over equal stretches of the points."""
    size = math.ceil(len(points) / most)
    stretches = [points[start : start + size] for start in range(0, len(points), size)] if points else []
    return [tuple(sum(values) / len(values) for values in zip(*stretch, strict=True)) for stretch in stretches]


def _curve(curve, x, y, taken):
    at = [(_across(x, a), _down(y, b)) for a, b in curve.points]
    whiskers = [
        (left, _down(y, ends[0]), _down(y, ends[1]))
        for (left, _), ends in zip(at, curve.intervals, strict=False)
        if ends and not (y.log and ends[0] <= 0)
    ]
    return {
        "style": curve.style,
        "path": "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in at),
        "marks": [(a, b, tip) for (a, b), tip in zip(at, curve.tips, strict=False)],
        "whiskers": whiskers,
        "notes": [note for note in _notes(at, curve.notes) if _has_room(note, taken)],
    }


def _notes(at, notes):
    """(x, y, which end of the text is there, text): to the left of a point that is near the right edge."""
    for (a, b), note in zip(at, notes, strict=False):
        near_the_edge = a > WIDTH - RIGHT - 40
        yield a + (-7 if near_the_edge else 7), b - 5, "end" if near_the_edge else "start", note


def _has_room(note, taken):
    a, b = note[0] - (_LABEL_SPACE[0] if note[2] == "end" else 0), note[1]
    if any(abs(a - c) < _LABEL_SPACE[0] and abs(b - d) < _LABEL_SPACE[1] for c, d in taken):
        return False
    taken.append((a, b))
    return True


def _across(x, value):
    return round(LEFT + x.share(value) * (WIDTH - LEFT - RIGHT), 1)


def _down(y, value):
    return round(TOP + (1 - min(max(y.share(value), 0.0), 1.0)) * (HEIGHT - TOP - BOTTOM), 1)


def _ticks(low, high, log):
    if not log:
        return _linear_ticks(low, high)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    mantissas = (1,) if math.log10(high / low) > _WHOLE_DECADES else (1, 2, 5)
    ticks = [m * 10.0**decade for decade in decades for m in mantissas]
    inside = [float(f"{tick:.6g}") for tick in ticks if low <= tick <= high]
    return inside if len(inside) >= 2 else _linear_ticks(low, high)


def _linear_ticks(low, high):
    """About five round numbers."""
    raw = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = min((m * unit for m in (1, 2, 5, 10)), key=lambda s: abs(s - raw))
    first = math.ceil(low / step - 1e-9)
    return [float(f"{k * step:.6g}") for k in range(first, math.floor(high / step + 1e-9) + 1)]
