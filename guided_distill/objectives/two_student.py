"""The naive baseline of arXiv 2210.03142: no stage one; a student without a w input, guided as its teacher is."""

from guided_distill import guidance
from guided_distill.objectives.clipping import within_range
from guided_distill.objectives.stage2 import make_stage2


def make_two_student(*, weighting, null_cond, bound=None):
    """omega(logsnr_t) || (1 + w) x_student(z_t, c) - w x_student(z_t, null) - x_tilde ||^2, all else as in stage two.

    One network, not given w, makes both outputs, at two evaluations a step. Only their combination is taught, which
    does not determine the pair. `null_cond` maps a cond to the one that stands for no condition; with a `bound` their
    combination is kept in [-bound, bound].
    """
    stage2 = within_range(make_stage2(weighting=weighting), bound)

    def objective(apply, schedule, batch, knobs, keys):
        pair = guidance.classifier_free(apply["student"], null_cond)
        return stage2({**apply, "student": pair}, schedule, batch, knobs, keys)

    return objective
