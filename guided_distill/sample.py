"""Images of a trained student: a picture, or arrays."""

import dataclasses
import os
import sys

import numpy as np
from etils import epath

from guided_distill import generate, pictures, pipeline
from guided_distill.errors import UserError
from guided_distill.evaluation.image_files import read_picture
from guided_distill.files import in_bucket, write_npz
from guided_distill.masks import shrink
from guided_distill.records import times
from guided_distill.text import words_of


@dataclasses.dataclass(frozen=True)
class From:
    """What to go out from in place of noise alone, and where to: flags of the same names."""

    image: str | None = None  # a picture to make others of
    start: int | None = None  # evaluations from it, 1 ... num_steps: the fewer, the more is kept; all by default
    mask: str | None = None  # a picture of its size: white, and greys from 128 on, is made anew, the rest is kept
    to_seed: int | None = None  # one noise to another: image 0 of both seeds, and num - 2 between them
    to_w: float | None = None  # one strength to another, evenly


_NOISE = From()
_BRIGHTNESS = (0.299, 0.587, 0.114)  # of red, green and blue, as Pillow and with it diffusers make a mask grey


def sample(config, workdir, *, num_steps, series, w, labels, num, seed, out, captions=None, begin=_NOISE):
    """Writes `num` images of the student trained for `num_steps` to `out` (.png: a grid; .npz: x, label, index).

    `series` names whose student, the first one trained where None. `labels`: classes, or of a model of captions the
    numbers of `captions`, repeated over the images; None draws them from the seed, and takes given captions in turn.
    Captions are those held out where None. Raises UserError for a number of steps without a finished student, w outside
    the trained range, labels outside the classes, captions for a model of classes, an `out` of another kind, and for a
    picture or mask that is not of the model's size.
    """
    this = pipeline.open_run(config, workdir, create=False)
    stage = _student(this, num_steps, series)
    _check_captions(this, captions)
    if begin != _NOISE and stage.sampler != "deterministic":
        raise UserError(f"student {stage.name} draws noise at every step, and goes out from nothing else: --series=det")
    shown, edit, painted = _edit(this, stage, begin)
    if captions is not None and _paints_in(stage) and painted is None:
        raise UserError("this network paints in: give it --image and --mask besides --caption")
    conditions = _conditions(this, captions, painted)
    if captions is not None and labels is None:
        labels = range(len(captions))
    _check(stage.w_range, stage.model.num_labels(conditions), w, labels, num, out)
    strengths, noise = _way(stage, begin, w, seed, num)
    if labels is None and noise is not None:
        labels = [0]  # one thing changes at a time
    batch_size = min(this.experiment.evaluate.batch_size, -(-num // this.mesh.size) * this.mesh.size)
    batches = generate.sample_images(
        stage.model,
        this.params_of(stage),
        this.grid,
        this.mesh,
        seed=seed,
        num=num,
        w=strengths,
        num_steps=num_steps,
        noise=noise,
        edit=edit,
        batch_size=batch_size,
        labels=None if labels is None else np.resize(np.asarray(labels, np.int32), num),
        conditions=conditions,
        sampler=stage.sampler,
    )
    index, label, x = (np.concatenate(values) for values in zip(*batches, strict=True))
    x = this.shown(x)
    if not this.is_main:
        return
    try:
        if out.endswith(".png"):
            pictures.save_png(out, pictures.image_grid(np.concatenate([*shown, x])))
        else:
            write_npz(out, x=x, label=label, index=index)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror or error}") from error
    calls = (num_steps if edit is None else edit.start) * stage.model.calls_per_step
    to = "" if begin.to_w is None else f" ... {begin.to_w:g}"
    print(
        f"{num} samples, {calls} network evaluations each, w = {w:g}{to}: {out}",
        file=sys.stderr,
    )


def _way(stage, begin, w, seed, num):
    """(the strengths of the images, what makes their noise or None) on the way that the flags name."""
    strengths, to_seed = w, begin.to_seed
    if begin.to_w is not None:
        _check_w(stage.w_range, "--to_w", begin.to_w)
        strengths = np.linspace(w, begin.to_w, num, dtype=np.float32)
        to_seed = seed if to_seed is None else to_seed
    return strengths, None if to_seed is None else generate.noise_between(stage.model, seed, to_seed, num)


def _edit(this, stage, begin):
    """Of the picture and mask that the flags name: what to show of them, a generate.Edit, and the cond of a hole.

    The Edit is None where there is no picture, and where the network paints in by itself, which is told the hole.
    """
    if begin.image is None:
        if begin.mask is not None or begin.start is not None:
            raise UserError("--mask and --start say what to make of a picture: name it by --image")
        return [], None, None
    if begin.to_seed is not None or begin.to_w is not None:
        raise UserError("--image goes with --start and --mask, and not with --to_seed or --to_w: leave one of them out")
    start = stage.num_steps if begin.start is None else begin.start
    if not 1 <= start <= stage.num_steps:
        raise UserError(f"--start={start}: the student takes {stage.num_steps} steps, so 1 ... {stage.num_steps}")
    picture, hole = _picture_and_hole(begin, this.picture_shape)
    around = picture * (1.0 - hole)
    shown = [picture[None]] + [around[None]] * bool(hole.min() < 1.0)
    x, mask, space = picture, hole, this.space
    if space is not None:
        x, around = space.encode(np.stack([picture, around]))
        mask = shrink(hole, x.shape[0])
    if _paints_in(stage) and (begin.mask is None or begin.start is not None):
        raise UserError("this network paints in: give it --image and --mask, and no --start")
    if _paints_in(stage):
        return shown, None, {"mask": mask[None], "masked": around[None]}
    return shown, generate.Edit(x, np.broadcast_to(mask, x.shape), start), None


def _paints_in(stage):
    """Whether the network itself takes a hole and what is around it."""
    return any(name == "masked" for name, *_ in stage.model.cond_fields)


def _picture_and_hole(begin, shape):
    """--image f32 [H, W, C], and what of it is to be made anew: 1 there, f32 [H, W, 1]."""
    x, hole = read_picture(begin.image, "--image"), np.ones((*shape[:-1], 1), np.float32)
    if x.shape != tuple(shape):
        raise UserError(
            f"--image={begin.image} is {times(x.shape)}, the model's pictures are {times(shape)}: "
            "resize it, or save it in as many channels"
        )
    if begin.mask is None:
        return x, hole
    mask = read_picture(begin.mask, "--mask")
    if mask.shape[:-1] != shape[:-1]:
        raise UserError(f"--mask={begin.mask} is {times(mask.shape[:-1])}, the picture {times(shape[:-1])}")
    # In [-1, 1] a grey of 127 is below 0 and one of 128 above.
    grey = mask if mask.shape[-1] == 1 else mask @ np.array(_BRIGHTNESS, np.float32)[:, None]
    if not (grey > 0.0).any():
        raise UserError(f"--mask={begin.mask} holds nothing white: there is nothing to make anew")
    return x, (grey > 0.0).astype(np.float32)


def _check_captions(this, captions):
    """Raises UserError for captions that a model does not take, or that are too long for its text encoder."""
    data = this.experiment.data
    if captions is None:
        return
    if not data.text_length:
        raise UserError("--caption is for a model of captions; this one is of classes, see --labels")
    if this.space is not None:
        return  # its tokenizer says so
    for caption in captions:
        if len(words_of(caption)) >= data.text_length:
            raise UserError(
                f"--caption={caption[:40]!r} has {len(words_of(caption))} words; the model takes "
                f"{data.text_length - 1}: shorten it"
            )


def _conditions(this, captions, painted):
    """What images are made with besides labels, of given captions or of those held out; all have the same hole."""
    found = this.conditions if captions is None else this.conditions_of(captions, truncate=False)
    if painted is None:
        return found
    num = len(next(iter(found.values())))
    return found | {name: np.broadcast_to(value, (num, *value.shape[1:])) for name, value in painted.items()}


def _student(this, num_steps, series):
    trained = {
        (stage.asked_for, n): stage
        for stage in this.stages
        if stage.series and stage.sampler != "encode" and this.finished(stage)
        for n in stage.steps(this.grid.num_intervals)
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
    _check_w(w_range, "--w", w)
    for label in labels or ():
        if not 0 <= label < num_labels:
            raise UserError(f"--labels: {label} is outside the classes 0 ... {num_labels - 1}")
    if num < 1:
        raise UserError(f"--num={num}: at least one image is needed")
    if os.path.splitext(out)[1] not in (".png", ".npz"):
        raise UserError(f"--out={out}: must end in .png (a grid) or .npz (arrays)")
    if not in_bucket(out) and not epath.Path(out).parent.exists():
        raise UserError(f"--out={out}: there is no directory {epath.Path(out).parent}")


def _check_w(w_range, flag, w):
    low, high = w_range
    if not low <= w <= high:
        raise UserError(f"{flag}={w:g} is outside the trained range [{low:g}, {high:g}]")
