"""What distillation gained and what it lost: for each w, the cheapest student that is as good as its teacher."""

import dataclasses
import math

from guided_distill.report import words
from guided_distill.report.rows import Row, references

TOLERANCE = 0.05
_WORTH_SAYING = 0.01  # of a loss


@dataclasses.dataclass(frozen=True)
class Verdict:
    """At one w: the student of the fewest calls within the tolerance, or else the nearest one."""

    w: float
    reference: Row
    student: Row
    change: float  # of the Fréchet distance, relative, with what is below the noise floor counted as the floor
    surely: bool  # whether the upper end of its bootstrap interval, where there is one, is within the tolerance too

    @property
    def within(self):
        """Whether the student is as good as the reference teacher, by the definition on the page."""
        return _is_within(self.change)

    @property
    def fewer_calls(self):
        """How many times fewer network calls an image takes; None where they were not counted."""
        return _ratio(self.reference.nfe, self.student.nfe)

    @property
    def faster(self):
        """How many times fewer seconds an image takes; None where they were not measured."""
        return _ratio(self.reference.seconds, self.student.seconds)


def verdicts(rows, metric, noise_floor) -> list[Verdict]:
    """One for each w at which both the reference teacher and a student have that Fréchet distance."""
    measured = [row for row in rows if metric in row.metrics]
    found = []
    for w, reference in sorted(references(measured).items()):
        ours = [_verdict(w, reference, row, metric, noise_floor) for row in measured if _is_student(row, w)]
        good = [verdict for verdict in ours if verdict.within]
        if good:
            found.append(min(good, key=lambda v: (v.student.nfe or v.student.num_steps, v.student.metrics[metric])))
        elif ours:
            found.append(min(ours, key=lambda v: (v.change, v.student.metrics[metric])))
    return found


def definition(noise_floor) -> str:
    """What "within 5 %" means on this page."""
    text = "Within 5 %: at most 1.05 times the reference teacher’s Fréchet distance to the data at the same w"
    if noise_floor is None:
        return text + ". No noise floor was measured, so that distances count as they are."
    return text + (
        f"; a distance below the noise floor, {words.number(noise_floor)} between two halves of the real data, counts "
        "as the floor."
    )


def title(found) -> str:
    """The gain in a few words."""
    good = [verdict for verdict in found if verdict.within]
    if not found:
        return "No student has been measured beside its teacher"
    if not good:
        return f"No student comes within {100 * TOLERANCE:.0f} % of its teacher"
    calls, seconds = _known(good, "fewer_calls"), _known(good, "faster")
    parts = [f"{words.times(calls)} fewer network calls"] if calls else []
    parts += [f"{words.times(seconds)} faster"] if seconds else []
    return ", ".join(parts) or f"Within {100 * TOLERANCE:.0f} % of its teacher"


def lead(found) -> str:
    """Where that holds: of which student, at which w."""
    good = [verdict for verdict in found if verdict.within]
    if not good:
        return ""
    steps = sorted({verdict.student.num_steps for verdict in good})
    whom = f"{steps[0]} step{'s' * (steps[0] != 1)}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]} steps"
    where = "every w measured" if len(good) == len(found) else words.strengths(verdict.w for verdict in good)
    best = sorted({verdict.reference.steps for verdict in good})
    return (
        f"With {whom}, a student is within 5 % of the reference teacher’s Fréchet distance ({' or '.join(best)}) at "
        f"{where}{f' ({len(good)} values)' * (where.startswith('every'))}."
    )


def misses(found) -> list[str]:
    """A line for each w at which no student is good enough: how far the nearest one is."""
    return [
        f"w = {verdict.w:g}: no student is within 5 %. The nearest, {verdict.student.series} with "
        f"{verdict.student.steps}, is {_further(verdict.change)} further from the data than its teacher."
        for verdict in found
        if not verdict.within
    ]


def losses(found, metric) -> list[str]:
    """What the chosen students lost by more than one percent, each at the w where they lost most of it."""
    worst = {metric: max(found, key=lambda verdict: verdict.change)} if found else {}
    for verdict in found:
        for name in _compared(verdict):
            if name != metric and (name not in worst or lost(verdict, name) > lost(worst[name], name)):
                worst[name] = verdict
    lines = []
    for name, verdict in worst.items():
        share = verdict.change if name == metric else lost(verdict, name)
        if share > _WORTH_SAYING:
            sign = -words.direction(name)
            lines.append(f"{words.label(name)} {words.percent(sign * share)} (w = {verdict.w:g})")
    return lines


def lost(verdict, metric) -> float:
    """The share of a metric that the student lost against the reference; negative where it gained."""
    theirs, ours = verdict.reference.metrics[metric], verdict.student.metrics[metric]
    return words.direction(metric) * (theirs - ours) / abs(theirs) if theirs else 0.0


def _compared(verdict):
    both = [name for name in verdict.reference.metrics if name in verdict.student.metrics]
    return [name for name in both if words.has_share(name)]


def _verdict(w, reference, student, metric, noise_floor):
    def change(value):
        theirs = max(reference.metrics[metric], noise_floor or 0.0)
        ours = max(value, noise_floor or 0.0)
        return ours / theirs - 1 if theirs else math.inf if ours else 0.0

    _, high = student.intervals.get(metric, (0.0, 0.0))
    return Verdict(w, reference, student, change(student.metrics[metric]), _is_within(change(high)))


def _is_within(change):
    return change <= TOLERANCE + 1e-9


def _is_student(row, w):
    return row.model == "student" and row.w == w


def _ratio(theirs, ours):
    return theirs / ours if theirs and ours else None


def _known(found, name):
    return [value for value in (getattr(verdict, name) for verdict in found) if value is not None]


def _further(change):
    return words.percent(change).lstrip("+")
