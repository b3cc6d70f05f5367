"""Which charts the report shows, of which rows."""

import itertools

from guided_distill.errors import UserError
from guided_distill.metrics import read_metrics
from guided_distill.report import words
from guided_distill.report.charts import STYLES, Curve, legend, panel, scale, thinned
from guided_distill.report.rows import is_number, metric_of, references

REFERENCE = "reference teacher"
_FIRST = ("student", "teacher, DDIM", "stage-one student")  # always in the same colours
_DIAGNOSTICS = {
    "gap_by_t": ("Gap to the teacher by time", "time t (1 = noise)"),
    "gap_by_w": ("Gap to the teacher by w", "guidance strength w"),
    "clipped": ("Share of clipped pixels", "guidance strength w"),
    "colour_drift": ("Colour drift", "guidance strength w"),
}


def styles(rows) -> dict[str, int]:
    """{series: its style}, the same in all charts."""
    names = list(dict.fromkeys([*_FIRST, *(row.series for row in rows)]))
    return {name: index % STYLES for index, name in enumerate(names)}


def quality(rows, network, noise_floor) -> dict | None:
    """Fréchet distance against steps, a panel for each w."""
    metric, style = metric_of("frechet", network), styles(rows)
    rows = [row for row in rows if metric in row.metrics]
    best = references(rows)
    few = [row for row in rows if row not in best.values()]
    if not few:
        return None
    x = scale([row.num_steps for row in few], log=True, ticks=sorted({row.num_steps for row in few}))
    everything = [row.metrics[metric] for row in rows]
    ends = [end for row in rows for end in row.intervals.get(metric, ()) if end > 0]
    y = scale(everything + ends + [noise_floor] * (noise_floor is not None), log=True)
    panels, curves = [], []
    for w in sorted({row.w for row in few}):
        here = [_over_steps(name, style[name], group, metric) for name, group in _by_series(few, w)]
        rules = [("reference", best[w].metrics[metric])] if w in best else []
        rules += [("floor", noise_floor)] if noise_floor is not None else []
        labels = {"x_label": "sampling steps", "y_label": f"{words.short(metric)}, less is better"}
        panels.append(panel(f"w = {w:g}", here, x, y, rules=rules, **labels))
        curves += here
    entries = [("reference", f"{REFERENCE}, {next(iter(best.values())).steps}")] if best else []
    entries += [("floor", f"noise floor, {words.number(noise_floor)}")] if noise_floor is not None else []
    return {"panels": panels, "legend": legend(curves) + entries}


def tradeoff(rows, x_metric, y_metric) -> dict | None:
    """One metric against another with w along each curve, a panel for each number of steps; None if not measured."""
    style = styles(rows)
    rows = [row for row in rows if x_metric in row.metrics and y_metric in row.metrics]
    best = references(rows)
    few = [row for row in rows if row not in best.values()]
    if len({row.w for row in rows}) < 2 or not few:
        return None
    x = scale([row.metrics[x_metric] for row in rows])
    y = scale([row.metrics[y_metric] for row in rows], log=words.direction(y_metric) < 0)
    names = [words.short(metric) for metric in (x_metric, y_metric)]
    better = ["more" if words.direction(metric) > 0 else "less" for metric in (x_metric, y_metric)]
    labels = [f"{name}, {sense} is better" for name, sense in zip(names, better, strict=True)]
    panels, curves = [], []
    top = [_over_w(REFERENCE, "reference", list(best.values()), x_metric, y_metric)] if best else []
    for num_steps in sorted({row.num_steps for row in few}):
        group = [row for row in few if row.num_steps == num_steps]
        here = [_over_w(name, style[name], own, x_metric, y_metric) for name, own in _by_series(group)]
        title = f"{num_steps} step{'s' * (num_steps != 1)}"
        panels.append(panel(title, top + here, x, y, x_label=labels[0], y_label=labels[1]))
        curves += here
    return {"title": f"{names[1]} against {names[0]}", "panels": panels, "legend": legend(curves + top)}


def losses(workdir) -> tuple[list[dict], list[str]]:
    """(a panel for each stage that has a metrics.jsonl, what could not be read)."""
    panels, unreadable = [], []
    for directory in sorted(workdir.glob("[0-9][0-9]_*"), key=lambda path: path.name):
        try:
            lines = read_metrics(directory)
        except UserError as error:
            unreadable.append(str(error))
            continue
        points = [(line["step"], line["loss"]) for line in lines if is_number(line.get("loss"))]
        if not points:
            continue
        points = thinned(points)
        x, y = scale([a for a, _ in points]), scale([b for _, b in points], log=True)
        name = directory.name.partition("_")[2]
        curve = Curve("loss", 0, points)
        panels.append(panel(name, [curve], x, y, x_label="updates", y_label="loss"))
    return panels, unreadable


def diagnostics(found) -> dict | None:
    """What each round lost, by t and by w; None where nothing of it was measured."""
    panels, curves = [], []
    for key, (title, x_label) in _DIAGNOSTICS.items():
        here = [
            Curve(stage, index % STYLES, points, [f"{stage}: {words.number(b)}" for _, b in points])
            for index, (stage, values) in enumerate(found.items())
            if (points := _pairs(values.get(key)))
        ]
        if here:
            every = [point for curve in here for point in curve.points]
            log = key.startswith("gap")
            x, y = scale([a for a, _ in every]), scale([b for _, b in every], log=log)
            panels.append(panel(title, here, x, y, x_label=x_label, y_label=title.lower()))
            curves += here
    smooth = [(stage, values["smoothness_over_w"]) for stage, values in found.items() if _smooth(values)]
    return {"panels": panels, "legend": legend(curves), "smoothness": smooth} if panels or smooth else None


def _smooth(values):
    return is_number(values.get("smoothness_over_w"))


def _pairs(points):
    return sorted((a, b) for a, b in points or [] if is_number(a) and is_number(b))


def _by_series(rows, w=None):
    rows = sorted((row for row in rows if w is None or row.w == w), key=lambda row: row.series)
    return [(name, list(group)) for name, group in itertools.groupby(rows, key=lambda row: row.series)]


def _over_steps(name, style, rows, metric):
    rows = sorted(rows, key=lambda row: row.num_steps)
    points = [(row.num_steps, row.metrics[metric]) for row in rows]
    tips = [f"{name}, {row.steps}: {words.number(row.metrics[metric])}" for row in rows]
    return Curve(name, style, points, tips, intervals=[row.intervals.get(metric) for row in rows])


def _over_w(name, style, rows, x_metric, y_metric):
    rows = sorted(rows, key=lambda row: row.w)
    points = [(row.metrics[x_metric], row.metrics[y_metric]) for row in rows]
    notes = [f"w {row.w:g}" for row in rows]
    tips = [f"{name}, {at}: {words.number(a)}, {words.number(b)}" for at, (a, b) in zip(notes, points, strict=True)]
    return Curve(name, style, points, tips, notes)
