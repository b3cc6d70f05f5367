"""What each round lost, and where: the gap between student and teacher by t and by w, clipping, colour, smoothness.

All of it on the same few training examples and the same noise, so that stages and runs can be compared.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from guided_distill import compilation, diffusion, samplers, sharding
from guided_distill.data import read_records
from guided_distill.generate import cond_of
from guided_distill.objectives import draws, stage2
from guided_distill.stages import bound

_EXAMPLES = 64
_TIMES = 8  # of those a student is evaluated at, as many are looked at
_STRENGTHS = 9  # over the range of w, for the smoothness
_MOST_LEFT = 0.5  # of the gap that a round opened with; a round that leaves more is worth a warning
_CLOSED = 1e-8  # a gap that is rounding, as the last stochastic round opens with: its one call is its teacher's first


def looked_at(stages):
    """The stages that are diagnosed: those whose student follows its teacher's own deterministic steps."""
    return [stage for stage in stages if stage.teacher is not None and stage.series in ("", "det", "sto", "tract")]


def work(experiment, stages):
    """What `diagnose` costs, in forward passes of one image."""
    calls = (
        len(_times(stage)) * len(_strengths(experiment, stage)) * (1 + stage.teacher_calls) * (1 + bool(stage.series))
        for stage in looked_at(stages)
    )
    return _EXAMPLES * sum(calls)


def is_of(told, experiment, stage):
    """Whether `told` is what `diagnose` says of these strengths; None is not."""
    return told is not None and [w for w, _ in told["gap_by_w"]] == _strengths(experiment, stage)


def diagnose(run, stage):
    """{"gap_by_t": [[t, gap]], "gap_by_w", "clipped", "colour_drift": [[w, value]], ...} of a trained stage.

    A gap is the mean square of x_student - x_tilde per value, x_tilde being where the teacher's steps lead, and with
    config.clip_targets x_student what a sampler keeps of it. `clipped` is the share of values outside the data's range
    before that, `colour_drift` the root mean square over channels of the mean difference to the teacher,
    `smoothness_over_w` the root mean square of second differences over that of first ones at t = 1, `left` the share of
    the gap that the round opened with, if it did with one; too much of it makes a `warning`.
    """
    parent = run.stage(stage.parent)
    params, teacher_params = run.params_of(stage), run.params_of(parent)
    look = _look_at(run, stage, parent, teacher_params)
    times, strengths = _times(stage), _strengths(run.experiment, stage)
    found = {(i, w): look(params, i, w) for i in times for w in strengths}

    def over(name, axis, key):
        return float(np.mean([values[name] for at, values in found.items() if at[axis] == key]))

    told = {
        "gap_by_t": [[i / stage.num_steps, over("gap", 0, i)] for i in times],
        "gap_by_w": [[w, over("gap", 1, w)] for w in strengths],
        "colour_drift": [[w, float(np.sqrt(np.mean(_mean_drift(found, w) ** 2)))] for w in strengths],
        "smoothness_over_w": _smoothness(run, stage, params),
    }
    if stage.model.data_range is not None:
        told["clipped"] = [[w, over("clipped", 1, w)] for w in strengths]
    if stage.series and not stage.from_scratch:
        before = np.mean([look(teacher_params, i, w)["gap"] for i in times for w in strengths])
        if before > _CLOSED:
            told["left"] = float(np.mean([values["gap"] for values in found.values()]) / before)
        if told.get("left", 0.0) > _MOST_LEFT:
            told["warning"] = (
                f"{stage.name}: {told['left']:.0%} of the gap to its teacher is left; "
                f"train the round longer, or at another learning rate"
            )
    return told


def _mean_drift(found, w):
    return np.mean([values["drift"] for at, values in found.items() if at[1] == w], axis=0)


def _times(stage):
    """Up to `_TIMES` of i = 1 .. N, both ends among them."""
    return sorted({round(i) for i in np.linspace(1, stage.num_steps, _TIMES)})


def _strengths(experiment, stage):
    low, high = stage.w_range
    return [w for w in experiment.evaluate.w if low <= w <= high] or [low]


