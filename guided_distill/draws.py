"""The samples of one row of an evaluation, batch by batch; of a costly row each batch outlasts a stop in the next."""

import io
import time
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from guided_distill import distributed
from guided_distill.files import write_whole
from guided_distill.generate import sample_images

_KEPT_CALLS = 64  # network calls an image from which on batches are kept: cheaper ones are soon drawn again


class Batch(NamedTuple):
    """Images of a row: index i64[n], label i32[n], x f32[n,*S] as it is shown, seconds an image, whether just drawn."""

    index: Any
    label: Any
    x: Any
    seconds: float
    anew: bool


def drawn(run, entry, params, w, *, num, num_steps, keep=None):
    """Yields `Batch`es of the images 0 .. num - 1 of the seed.

    Where a costly row goes, batch by batch, to a directory `keep`, those that an evaluation of the same settings and
    weights left there are read. Of a latent its decoding is not part of the time: it is the same for all models.
    """
    size = run.experiment.evaluate.batch_size
    files = []
    if keep is not None and entry.calls >= _KEPT_CALLS:
        files = [keep / f"{entry.file(w)}.{first:08d}.npz" for first in range(0, num, size)]
    there = distributed.agreed(lambda: [file.exists() for file in files])
    done = [*there, False].index(False)
    for file in files[:done]:
        yield _read(run, file)
    batches = _sampled(run, entry, params, w, first=done * size, num=num, num_steps=num_steps)
    for place, (index, label, x, seconds) in enumerate(batches, done):
        if files and run.is_main:
            keep.mkdir(parents=True, exist_ok=True)
            _write(files[place], index=index, label=label, x=x, seconds=seconds)
        yield Batch(index, label, run.shown(x), seconds, True)


def forget(keep, entry=None, w=None):
    """Removes what `drawn` left in a directory: of one row, or all of it."""
    if entry is None:
        if keep.exists():
            epath.Path(keep).rmtree()
        return
    for path in list(keep.glob(f"{entry.file(w)}.*.npz")):
        path.unlink()


def _sampled(run, entry, params, w, *, first, num, num_steps):
    config, model = run.experiment.evaluate, entry.stage.model
    batches = sample_images(
        model,
        params,
        run.grid,
        run.mesh,
        seed=config.seed,
        first=first,
        num=num,
        w=w,
        num_steps=num_steps,
        batch_size=config.batch_size,
        labels=None if run.conditions is None else np.arange(num) % model.num_labels(run.conditions),
        conditions=run.conditions,
        sampler=entry.sampler,
    )
    start = time.perf_counter()
    for index, label, x in batches:
        yield index, label, x, (time.perf_counter() - start) / config.batch_size
        start = time.perf_counter()


def _read(run, file):
    # np.load, given a path, looks on this machine alone.
    with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as kept:
        return Batch(kept["index"], kept["label"], run.shown(kept["x"]), float(kept["seconds"]), False)


def _write(file, **arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_whole(file, buffer.getvalue())
