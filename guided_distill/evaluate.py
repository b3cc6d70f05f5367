"""The surface of quality over (model, steps, w): rows of summary.json, a table, a picture."""

import dataclasses
import json
import os
import platform
import time
from typing import Any

import jax
import numpy as np
from rich.table import Table

from guided_distill import evaluators, pictures
from guided_distill.data import read_records
from guided_distill.errors import UserError
from guided_distill.files import write_whole
from guided_distill.generate import sample_images
from guided_distill.models import classifier
from guided_distill.samplers import DRAWS_NOISE, network_calls

_SHOWN = 10  # samples in a row of the picture,
_SHOWN_POINTS = 500  # or points in one of its panels
_CLASSIFIER_IMAGES = 50_000
_ROW_KEY = ("stage", "sampler", "num_steps", "w")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One model with one sampler at one of the numbers of steps it is measured at."""

    stage: Any
    num_steps: int
    sampler: str = "deterministic"
    reference: bool = False  # the teacher's own best

    @property
    def is_teacher(self):
        """Whether this is the model that is distilled."""
        return self.stage.name in ("teacher", "to_v")

    @property
    def calls(self):
        """Network evaluations per image."""
        return self.stage.model.calls_per_step * network_calls(self.sampler, self.num_steps)

    @property
    def keeps_the_map(self):
        """Whether an image is a function of its first noise alone, hence comparable with the reference's."""
        return self.sampler not in DRAWS_NOISE

    @property
    def label(self):
        """How the picture and the progress call it."""
        calls = f"({self.calls} call{'s' * (self.calls > 1)})"
        if self.is_teacher:
            name = "teacher" if self.sampler == "deterministic" else self.sampler
            return f"{name} {self.num_steps}x{self.stage.model.calls_per_step} {calls}"
        series = {"": "stage 1", "det": "student", "sto": "stochastic student", "two": "two students"}
        name = series.get(self.stage.series, self.stage.series)
        low, high = self.stage.w_range
        return f"{name}{f' of w {low:g}' * (low == high)} {self.num_steps} {calls}"

    def key(self, w):
        """What names its row for a w."""
        return self.stage.name, self.sampler, self.num_steps, w

    def strengths(self, config):
        """Those w of an evaluation that the model was trained for."""
        low, high = self.stage.w_range
        return [w for w in config.w if low <= w <= high]


@dataclasses.dataclass(frozen=True)
class Measure:
    """What samples are measured with: the classifier, and the statistics of its features over the training set."""

    params: Any
    reference: evaluators.GaussianStats
    noise_floor: float
    test_accuracy: float


def make_entries(experiment, stages):
    """The reference teacher first: everything after it is compared with its images."""
    config = experiment.evaluate
    few = sorted(config.num_steps, reverse=True)
    guided, *students = (stage for stage in stages if stage.name != "teacher" or not experiment.to_v.updates)
    entries = [Entry(guided, experiment.stage2.teacher_steps, reference=True)]
    entries += [Entry(guided, n, sampler) for sampler in ("deterministic", *config.baselines) for n in few]
    for first in (stage for stage in students if not stage.series):
        entries += [Entry(first, n) for n in few]
    rounds = [stage for stage in students if stage.series and stage.sampler != "encode" and stage.num_steps in few]
    return entries + [Entry(stage, stage.num_steps, stage.sampler) for stage in rounds]


def work(experiment, stages):
    """What `evaluate` costs, in forward passes of one image."""
    entries = make_entries(experiment, stages)
    calls = sum(entry.calls * len(entry.strengths(experiment.evaluate)) for entry in entries)
    return experiment.evaluate.num_samples * calls


