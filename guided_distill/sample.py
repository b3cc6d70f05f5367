"""Images of a trained student: a picture, or arrays."""

import io
import os
import sys

import numpy as np
from etils import epath

from guided_distill import generate, pictures, pipeline
from guided_distill.errors import UserError
from guided_distill.files import write_whole
from guided_distill.text import hashed_words


def sample(config, workdir, *, num_steps, series, w, labels, num, seed, out, captions=None):
    """Writes `num` images of the student trained for `num_steps` to `out` (.png: a grid; .npz: x, label, index).

    `series` names whose student, the first one trained where None. `labels`: classes, or of a model of captions the
    numbers of `captions`, repeated over the images; None draws them from the seed, and takes given captions in turn.
    Captions are those held out where None. Raises UserError for a number of steps without a finished student, w outside
    the trained range, labels outside the classes, captions for a model of classes and an `out` of another kind.
    """
    this = pipeline.open_run(config, workdir, create=False)
    stage = _student(this, num_steps, series)
    tokens = _tokens(this, captions)
    if captions is not None and labels is None:
        labels = range(len(captions))
    num_labels = this.experiment.data.num_classes if tokens is None else len(tokens)
    _check(stage.w_range, num_labels, w, labels, num, out)
    batch_size = min(this.experiment.evaluate.batch_size, -(-num // this.mesh.size) * this.mesh.size)
    batches = generate.sample_images(
        stage.model,
        this.params_of(stage),
        this.grid,
        this.mesh,
        seed=seed,
        num=num,
        w=w,
        num_steps=num_steps,
        batch_size=batch_size,
        labels=None if labels is None else np.resize(np.asarray(labels, np.int32), num),
        captions=tokens,
        sampler=stage.sampler,
    )
    index, label, x = (np.concatenate(values) for values in zip(*batches, strict=True))
    if not this.is_main:
        return
    try:
        if out.endswith(".png"):
            pictures.save_png(out, pictures.image_grid(x))
        else:
            buffer = io.BytesIO()
            np.savez(buffer, x=x, label=label, index=index)
            write_whole(out, buffer.getvalue())
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror or error}") from error
    print(
        f"{num} samples, {num_steps * stage.model.calls_per_step} network evaluations each, w = {w:g}: {out}",
        file=sys.stderr,
    )


def _tokens(this, captions):
    data = this.experiment.data
    if captions is None:
        return this.captions
    if not data.text_length:
        raise UserError("--caption is for a model of captions; this one is of classes, see --labels")
    return hashed_words(captions, length=data.text_length, vocabulary=data.vocabulary)


def _student(this, num_steps, series):
    # A student of one w is asked for by --series, as the name of its stage says: det_w1.
    trained = {
        (stage.name.removeprefix("stage2_").rpartition("_")[0], stage.num_steps): stage
        for stage in this.stages
        if stage.series and stage.sampler != "encode" and this.finished(stage)
    }
    series = series or next((name for name, _ in trained), this.experiment.stage2.series[0])
    if (series, num_steps) not in trained:
        found = ", ".join(f"{n} ({name})" for name, n in sorted(trained)) or "none yet"
        raise UserError(
            f"--num_steps={num_steps}: no student was trained for it in series {series}; finished in {this.workdir}: "
            f"{found}"
        )
    return trained[series, num_steps]


def _check(w_range, num_labels, w, labels, num, out):
    low, high = w_range
    if not low <= w <= high:
        raise UserError(f"--w={w:g} is outside the trained range [{low:g}, {high:g}]")
    for label in labels or ():
        if not 0 <= label < num_labels:
            raise UserError(f"--labels: {label} is outside the classes 0 ... {num_labels - 1}")
    if num < 1:
        raise UserError(f"--num={num}: at least one image is needed")
    if os.path.splitext(out)[1] not in (".png", ".npz"):
        raise UserError(f"--out={out}: must end in .png (a grid) or .npz (arrays)")
    if not epath.Path(out).parent.exists():
        raise UserError(f"--out={out}: there is no directory {epath.Path(out).parent}")
