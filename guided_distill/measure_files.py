"""Samples of any program, from files or of a split of the data, measured as an evaluation measures its own; and the
statistics of real images that they are compared with."""

import dataclasses
import json
import sys

import numpy as np

from guided_distill import sharding
from guided_distill.data import load_dataset, read_range
from guided_distill.errors import UserError
from guided_distill.evaluation import pixels
from guided_distill.evaluation import reference as references
from guided_distill.evaluation.image_files import open_samples
from guided_distill.evaluation.samples import Samples
from guided_distill.evaluation.yardstick import features_of, make_yardsticks, measure_by, provenance_of
from guided_distill.experiment import from_config
from guided_distill.files import absolute, write_whole
from guided_distill.latent_space import open_space
from guided_distill.workdir import pictures_of

_BATCH = 512
_SPLIT = "data:"


def measure_files(config, workdir, samples):
    """Measures `samples` against the config's data by config.evaluate.features; prints the figures, returns the row.

    `samples` is a folder of pictures, an npz (see `image_files.open_samples`), or data:test, data:train, a split of the
    config's own data set. The row is written beside the samples. Raises UserError for samples of another
    shape than the data's.
    """
    experiment, mesh = from_config(config), sharding.make_mesh()
    data, dataset = _pictures(experiment)
    experiment = dataclasses.replace(experiment, data=data)
    found = _Split(dataset, samples.removeprefix(_SPLIT)) if samples.startswith(_SPLIT) else open_samples(samples)
    if tuple(found.shape) != tuple(experiment.data.sample_shape):
        raise UserError(
            f"--samples={samples}: {_times(found.shape)}, and the images of {experiment.data.name} are "
            f"{_times(experiment.data.sample_shape)}; save them in that shape, or name the config of their data set"
        )
    out = _beside(samples, absolute(workdir))
    yardsticks = make_yardsticks(experiment, dataset, absolute(workdir) / "evaluation", mesh, _say)
    row = _measure(found, yardsticks, experiment, mesh, samples)
    row |= {"samples": samples, "num_samples": len(found), "seed": experiment.evaluate.seed}
    row["noise_floors"] = {yardstick.network.name: yardstick.reference.noise_floor for yardstick in yardsticks}
    for name, value in row["metrics"].items():
        low_high = row["intervals"].get(name)
        print(f"{name:36s} {value:.6g}" + (f"  [{low_high[0]:.4g}, {low_high[1]:.4g}]" if low_high else ""))
    try:
        write_whole(out, json.dumps(row, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from error
    for line in [*row["notes"], f"{out}: these figures, and what they depend on"]:
        _say(line)
    return row


def make_references(config, workdir):
    """Makes the statistics of the config's training split by config.evaluate.features, and says where they lie."""
    experiment = from_config(config)
    if experiment.evaluate.reference is not None:
        raise UserError(
            "--mode=reference makes statistics; config.evaluate.reference names some that are there: drop it"
        )
    directory = absolute(workdir) / "evaluation"
    data, dataset = _pictures(experiment)
    experiment = dataclasses.replace(experiment, data=data)
    for yardstick in make_yardsticks(experiment, dataset, directory, sharding.make_mesh(), _say):
        path = directory / f"reference_{yardstick.network.name}.npz"
        made = references.load(path)
        _say(f"{path}: {made.source} by {made.network}, {made.resolution}, SHA-256 {made.hash[:12]}")


def _pictures(experiment):
    space = None if experiment.latent_model is None else open_space(experiment.latent_model)
    return pictures_of(experiment.data, load_dataset(experiment.data), space)


def _beside(samples, workdir):
    """Where the figures of samples go: beside them, those of a split into the workdir."""
    if not samples.startswith(_SPLIT):
        path = absolute(samples)
        return path.parent / f"{path.name}.metrics.json"
    workdir.mkdir(parents=True, exist_ok=True)
    return workdir / f"{samples.removeprefix(_SPLIT)}.metrics.json"


class _Split:
    """A split of the data set as `open_samples` gives what lies in files."""

    def __init__(self, dataset, name):
        splits = {"train": dataset.train, "test": dataset.test}
        if name not in splits:
            raise UserError(f"--samples={_SPLIT}{name}: there are {_SPLIT}train and {_SPLIT}test")
        self._source, self.shape = splits[name], dataset.sample_shape

    def __len__(self):
        return len(self._source)

    def batches(self, size):
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            records = read_range(self._source, start, stop)
            yield np.arange(start, stop), records["x"], records["label"]


def _measure(found, yardsticks, experiment, mesh, what):
    bound, parts = experiment.data.data_range, [[] for _ in yardsticks]
    for index, x, label in found.batches(_BATCH):
        figures = {} if bound is None else {"saturation": pixels.saturation(x, bound)}
        for yardstick, batches in zip(yardsticks, parts, strict=True):
            batches.append(Samples(index, *features_of(yardstick.network, x, mesh), label, figures))
        _say(f"{index[-1] + 1} of {len(found)} images")
    return measure_by(yardsticks, parts, experiment.evaluate.seed, what) | provenance_of(yardsticks)


def _times(shape):
    return "x".join(map(str, shape))


def _say(text):
    print(text, file=sys.stderr, flush=True)