def evaluate(run, progress):
    """Measures every model of a finished run; returns the summary, which is also written with a table and a picture.

    Rows that are there already, of the same weights and settings, are kept: an interrupted evaluation goes on, and
    further w or num_steps add rows.
    """
    entries = make_entries(run.experiment, run.stages)
    keys = [entry.key(w) for entry in entries for w in entry.strengths(run.experiment.evaluate)]
    found, rows = _earlier(run)
    if found is not None and all(key in rows for key in keys) and (run.workdir / "comparison.png").exists():
        progress.skip(work(run.experiment, run.stages))
        progress.say_table(_table(found))
        return found

    progress.say("training the classifier that measures")
    measure = _make_measure(run)
    summary = {
        "rows": [],
        "noise_floor": measure.noise_floor,
        "classifier_test_accuracy": measure.test_accuracy,
        "evaluate": _settings(run.experiment.evaluate),
        "environment": _environment(),
    }
    if run.is_main:
        (run.workdir / "comparison.png").unlink(missing_ok=True)
    shown = {}
    for entry, w, row, images in _measured(run, entries, rows, measure, progress):
        rows[entry.key(w)] = row
        shown[entry, w] = images
        # Rows of other w or numbers of steps, measured in the same way earlier, stay.
        summary["rows"] = [rows[key] for key in dict.fromkeys([*keys, *rows]) if key in rows]
        if run.is_main:
            write_whole(run.workdir / "summary.json", json.dumps(summary, indent=1) + "\n")
    if run.is_main:
        pictures.save_png(run.workdir / "comparison.png", _comparison(run.experiment, entries, shown))
        progress.say_table(_table(summary))
        progress.say(f"{run.workdir / 'comparison.png'}: samples; {run.workdir / 'summary.json'}: these figures")
    return summary


def _measured(run, entries, rows, measure, progress):
    """Yields (entry, w, row, a few images) for all models; a row that `rows` holds is not measured again."""
    config = run.experiment.evaluate
    reference, loaded, warm = {}, (None, None), set()
    few = min(_SHOWN if len(run.experiment.data.sample_shape) > 1 else _SHOWN_POINTS, config.num_samples)
    for entry in entries:
        if loaded[0] is not entry.stage:
            loaded = (entry.stage, run.params_of(entry.stage))
        if (entry.stage.model, entry.sampler) not in warm:
            _samples(run, entry, loaded[1], config.w[0], num=1, num_steps=1)  # compiles
            warm.add((entry.stage.model, entry.sampler))
            progress.begin()
        for w in entry.strengths(config):
            row = rows.get(entry.key(w))
            # Where a row is there, only the reference's images, and the few that the picture shows, are needed again.
            num = config.num_samples if row is None or entry.reference else few
            samples = _samples(run, entry, loaded[1], w, num=num, num_steps=entry.num_steps)
            if entry.reference:
                # Half precision holds an image to 1e-3 of its range, and 50,000 of them in memory.
                reference[w] = samples["x"].astype(np.float16)
            if row is None:
                asked = reference[w] if entry.keeps_the_map else None
                row = _row(
                    run, entry, w, samples, _measure_samples(measure, samples, asked, entry.stage.model.data_range)
                )
            yield entry, w, row, samples["x"][:few]
            progress.advance(config.num_samples * entry.calls, f"evaluating {entry.label}", f"w {w:g}")


def forget(workdir):
    """Removes what an evaluation wrote: its weights are about to change."""
    for name in ("summary.json", "comparison.png"):
        (workdir / name).unlink(missing_ok=True)


