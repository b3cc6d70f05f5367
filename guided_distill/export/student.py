"""A student as it leaves the house: its network with its weights, and what a user may ask of it."""

import dataclasses
from typing import Any

import numpy as np

from guided_distill import generate, guidance
from guided_distill.errors import UserError


@dataclasses.dataclass(frozen=True)
class Student:
    """A trained network and its sampler; the stage-one student and the teacher stand for themselves in the same way."""

    name: str  # in file names: det_0004, stage1, teacher
    series: str
    num_steps: int | None  # None: any number that divides the intervals of the grid
    sampler: str  # a key of samplers.SAMPLERS
    w_range: tuple[float, float]
    model: guidance.Teacher  # with its weights
    network: dict | None  # name and configuration of the backbone; None for a function of the user's own
    figures: Any = ()  # its rows of summary.json

    def steps(self, num_steps, grid):
        """`num_steps` where this takes it, its own where None. Raises UserError."""
        if num_steps is None:
            num_steps = self.num_steps or grid.num_intervals
        if self.num_steps is None and not (num_steps > 0 and grid.num_intervals % num_steps == 0):
            raise UserError(f"num_steps = {num_steps}: {self.name} takes divisors of {grid.num_intervals}")
        if num_steps != (self.num_steps or num_steps):
            raise UserError(f"num_steps = {num_steps}: {self.name} takes {self.num_steps}")
        return num_steps

    def check(self, w, labels, conditions=None):
        """Raises UserError for a w outside the trained range, and for labels that are no classes."""
        low, high = self.w_range
        if not low <= w <= high:
            raise UserError(f"w = {w:g} is outside the trained range [{low:g}, {high:g}] of {self.name}")
        for label in () if labels is None else np.ravel(labels):
            if label != int(label) or not 0 <= label < self.model.num_labels(conditions):
                last = self.model.num_labels(conditions) - 1
                raise UserError(f"labels: {label} is outside the classes 0 ... {last}")

    def sample(self, grid, mesh, *, num_steps, w, labels, num, seed, batch_size, conditions=None, edit=None):
        """Images x f32 [num, *S] of the seed: `generate.sample_images` of this student, as one host array.

        `labels` are repeated over the images; None draws them from the seed. `conditions` and `edit` as there. Batches
        are rounded up to a multiple of the devices.
        """
        self.check(w, labels, conditions)
        batch_size = -(-min(batch_size, num) // mesh.size) * mesh.size
        batches = generate.sample_images(
            self.model,
            self.model.params,
            grid,
            mesh,
            seed=seed,
            num=num,
            w=w,
            num_steps=self.steps(num_steps, grid),
            batch_size=batch_size,
            labels=None if labels is None else np.resize(np.asarray(labels, np.int32), num),
            conditions=conditions,
            sampler=self.sampler,
            edit=edit,
        )
        return np.concatenate([x for _, _, x in batches])
