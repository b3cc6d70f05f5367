"""The surface of quality over (model, steps, w): rows of summary.json, a table, a picture."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import platform

import jax
import numpy as np

from guided_distill import distributed, drawing, pictures
from guided_distill.data import read_tokens
from guided_distill.errors import Stopped, UserError
from guided_distill.evaluation import captions, pixels
from guided_distill.evaluation.clip_scores import make_scorer
from guided_distill.evaluation.features import OPERATIONS
from guided_distill.evaluation.samples import Samples, collect
from guided_distill.evaluation.yardstick import features_of, kept_rows, make_yardsticks, measure_by, provenance_of
from guided_distill.files import absolute, write_json, write_whole
from guided_distill.summary_table import table_of
from guided_distill.surface import make_entries
from guided_distill.teachers import flops_of_a_call
from guided_distill.text import end_of_text

_SHOWN = 10  # samples in a row of the picture,
_SHOWN_POINTS = 500  # or points in one of its panels
_COMPARED = 5000  # samples whose distance to the reference teacher's is taken, at most
_COMPARED_BYTES = 2**29  # of them on disk
_ROW_KEY = ("stage", "sampler", "num_steps", "w")
_SURFACE = ("w", "num_steps")  # of the settings: what adds rows and changes none


def evaluate(run, progress):
    """Measures every model of a finished run; returns the summary, which is also written with a table and a picture.

    Rows that are there already, of the same weights and settings, are kept: an interrupted evaluation loses the row it
    was at (killed, that before it too) or, of a costly one, the batch, and further w or num_steps add rows.
    """
    entries = make_entries(run.experiment, run.stages)
    keys = [entry.key(w) for entry in entries for w in entry.strengths(run.experiment.evaluate)]
    data, pictures_of_data = run.pictures
    of_pictures = dataclasses.replace(run.experiment, data=data)
    yardsticks = make_yardsticks(of_pictures, pictures_of_data, _directory(run), run.mesh, progress.say)
    provenance = provenance_of(yardsticks)
    found, kept, drawn = distributed.agreed(lambda: _earlier(run, provenance))
    rows = {tuple(row[key] for key in _ROW_KEY): row for row in kept}
    whole = found.get("evaluate") == _settings(run.experiment.evaluate) and all(key in rows for key in keys)
    if whole and drawn:
        progress.skip(work(run.experiment, run.stages))
        progress.say_table(table_of(found))
        return found

    if run.is_main and not rows:
        # What was measured in another way goes with its summary: rows must not meet samples of other settings.
        _forget_rows(run.workdir)
    if run.is_main:
        (run.workdir / "comparison.png").unlink(missing_ok=True)  # it is made when all rows are there
        _directory(run).mkdir(parents=True, exist_ok=True)
    summary, said = {**found, **_told(run, yardsticks)}, set()
    kept_at = drawing.row_directories(run)
    for entry, w, row in _measured(run, entries, rows, yardsticks, kept_at, progress):
        anew = entry.key(w) not in rows
        rows[entry.key(w)] = row
        for note in sorted(set(row["notes"]) - said):
            progress.say(note)
        said |= set(row["notes"])
        # Rows of other w or numbers of steps, measured in the same way earlier, stay.
        summary["rows"] = [rows[key] for key in dict.fromkeys([*keys, *rows]) if key in rows]
        if run.is_main:
            write_summary(run, summary)
            if anew:
                drawing.forget(kept_at(entry, w, run.experiment.evaluate.num_samples))
    if run.is_main:
        drawing.forget(drawing.kept(run.workdir))  # those of other settings, too
        pictures.save_png(run.workdir / "comparison.png", _comparison(run, entries))
        progress.say_table(table_of(summary))
        progress.say(f"{run.workdir / 'comparison.png'}: samples; {run.workdir / 'summary.json'}: these figures")
    return summary


def work(experiment, stages):
    """What `evaluate` costs, in forward passes of one image."""
    entries, seeing = make_entries(experiment, stages), seeing_work(experiment, stages)
    calls = sum((entry.calls + seeing) * len(entry.strengths(experiment.evaluate)) for entry in entries)
    return experiment.evaluate.num_samples * calls


def seeing_work(experiment, stages):
    """What the networks of ImageNet among config.evaluate.features cost for one image, in forward passes of one."""
    operations = sum(OPERATIONS.get(name, 0.0) for name in experiment.evaluate.features)
    if not operations:
        return 0
    return round(operations / flops_of_a_call(stages[0].model, stages[0].init))


def write_summary(run, summary):
    """Writes summary.json, whole or not at all; a report of another one is out of date."""
    (run.workdir / "report.html").unlink(missing_ok=True)
    write_json(run.workdir / "summary.json", summary)


def forget(workdir):
    """Removes what an evaluation wrote of weights that are about to change."""
    _forget_rows(workdir)
    drawing.forget(drawing.kept(workdir))


def _forget_rows(workdir):
    for name in ("summary.json", "comparison.png", "report.html"):
        (workdir / name).unlink(missing_ok=True)
    # The classifier and the statistics of real images, which belong to the data, stay.
    for suffix in ("npy", "png"):
        for path in (workdir / "evaluation").glob(f"*.{suffix}"):
            path.unlink()


def _directory(run):
    return run.workdir / "evaluation"


def _measured(run, entries, rows, yardsticks, kept_at, progress):
    """Yields (entry, w, row) of all models; a row that `rows` holds is not measured again."""
    config, loaded, warm = run.experiment.evaluate, (None, None), set()
    found_again, clip = _make_retrieval(run, yardsticks), _make_clip(run, progress)
    reference = next(entry for entry in entries if entry.reference)
    seeing = seeing_work(run.experiment, run.stages)
    ahead = _rows_ahead(run.mesh)
    surface = [(entry, w) for entry in entries for w in entry.strengths(config)]
    with concurrent.futures.ThreadPoolExecutor(1) as measuring:
        measured = collections.deque()
        try:
            for entry, w in surface:
                row = rows.get(entry.key(w))
                if row is not None:
                    progress.skip(config.num_samples * (entry.calls + seeing))
                    measured.append((entry, w, lambda row=row: row))
                else:
                    if loaded[0] is not entry.stage:
                        loaded = (entry.stage, run.params_of(entry.stage))
                    if (entry.stage.model, entry.sampler) not in warm:
                        list(drawing.drawn(run, entry, loaded[1], config.w[0], num=1, num_steps=1))  # compiles
                        warm.add((entry.stage.model, entry.sampler))
                        progress.begin()
                    compares = entry.keeps_the_map and entry != reference
                    asked = _reference_images(run, reference, w, kept_at, progress) if compares else None
                    advance = functools.partial(_advance, progress, entry, w, entry.calls + seeing)
                    measure = _draw_row(
                        run, entry, loaded[1], w, kept_at, yardsticks, asked, found_again, clip, advance
                    )
                    measured.append((entry, w, measuring.submit(measure).result if ahead else measure))
                yield from _results(measured, ahead)
            yield from _results(measured, 0)
        except (Exception, KeyboardInterrupt, Stopped):
            if ahead:  # What comes in the way of a row loses none that was drawn before it.
                with contextlib.suppress(Exception):
                    yield from _results(measured, 0)
            raise


def _rows_ahead(mesh):
    """How many rows are measured behind the one that is drawn: a device goes on drawing while the cores measure.

    None where the cores draw, since it would take their time, which is told.
    """
    return int(mesh.devices.flat[0].platform != "cpu")


def _results(measured, left):
    """Yields (entry, w, row) of a queue of (entry, w, what gives its row) until so many are left."""
    while len(measured) > left:
        entry, w, result = measured[0]
        row = result()
        measured.popleft()
        yield entry, w, row


def _reference_images(run, reference, w, kept_at, progress):
    """The reference teacher's first images for a w, f16: drawn again only where they are not on disk any more."""
    path = _directory(run) / f"{reference.file(w)}.images.npy"
    if distributed.agreed(path.exists):
        return _load_images(path)
    num = min(run.experiment.evaluate.num_samples, _compared(run))
    params, keep, images = run.params_of(reference.stage), kept_at(reference, w, num), []
    for batch in drawing.drawn(run, reference, params, w, num=num, num_steps=reference.num_steps, keep=keep):
        images.append(batch.x)
        progress.after_work()
    return _keep_images(run, path, np.concatenate(images))