def _look_at(run, stage, parent, teacher_params):
    """(params, i, w) -> the values of one t = i/N and one w."""
    substeps = parent.num_steps // stage.num_steps if stage.series else 1
    series = "sto" if stage.series == "sto" else "det"
    within = bound(run.experiment, stage.model)
    look = _make_look(stage.model, stage.teacher, series, substeps, within, run.mesh)
    train = run.dataset.train
    batch = read_records(train, np.linspace(0, len(train) - 1, _examples(run)).astype(int))
    batch = sharding.spread(run.mesh, batch)
    return lambda params, i, w: jax.device_get(
        look(params, teacher_params, batch, run.grid, jnp.int32(stage.num_steps), jnp.int32(i), jnp.float32(w))
    )


def _examples(run):
    return -(-_EXAMPLES // run.mesh.size) * run.mesh.size


@functools.cache
def _make_look(student, teacher, series, substeps, within, mesh):
    """(params, teacher's params, batch, grid, N, i, w) -> {"gap", "clipped", "drift" [C]}, jitted."""

    def look(params, teacher_params, batch, grid, num_steps, i, w):
        x = batch["x"]
        size = x.shape[0]
        eps = samplers.initial_noise(samplers.image_keys(0, jnp.arange(size)), x.shape[1:])
        index = stage2.path(series, substeps, num_steps, jnp.full(size, i), grid)
        points = grid.at(index)
        at_t = points.at(0)
        cond = {**draws.split_batch(batch)[1], "w": jnp.full(size, w)}
        z = diffusion.diffuse(x, eps, at_t.alpha, at_t.sigma)
        with sharding.visible(mesh):
            x_tilde = stage2.target(teacher.denoiser(sharding.gathered(mesh, teacher_params)), z, cond, index, points)
            x_hat = student.denoiser(sharding.gathered(mesh, params))(z, at_t.logsnr, cond).x
        sampled = x_hat if within is None else jnp.clip(x_hat, -within, within)
        values = {
            "gap": diffusion.mean_square(sampled - x_tilde).mean(),
            "drift": (sampled - x_tilde).mean(tuple(range(x.ndim - 1))),
        }
        if student.data_range is not None:
            values["clipped"] = (jnp.abs(x_hat) > student.data_range).mean()
        return values

    options = compilation.compiler_options(mesh)
    return jax.jit(look, out_shardings=sharding.replicated(mesh), compiler_options=options)


def _smoothness(run, stage, params):
    """How far x_hat(w) from pure noise is from a straight line: 0 for guidance itself, which is linear in w."""
    low, high = stage.w_range
    if low == high:
        return 0.0
    num = _examples(run)
    predict = _make_first_prediction(stage.model, num, run.mesh)
    keys = samplers.image_keys(0, jnp.arange(num))
    label = np.asarray(samplers.random_labels(keys, stage.model.num_labels(run.conditions)))
    cond = sharding.spread(run.mesh, cond_of(label, run.conditions))
    strengths = np.linspace(low, high, _STRENGTHS)
    x = np.stack([predict(params, run.grid, cond, jnp.float32(w))[:_EXAMPLES] for w in strengths])
    first = np.diff(x, axis=0)
    return float(np.sqrt(np.mean(np.diff(first, axis=0) ** 2) / max(np.mean(first**2), 1e-12)))


@functools.cache
def _make_first_prediction(student, num, mesh):
    """(params, grid, cond [num] without w, w) -> x_hat at t = 1 of that many images, jitted."""

    def predict(params, grid, cond, w):
        cond = {**cond, "w": jnp.full(num, w)}
        z = samplers.initial_noise(
            samplers.image_keys(0, jnp.arange(num)), student.sample_shape, student.schedule.prior_std
        )
        z = jax.lax.with_sharding_constraint(z, sharding.batched(mesh))
        denoiser = student.denoiser(sharding.gathered(mesh, params))
        with sharding.visible(mesh):
            return samplers.predict(denoiser, z, grid.at(grid.num_intervals), cond).x

    options = compilation.compiler_options(mesh)
    return jax.jit(predict, out_shardings=sharding.replicated(mesh), compiler_options=options)
