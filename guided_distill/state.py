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
    skipped: jax.Array  # non-finite updates in a row

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


def student_params(teacher_params, fresh_params, fresh_module_names=("w1", "w2")):
    """The teacher's weights by path, fresh ones only for the branch that takes w (arXiv 2210.03142, section 3.1).

    Raises UserError when the trees differ in anything else.
    """
    teacher = flax.traverse_util.flatten_dict(teacher_params)
    student = flax.traverse_util.flatten_dict(fresh_params)
    left_over = teacher.keys() - student.keys()
    missing = {path for path in student.keys() - teacher.keys() if not set(path) & set(fresh_module_names)}
    unlike = {path for path in student.keys() & teacher.keys() if student[path].shape != teacher[path].shape}
    for what, paths in (("lacks", missing), ("has unknown", left_over), ("has another shape of", unlike)):
        if paths:
            raise UserError(f"the teacher's checkpoint {what} {'/'.join(min(paths))}: it is of another model")
    return flax.traverse_util.unflatten_dict(
        {path: jnp.copy(teacher.get(path, value)) for path, value in student.items()}
    )
