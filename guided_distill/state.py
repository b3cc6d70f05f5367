"""What training carries from one update to the next, and how a student's begins as its teacher's weights."""

from typing import Any

import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp

from guided_distill.errors import UserError
from guided_distill.optim import make_optimiser


@flax.struct.dataclass
class TrainState:
    """Float32 parameters, their moving average (None when off), the optimiser's moments, and two counters."""

    step: jax.Array  # updates done
    params: Any
    ema: Any
    opt_state: Any
    skipped: jax.Array  # updates in a row that changed nothing

    @property
    def eval_params(self):
        """What samples and what teaches the next stage: the moving average where there is one."""
        return self.params if self.ema is None else self.ema


def make_state(params, optimiser):
    """A TrainState at step 0."""
    # Separate buffers for everything: the step donates its state, and no buffer can be donated twice.
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    ema = jax.tree.map(jnp.copy, params) if optimiser.ema else None
    return TrainState(step, params, ema, make_optimiser(optimiser).init(params), skipped)


def check_same_model(params, like, what):
    """Raises UserError, naming the first parameter, unless two trees have the same paths and shapes."""
    ours, theirs = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (like, params))
    for problem, paths in (
        ("lacks", ours.keys() - theirs.keys()),
        ("has unknown", theirs.keys() - ours.keys()),
        (
            "has another shape of",
            {path for path in ours.keys() & theirs.keys() if ours[path].shape != theirs[path].shape},
        ),
    ):
        if paths:
            raise UserError(f"{what} {problem} {min(paths)}: it is a checkpoint of another model")


def as_teacher(params, dtype):
    """Weights as they are kept while they are learned from: those in float32 as `dtype`, all others as they are."""
    return jax.tree.map(lambda p: p.astype(dtype) if p.dtype == jnp.float32 else p, params)


def student_params(teacher_params, fresh_params):
    """The teacher's weights by path, and fresh ones for what it lacks: the branch that takes w, or an output in v.

    (arXiv 2210.03142, section 3.1.) Copies: the step donates its state, and the teacher is still needed.
    """
    teacher, student = (flax.traverse_util.flatten_dict(tree) for tree in (teacher_params, fresh_params))
    theirs = {path: value for path, value in teacher.items() if path in student and value.shape == student[path].shape}
    return flax.traverse_util.unflatten_dict({path: jnp.copy(value) for path, value in (student | theirs).items()})
