"""What the page shows, without the page: pictures of a bundle's students by validated settings, and their times."""

import dataclasses
import math
import time

import numpy as np
from PIL import Image, ImageOps

from guided_distill import generate, pictures
from guided_distill.errors import UserError

NUM = 4  # pictures of one setting: a fixed batch, so that each network is compiled once
MAX_SEED = 2**31 - 1
MAX_SIDE = 4096  # of a picture that is brought along
_TEACHER_STEPS = 32  # at most: it is there to be compared with, not to be waited for
_SHOWN = 320  # pixels that pictures are enlarged to, by a whole factor


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a user has chosen, as it came: `Player` refuses what is no such thing."""

    student: str  # its name in the bundle
    w: float
    label: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Samples x f32 [NUM, *S] in [-1, 1], and what they took."""

    name: str
    x: np.ndarray
    num_steps: int
    calls: int  # network evaluations of one picture
    seconds: float  # of all together

    @property
    def picture(self):
        """All of x in one picture uint8 [H', W', 3]."""
        return enlarged(pictures.image_grid(self.x))

    @property
    def caption(self):
        """In words: the steps, the calls and the time."""
        steps, calls = (f"{n} {what}{'s' * (n != 1)}" for n, what in ((self.num_steps, "step"), (self.calls, "call")))
        return f"{self.name}: {steps}, {calls} of the network, {1000 * self.seconds:.0f} ms"


class Player:
    """Draws NUM pictures of a bundle's students at a time. Raises UserError where the bundle holds no such student."""

    def __init__(self, bundle):
        self._bundle = bundle
        self.title = f"Few-step students of {bundle.about.get('data', 'a diffusion model')}"
        self.students = {s.name: s for s in bundle.students if s.num_steps is not None and s.sampler != "encode"}
        if not self.students:
            raise UserError("the bundle holds no student of a number of steps: export one, as --stages=stage2_det_0004")
        self.teacher = next((s for s in bundle.students if s.series == "teacher"), None)
        lows, highs = zip(*(student.w_range for student in self.students.values()), strict=True)
        self.w_range = (min(lows), max(highs))
        self.num_classes = bundle.students[0].model.num_classes
        shape = bundle.students[0].model.sample_shape
        if bundle.students[0].model.data_range is None and len(shape) == 3:
            raise UserError("the bundle's samples are latents, and it holds nothing that makes pictures of them")
        are_pictures = len(shape) == 3 and shape[-1] in (1, 3)
        self.editors = {n: s for n, s in self.students.items() if are_pictures and s.sampler == "deterministic"}

    def warm_up(self):
        """Compiles what the page will run."""
        low, _ = self.w_range
        for student in {s.model.static(): s for s in self.students.values()}.values():
            self._sample(student, Settings(student.name, max(low, student.w_range[0]), 0, 0), student.num_steps)
        if self.teacher is not None:
            self.draw_by_teacher(Settings("", np.clip(1.0, *self.teacher.w_range), 0, 0))
        for student in {s.model.static(): s for s in self.editors.values()}.values():
            shape = student.model.sample_shape
            edit = generate.Edit(np.zeros(shape, np.float32), np.ones(shape, np.float32), 1)
            self._sample(student, Settings(student.name, student.w_range[0], 0, 0), student.num_steps, edit)

    def draw(self, settings):
        """A student's Drawn. Raises UserError that names the setting."""
        student = self._student(settings, self.students)
        return self._sample(student, settings, student.num_steps)

    def draw_by_teacher(self, settings):
        """The teacher's Drawn of the same noise; None where the bundle has none."""
        if self.teacher is None:
            return None
        intervals = self._bundle.grid.num_intervals
        return self._sample(self.teacher, settings, math.gcd(intervals, _TEACHER_STEPS))

    def edit(self, settings, picture, start, mask=None):
        """A student's Drawn from a picture (PIL), in `start` of its steps; where `mask` is painted alone, if given.

        Picture and mask are cut to the sides of the model's and shrunk. Raises UserError that names the setting.
        """
        student = self._student(settings, self.editors)
        shape = student.model.sample_shape
        start = _whole("start", start, 1, student.num_steps)
        x = fitted(picture, shape)
        painted = np.ones(shape, np.float32)
        if mask is not None:
            painted = (fitted(mask.convert("L"), (*shape[:2], 1)) > 0.0).astype(np.float32)
            if not painted.any():
                raise UserError("mask: nothing is painted, so there is nothing to make anew")
            painted = np.broadcast_to(painted, shape)
        return self._sample(student, settings, student.num_steps, generate.Edit(x, painted, start))

    def _student(self, settings, students):
        if settings.student not in students:
            raise UserError(f"student = {settings.student!r}: there are {', '.join(students)}")
        return students[settings.student]

    def _sample(self, student, settings, num_steps, edit=None):
        _whole("label", settings.label, 0, self.num_classes - 1)
        seed = _whole("seed", settings.seed, 0, MAX_SEED)
        began = time.perf_counter()
        x = student.sample(
            self._bundle.grid,
            self._bundle.mesh,
            num_steps=num_steps,
            w=_number("w", settings.w),
            labels=[settings.label],
            num=NUM,
            seed=seed,
            batch_size=NUM,
            edit=edit,
        )
        steps = num_steps if edit is None else edit.start
        calls = steps * student.model.calls_per_step
        return Drawn(student.name, x, steps, calls, time.perf_counter() - began)


def fitted(picture, shape):
    """A PIL picture as f32 [*shape] in [-1, 1], cut in the middle to the shape's sides. Raises UserError."""
    if picture is None:
        raise UserError("picture: there is none yet")
    height, width, channels = shape
    if not 1 <= max(picture.size) <= MAX_SIDE:
        raise UserError(f"picture: {picture.size[0]}x{picture.size[1]}, at most {MAX_SIDE}x{MAX_SIDE} is taken")
    # The mean over each pixel's box gives an enlarged picture back as it was.
    small = ImageOps.fit(picture.convert("L" if channels == 1 else "RGB"), (width, height), Image.Resampling.BOX)
    return np.asarray(small, np.float32).reshape(shape) / 127.5 - 1.0


def enlarged(picture):
    """A picture uint8 [H, W, C] whose pixels are repeated, so that it can be seen and painted in."""
    factor = max(1, _SHOWN // picture.shape[0])
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def _number(name, value):
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name} = {value!r}: must be a number")
    return float(value)


def _whole(name, value, low, high):
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or value != int(value):
        raise UserError(f"{name} = {value!r}: must be a whole number from {low} to {high}")
    return int(value)