def _advance(progress, entry, w, work, batch):
    if batch.anew:
        progress.advance(len(batch.index) * work, f"evaluating {entry.label}", f"w {w:g}")
    else:
        progress.skip(len(batch.index) * work)
        progress.after_work()


def _draw_row(run, entry, params, w, kept_at, yardsticks, asked, found_again, clip, advance):
    """Draws the samples of one row and keeps what the pictures show; returns what measures them, () -> the row."""
    config, bound, compared = run.experiment.evaluate, run.pictures[0].data_range, _compared(run)
    kept, seconds, distances, clip_scores = [], {True: [], False: []}, [], []
    parts = [[] for _ in yardsticks]
    num, keep = config.num_samples, kept_at(entry, w, config.num_samples)
    for batch in drawing.drawn(run, entry, params, w, num=num, num_steps=entry.num_steps, keep=keep):
        index, label, x = batch.index, batch.label, batch.x
        seconds[batch.anew].append(batch.seconds)
        figures = {} if bound is None else {"saturation": pixels.saturation(x, bound)}
        clip_scores.append(clip(x, label))
        for yardstick, batches in zip(yardsticks, parts, strict=True):
            batches.append(Samples(index, *features_of(yardstick.network, x, run.mesh), label, figures))
        near = index < compared
        kept.append(x[near] if entry.reference else x[index < _num_shown(run)])
        if asked is not None and near.any():
            distances.append(pixels.distance(x[near], asked[index[near]]))
        advance(batch)
    kept = np.concatenate(kept)
    if entry.reference:
        _keep_images(run, _directory(run) / f"{entry.file(w)}.images.npy", kept)
        distances = [np.zeros(len(kept))]
    _keep_pictures(run, entry, w, kept[: _num_shown(run)])

    def measure():
        measured = measure_by(yardsticks, parts, config.seed, f"{entry.label}, w {w:g}")
        measured["metrics"] |= found_again(parts)
        if len(scores := np.concatenate(clip_scores)):
            measured["metrics"]["clip_score"] = float(scores.mean())
        if distances:
            measured["metrics"]["distance_to_reference"] = float(np.concatenate(distances).mean())
        # What was drawn earlier may have been on another machine.
        timed = float(np.median(seconds[True] or seconds[False]))
        return _row(run, entry, w, timed, measured, yardsticks)

    return measure


