"""The samples of a row of an evaluation, batch by batch; of a costly row each batch outlasts a stop in the next."""

import hashlib
import io
import itertools
import json
import time
import zipfile
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from guided_distill import distributed
from guided_distill.files import write_npz
from guided_distill.generate import sample_images

_KEPT_CALLS = 16  # network calls an image from which on batches are kept: cheaper ones are soon drawn again


class Batch(NamedTuple):
    """Images of a row: index int[n], label i32[n], x f32[n,*S] as it is shown, seconds an image, whether just drawn."""

    index: Any
    label: Any
    x: Any
    seconds: float
    anew: bool


def drawn(run, entry, params, w, *, num, num_steps, keep=None):
    """Yields `Batch`es of the images 0 .. num - 1 of the seed.

    A costly row goes, batch by batch, into a directory `keep` of its own (`row_directories`), from which those that an
    earlier evaluation left are read. Of a latent its decoding is not part of the time: it is the same for all models.
    """
    size = run.experiment.evaluate.batch_size
    files = {}
    if keep is not None and entry.calls >= _KEPT_CALLS:
        files = {first: keep / f"{first:08d}.npz" for first in range(0, num, size)}
    there = distributed.agreed(lambda: _whole(files)) if files else 0
    for file in list(files.values())[:there]:
        index, label, x, seconds = _parsed(file.read_bytes())
        yield Batch(index, label, run.shown(x), seconds, False)
    for index, label, x, seconds in _sampled(run, entry, params, w, first=there * size, num=num, num_steps=num_steps):
        if files and run.is_main:
            keep.mkdir(parents=True, exist_ok=True)
            write_npz(files[int(index[0])], index=index, label=label, x=x, seconds=seconds)
        yield Batch(index, label, run.shown(x), seconds, True)


def row_directories(run):
    """(entry, w, num) -> where the batches of a row are kept, which has its name from all that its samples are made of.

    Raises UserError as `run.conditions` does.
    """
    config = run.experiment.evaluate
    made_of = {"seed": config.seed, "batch_size": config.batch_size, "conditions": _digest_of(run.conditions)}

    def directory(entry, w, num):
        said = json.dumps([made_of, num, str(run.given(entry.stage)), _checksums(run, entry.stage)], sort_keys=True)
        return kept(run.workdir) / f"{entry.file(w)}_{hashlib.sha256(said.encode()).hexdigest()[:12]}"

    return directory


def kept(workdir):
    """Where the directories of all rows are."""
    return epath.Path(workdir) / "evaluation" / "batches"


def forget(directory):
    """Removes what `drawn` left of a row, or of all in `kept`."""
    epath.Path(directory).rmtree(missing_ok=True)


def _checksums(run, stage):
    """What is noted of the files of its weights; of those that are not checkpoints of ours nothing is."""
    if run.outside is not None and stage.name == "teacher":
        return []
    return [path.read_text() for path in sorted((run.checkpoint_of(stage) / "checksums").glob("*.json"))]


def _digest_of(conditions):
    digest = hashlib.sha256()
    for name, table in sorted((conditions or {}).items()):
        digest.update(f"{name} {table.dtype} {table.shape}".encode())
        digest.update(np.ascontiguousarray(table))
    return digest.hexdigest()


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


def _whole(files):
    """How many of the first files {first image: file} are there and whole; a damaged one is drawn again."""
    return sum(1 for _ in itertools.takewhile(lambda one: _is_whole(*one), files.items()))


def _is_whole(first, file):
    if not file.exists():
        return False
    content = file.read_bytes()
    try:
        # NumPy reads no further than a header says, and so a wrong header past the checksum.
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            sound = archive.testzip() is None
        return sound and _parsed(content)[0][0] == first
    except Exception:  # Of a wrong byte zipfile, each of its decompressors and NumPy's parser raise their own.
        return False


def _parsed(content):
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return arrays["index"], arrays["label"], arrays["x"], float(arrays["seconds"])
