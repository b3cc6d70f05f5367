"""Consistency distillation of a guided teacher for every w (LCM, arXiv 2310.04378; arXiv 2303.01469, algorithm 2)."""

import dataclasses

from guided_distill.objectives.tract import make_tract


def make_consistency(*, weighting, num_times):
    """omega(logsnr_t) || x_student(z_t, c, w) - x_tilde ||^2 at t = j/T, j ~ U{1 .. T}, T = `num_times`.

    x_tilde [B, *S] is what the moving average of the student, apply["target_ema"], makes of the point at t - 1/T that
    one DDIM step of the guided teacher leads to; from t = 1/T, where that step lands on t = 0, it is the teacher's own
    x_hat. So the student learns to jump from every t to 0, and one network serves every number of steps
    (`samplers.renoising`). w ~ U[w_min, w_max] per example, as in LCM.

    This is `tract` with all T steps in one group: where a jump ends on 0, its target (6) is the average's prediction
    alone. T divides the grid; knobs.num_steps has no say. Consistency models have skip scalings, which make them the
    identity at t = 0; here x_hat = alpha z - sigma v of a network that predicts v does that. The distance is the
    weighted mean square of all objectives, where LCM has Huber's and the first paper LPIPS.
    """
    tract = make_tract(weighting=weighting, group=num_times)

    def objective(apply, schedule, batch, knobs, keys):
        return tract(apply, schedule, batch, dataclasses.replace(knobs, num_steps=1), keys)

    return objective