def _make_retrieval(run, yardsticks):
    """(parts of a row's Samples by yardstick) -> {"retrieval_<network>": share}; nothing where there are no captions.

    Nor by a reference that is given: whose pictures it is of, and in what order, it does not say.
    """
    if run.conditions is None or "tokens" not in run.conditions or run.experiment.evaluate.reference is not None:
        return lambda parts: {}
    train = run.dataset.train
    real_tokens = read_tokens(train)[kept_rows(len(train))]
    alike = captions.likeness(run.conditions["tokens"], real_tokens, end_of_text(run.experiment.data.vocabulary))

    def found_again(parts):
        metrics = {}
        for yardstick, batches in zip(yardsticks, parts, strict=True):
            samples, real = collect(batches), yardstick.reference.neighbours.features
            name = f"retrieval_{yardstick.network.name}"
            metrics[name] = captions.retrieval(samples.features, alike[samples.label], real)
        return metrics

    return found_again


def _make_clip(run, progress):
    """(pictures, labels) -> their CLIP scores; none where config.evaluate.clip names no model."""
    folder = run.experiment.evaluate.clip
    if folder is None:
        return lambda x, label: np.zeros(0)
    progress.say(f"captions by the CLIP model {folder}")
    return make_scorer(folder, run.captions, run.mesh)