def _settings(config):
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _earlier(run):
    """(the summary that is there or None, its rows by their keys), if they were measured in the same way."""
    path = run.workdir / "summary.json"
    if not path.exists():
        return None, {}
    try:
        summary = json.loads(path.read_text())
        theirs, ours = summary["evaluate"], _settings(run.experiment.evaluate)
        rows = {tuple(row[key] for key in _ROW_KEY): row for row in summary["rows"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a summary of this program ({error}); delete it") from error
    if any("diversity" not in row["metrics"] for row in rows.values()):  # of a version that measured less
        return None, {}
    surface = ("w", "num_steps", "batch_size")
    if any(theirs.get(key) != ours[key] for key in ours if key not in surface):
        return None, {}
    return (summary if theirs == ours else None), rows


def _make_measure(run):
    config, dataset = run.experiment.evaluate, run.dataset
    # An even share of a large set: 50,000 images teach the classifier, all of them are the reference.
    number = min(len(dataset.train), _CLASSIFIER_IMAGES)
    train = read_records(dataset.train, np.linspace(0, len(dataset.train) - 1, number).astype(int))
    test = read_records(dataset.test, range(min(len(dataset.test), _CLASSIFIER_IMAGES)))
    params = classifier.train_classifier(
        train["x"], train["label"], dataset.num_classes, seed=config.seed, updates=config.classifier_updates
    )
    chunks = [range(start, min(start + 5000, len(dataset.train))) for start in range(0, len(dataset.train), 5000)]
    features = np.concatenate(
        [_features_and_logits(params, read_records(dataset.train, chunk)["x"])[0] for chunk in chunks]
    )
    return Measure(
        params=params,
        reference=evaluators.gaussian_stats(features),
        noise_floor=evaluators.noise_floor(features, seed=config.seed),
        test_accuracy=classifier.accuracy(params, test["x"], test["label"]),
    )


def _features_and_logits(params, x, batch_size=500):
    outputs = []
    for start in range(0, len(x), batch_size):
        rows = x[start : start + batch_size]
        # Padded, so that every batch is the same program.
        padded = np.concatenate([rows, np.zeros((batch_size - len(rows), *x.shape[1:]), x.dtype)])
        outputs.append([np.asarray(values)[: len(rows)] for values in classifier.features_and_logits(params, padded)])
    return [np.concatenate(values) for values in zip(*outputs, strict=True)]


def _samples(run, entry, params, w, *, num, num_steps):
    """Images 0 .. num - 1 of the evaluation's seed, their labels, and the seconds an image took."""
    config, grid = run.experiment.evaluate, run.grid
    start = time.perf_counter()
    batches = list(
        sample_images(
            entry.stage.model,
            params,
            grid,
            run.mesh,
            seed=config.seed,
            num=num,
            w=w,
            num_steps=num_steps,
            batch_size=config.batch_size,
            sampler=entry.sampler,
        )
    )
    seconds = (time.perf_counter() - start) / (len(batches) * config.batch_size)
    _, label, x = (np.concatenate(values) for values in zip(*batches, strict=True))
    return {"x": x, "label": label, "seconds_per_image": seconds}


def _measure_samples(measure, samples, reference, data_range):
    features, logits = _features_and_logits(measure.params, samples["x"])
    stats = evaluators.collect(features, logits, samples["label"], samples["x"], reference, data_range)
    return evaluators.finish(stats, measure.reference)


def _row(run, entry, w, samples, values):
    given = run.given(entry.stage)
    return {
        "stage": entry.stage.name,
        "model": "teacher" if entry.is_teacher else "student",
        "sampler": entry.sampler,
        "num_steps": entry.num_steps,
        "nfe": entry.calls,
        "w": w,
        "seconds_per_image": samples["seconds_per_image"],
        "metrics": values,
        "num_samples": len(samples["x"]),
        "feature_network": f"classifier (64 features) trained on {run.experiment.data.name}",
        "reference": f"{run.experiment.data.name}/{run.experiment.data.train_split} ({len(run.dataset.train)} images)",
        "checkpoint": given or entry.stage.directory(run.workdir).name,
    }


def _environment():
    return {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "host_cores": os.cpu_count(),
    }


def _comparison(experiment, entries, shown):
    """Per w, from the same noise: the reference, and for each N the teacher's own N steps above the student's."""
    few = sorted({entry.num_steps for entry in entries if not entry.reference}, reverse=True)
    order = {n: position for position, n in enumerate(few)}
    drawn = [entry for entry in entries if entry.is_teacher or entry.stage.series]
    drawn.sort(key=lambda entry: (not entry.reference, order.get(entry.num_steps, -1), not entry.is_teacher))
    groups = [
        (f"w = {w:g}", [(entry.label, shown[entry, w]) for entry in drawn if (entry, w) in shown])
        for w in experiment.evaluate.w
    ]
    return pictures.comparison(groups, f"{experiment.data.name}: the same noise and label down each column")


def _steps(row):
    """8 for eight steps of one call, 8x2 for a guided teacher's, and the number of calls where it is neither."""
    steps, each = row["num_steps"], row["nfe"] / row["num_steps"]
    if not each.is_integer():
        return f"{steps} ({row['nfe']} calls)"
    return str(steps) if each == 1 else f"{steps}x{each:.0f}"


def _table(summary):
    """The rows of a summary for the terminal."""
    table = Table(title=f"frechet_classifier of real halves (noise floor): {summary['noise_floor']:.3g}")
    for name in ("model", "steps", "w", "frechet", "score", "label", "to ref.", "ms/image"):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for row in summary["rows"]:
        values = row["metrics"]
        distance = values.get("distance_to_reference")
        table.add_row(
            row["stage"] if row["model"] == "student" or row["sampler"] == "deterministic" else row["sampler"],
            _steps(row),
            f"{row['w']:g}",
            f"{values['frechet_classifier']:.2f}",
            f"{values['score_classifier']:.2f}",
            f"{100 * values['label_agreement']:.1f}%",
            "-" if distance is None else f"{distance:.4f}",
            f"{1000 * row['seconds_per_image']:.2f}",
        )
    return table
