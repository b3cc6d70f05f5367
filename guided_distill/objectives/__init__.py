"""What is learnt, one file each.

An Objective is made by a factory with its static options and called as

    objective(apply, schedule, batch, knobs, keys [B]) -> (loss [B], {name: [B]})

`apply` holds denoisers ("student", where there is one the frozen "teacher", and for tract and consistency "target_ema",
the student with the moving average of its weights), `batch` is {"x": [B, *S], and the fields of cond}, `knobs` what may
change between rounds without recompiling. `within_range` clips what an objective learns as samplers do.
"""

import dataclasses
import math

import jax

from guided_distill import diffusion
from guided_distill.objectives.clipping import within_range as within_range
from guided_distill.objectives.consistency import make_consistency
from guided_distill.objectives.denoise import make_denoise
from guided_distill.objectives.encode import make_encode
from guided_distill.objectives.stage1 import make_stage1
from guided_distill.objectives.stage2 import make_stage2
from guided_distill.objectives.tract import make_tract
from guided_distill.objectives.two_student import make_two_student

OBJECTIVES = {
    "denoise": make_denoise,
    "stage1": make_stage1,
    "stage2": make_stage2,
    "encode": make_encode,
    "two_student": make_two_student,
    "tract": make_tract,
    "consistency": make_consistency,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Knobs:
    """Traced numbers of a stage: rounds of any N, length and learning rate share one compiled step."""

    num_steps: jax.Array  # N of the student that is being trained
    updates: jax.Array  # the horizon of the learning rate
    peak_lr: jax.Array
    w_min: jax.Array
    w_max: jax.Array
    grid: diffusion.Grid  # as many intervals as the first teacher takes steps
    w_margin: jax.Array | float = 0.0  # see draws.strengths
    loss_limit: jax.Array | float = math.inf  # an update whose loss is above is skipped