def _compared(run):
    """How many pictures are compared with the reference teacher's: so many fit a file, in half precision."""
    return min(_COMPARED, max(_num_shown(run), _COMPARED_BYTES // (2 * math.prod(run.pictures[0].sample_shape))))


def _num_shown(run):
    config, shape = run.experiment.evaluate, run.pictures[0].sample_shape
    return min(_SHOWN if len(shape) > 1 else _SHOWN_POINTS, config.num_samples)


def _keep_pictures(run, entry, w, x):
    _keep_images(run, _directory(run) / f"{entry.file(w)}.npy", x)
    if run.is_main:
        pictures.save_png(_directory(run) / f"{entry.file(w)}.png", pictures.strip(x))


def _keep_images(run, path, x):
    """Half precision, which holds an image to 1e-3 of its range and 5,000 of them in a file: written, and returned."""
    x = x.astype(np.float16)
    if run.is_main:
        buffer = io.BytesIO()
        np.save(buffer, x)
        write_whole(path, buffer.getvalue())
    return x


def _load_images(path):
    return np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)  # given a path, it looks on this machine alone


def _row(run, entry, w, seconds, measured, yardsticks):
    given = run.given(entry.stage)
    return {
        "stage": entry.stage.name,
        "model": "teacher" if entry.is_teacher else "student",
        "sampler": entry.sampler,
        "num_steps": entry.num_steps,
        "nfe": entry.calls,
        "w": w,
        "seconds_per_image": seconds,
        **measured,
        "num_samples": run.experiment.evaluate.num_samples,
        "seed": run.experiment.evaluate.seed,
        **provenance_of(yardsticks),
        "checkpoint": given or entry.stage.directory(run.workdir).name,
        "picture": f"evaluation/{entry.file(w)}.png",
    }


def _told(run, yardsticks):
    """What a summary says besides its rows."""
    told = {
        "noise_floor": yardsticks[0].reference.noise_floor,
        "noise_floors": {yardstick.network.name: yardstick.reference.noise_floor for yardstick in yardsticks},
        "evaluate": _settings(run.experiment.evaluate),
        "environment": _environment(),
    }
    for yardstick in yardsticks:
        if yardstick.test_accuracy is not None:
            told["classifier_test_accuracy"] = yardstick.test_accuracy
    return told


def _settings(config):
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    if config.captions is not None:  # other captions in the same file are other settings
        settings["captions"] += " " + hashlib.sha256(absolute(config.captions).read_bytes()).hexdigest()[:12]
    return settings


def _earlier(run, provenance):
    """(the summary that is there, those of its rows that are kept, whether their picture is there)."""
    found = _earlier_summary(run)
    kept = (row for row in found.get("rows", []) if (run.workdir / row["picture"]).exists())
    rows = [row for row in kept if row.items() >= provenance.items()]
    return found, rows, (run.workdir / "comparison.png").exists()


def _earlier_summary(run):
    """The summary that is there, or {} where it was measured in another way or by a version that measured less."""
    path = run.workdir / "summary.json"
    if not path.exists():
        return {}
    try:
        summary = json.loads(path.read_text())
        theirs, ours = summary["evaluate"], _settings(run.experiment.evaluate)
        whole = all(row.keys() >= {*_ROW_KEY, "metrics", "settings", "picture"} for row in summary["rows"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a summary of this program ({error}); delete it") from error
    same = all(theirs.get(key) == ours[key] for key in ours if key not in _SURFACE)
    return summary if same and whole else {}


def _environment():
    return {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "host_cores": os.cpu_count(),
    }


def _comparison(run, entries):
    """Per w, from the same noise: the reference, and for each N the teacher's own N steps above the student's."""
    few = sorted({entry.num_steps for entry in entries if not entry.reference}, reverse=True)
    order = {n: position for position, n in enumerate(few)}
    drawn = [entry for entry in entries if entry.is_teacher or entry.stage.series]
    drawn.sort(key=lambda entry: (not entry.reference, order.get(entry.num_steps, -1), not entry.is_teacher))
    config, directory = run.experiment.evaluate, _directory(run)
    groups = []
    for w in config.w:
        rows = [
            (entry.label, _load_images(directory / f"{entry.file(w)}.npy").astype(np.float32))
            for entry in drawn
            if w in entry.strengths(config)
        ]
        groups.append((f"w = {w:g}", rows))
    asked = "caption" if run.experiment.data.text_length else "label"
    return pictures.comparison(groups, f"{run.experiment.data.name}: the same noise and {asked} down each column")
