"""report.html: one file that needs no other, made from what a finished run left in its workdir."""

import base64
import functools
import hashlib
import itertools
from importlib import resources

import jinja2

import guided_distill
from guided_distill.errors import UserError
from guided_distill.files import absolute, read_json, write_whole
from guided_distill.report import charts, headline, samples, sections, words
from guided_distill.report.rows import is_number, metric_of, networks, read_summary, references


def write_report(workdir):
    """Writes `workdir/report.html` from its summary.json, the stages' metrics.jsonl and the rows' pictures.

    Returns its path. Raises UserError where there is no summary.json, or it is not one.
    """
    workdir = absolute(workdir)
    summary = read_summary(workdir)
    path = workdir / "report.html"
    write_whole(path, render(workdir, summary))
    return path


def render(workdir, summary) -> str:
    """The page of a summary as `read_summary` returns it."""
    rows = summary["rows"]
    of_networks = networks(rows)
    floors = {of_networks[0]: summary.get("noise_floor")} if of_networks else {}
    floors |= summary.get("noise_floors") or {}
    floors = {network: float(floor) if is_number(floor) else None for network, floor in floors.items()}
    floor = floors[of_networks[0]] if of_networks else None
    main = metric_of("frechet", of_networks[0]) if of_networks else None
    found = headline.verdicts(rows, main, floor)
    losses, notes = sections.losses(workdir)
    grid, lost_pictures = _grid(workdir, rows, found)
    groups = _provenance(rows)
    diagnostics = summary.get("diagnostics") or {}
    style, script = (_text(name) for name in ("style.css", "script.js"))
    return (
        _environment()
        .get_template("template.html")
        .render(
            name=_name(workdir),
            version=guided_distill.__version__,
            policy=_policy(style, script),
            style=style,
            script=script,
            warnings=[(stage, values["warning"]) for stage, values in diagnostics.items() if values.get("warning")],
            notes=notes + lost_pictures + list(dict.fromkeys(note for row in rows for note in row.notes)),
            headline=_headline(found, main, floor),
            main=main,
            cards=[_card(verdict, main, floor) for verdict in found],
            grid=grid,
            surfaces=[_surface(rows, network, floors.get(network)) for network in of_networks],
            losses=losses,
            diagnostics=sections.diagnostics(diagnostics),
            accuracy=summary.get("classifier_test_accuracy"),
            environment=summary.get("environment") or {},
            settings=summary.get("evaluate") or {},
            groups=groups,
            rows=[(row, groups.index(row.provenance)) for row in rows],
            metrics=list(dict.fromkeys(metric for row in rows for metric in row.metrics)),
            charts=charts,
        )
    )


@functools.cache
def _environment():
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_text),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        label=words.label,
        short=words.short,
        number=words.number,
        figure=words.figure,
        times=lambda value: words.times([value]),
    )
    return environment


def _text(name):
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _policy(style, script):
    """What the page may load: pictures that it carries itself, and this one style and script, known by their hashes."""
    style, script = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script))
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{style}'; script-src 'sha256-{script}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _name(workdir):
    """What the run is called: its data set and its directory."""
    try:
        data = str(read_json(workdir / "config.json")["data"]["name"])
    except (OSError, UserError, KeyError, TypeError):
        return workdir.name
    return data if data == workdir.name else f"{data} ({workdir.name})"


def _headline(found, main, floor):
    return {
        "title": headline.title(found),
        "lead": headline.lead(found),
        "misses": headline.misses(found),
        "losses": headline.losses(found, main),
        "definition": headline.definition(floor),
    }


def _card(verdict, main, floor):
    """A w of the headline: every metric of the reference teacher beside the student's, and the change in words."""
    theirs, ours = verdict.reference.metrics, verdict.student.metrics
    lines = []
    others = (name for name in theirs if name in ours and name != main and not words.is_spread(name))
    for name in [main, *others]:
        sign = words.direction(name)
        change = verdict.change if name == main else -sign * headline.lost(verdict, name)
        said = words.change(change, sign) if words.has_share(name) else ""
        if name == main and max(theirs[name], ours[name]) <= (floor or 0.0):
            said = "within noise"
        lines.append((name, None if name.startswith("distance") else theirs[name], ours[name], said))
    if verdict.faster:
        lines.append(("ms an image", 1000 * verdict.reference.seconds, 1000 * verdict.student.seconds, ""))
    return {"verdict": verdict, "lines": lines}


def _surface(rows, network, floor):
    """The charts of one feature network."""
    pairs = (("score", "frechet"), ("recall", "precision"), ("coverage", "density"))
    return {
        "network": network,
        "quality": sections.quality(rows, network, floor),
        "tradeoffs": [
            chart for pair in pairs if (chart := sections.tradeoff(rows, *(metric_of(kind, network) for kind in pair)))
        ],
    }


def _grid(workdir, rows, found):
    """(the pictures by series, steps and w, and where the sliders start; what could not be read)."""
    pictured = [row for row in rows if row.picture]
    pictures, lost = {}, []
    for row in pictured:
        try:
            content = (workdir / str(row.picture)).read_bytes()
            pictures[id(row)] = samples.data_uri(content, len(pictured))
        except (OSError, ValueError) as error:
            lost.append(f"The picture {row.picture} cannot be shown: {type(error).__name__}.")
    shown = [row for row in rows if id(row) in pictures]
    best = references(rows)
    few = [row for row in shown if row not in best.values()]
    if not few:
        return None, lost
    steps, strengths = sorted({row.num_steps for row in few}), sorted({row.w for row in shown})
    series = sorted({row.series for row in few}, key=list(sections.styles(rows)).index)
    by_key = {(row.series, row.num_steps, row.w): row for row in few}
    figures = [(sections.REFERENCE, "", w, best.get(w)) for w in strengths]
    figures += [(*key, by_key.get(key)) for key in itertools.product(series, steps, strengths)]
    start = next(((v.student.num_steps, v.w) for v in found if v.student in few), (steps[0], strengths[0]))
    return {
        "figures": [
            (name, f"{n}", f"{w:g}", row, pictures.get(id(row)) if row else None) for name, n, w, row in figures
        ],
        "sliders": [("steps", [f"{n}" for n in steps], steps.index(start[0]))]
        + [("w", [f"{w:g}" for w in strengths], strengths.index(start[1]))],
    }, lost


def _provenance(rows):
    """The different ways in which rows were measured, in the order of the rows."""
    groups = []
    for row in rows:
        if row.provenance not in groups:
            groups.append(row.provenance)
    return groups
