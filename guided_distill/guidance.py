"""Denoisers, and guided teachers as functions from denoisers to a denoiser.

A Denoiser is (z [B, *S], logsnr [B], cond) -> Prediction. cond is a dict of arrays with leading axis B ("label",
"tokens" of a caption, "text"), and "w" [B], the guidance strength of arXiv 2210.03142: w = 0 is the conditional model,
and what other code bases call guidance scale is 1 + w.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from guided_distill import diffusion


def make_denoiser(model_fn, params, schedule, parameterisation):
    """Binds a network to its weights, schedule and output type, in float32 whatever the network computes in."""

    def denoiser(z, logsnr, cond, *, dropout_key=None):
        raw = model_fn(params, z, logsnr, cond, dropout_key=dropout_key).astype(jnp.float32)
        return diffusion.to_prediction(parameterisation, raw, z, *schedule.alpha_sigma(logsnr))

    return denoiser


@functools.cache  # a compiled step is looked up by the functions it was made of
def null_label(num_classes):
    """cond -> the cond whose labels say "no condition": label num_classes."""
    return lambda cond: {**cond, "label": jnp.full_like(cond["label"], num_classes)}


def null_text(cond):
    """The cond whose "text" is that of the empty caption, cond["null_text"] [B, L, D]: all else stays."""
    return {**cond, "text": cond["null_text"]}


@functools.cache  # as above
def null_caption(num_classes, end):
    """cond -> the cond without a label whose caption is empty: all its "tokens" are `end`."""
    without_label = null_label(num_classes)
    return lambda cond: without_label({**cond, "tokens": jnp.full_like(cond["tokens"], end)})


def classifier_free(denoiser, null_cond):
    """x^w = (1 + w) x(z, c) - w x(z, null), (arXiv 2207.12598, eq. 6), w = cond["w"] [B], per example.

    Conditional and unconditional halves go through the network as one batch of 2B. `null_cond` maps a cond to the one
    that stands for no condition. The combination is the same in x, eps and v, as its weights sum to one; nothing is
    clipped.
    """

    def guided(z, logsnr, cond):
        w, cond = _take_w(cond)
        both = jax.tree.map(_interleave, cond, null_cond(cond))
        prediction = denoiser(_interleave(z, z), _interleave(logsnr, logsnr), both)
        conditional, unconditional = (jax.tree.map(lambda x, k=k: x[k::2], prediction) for k in (0, 1))
        return _away_from(unconditional, conditional, w)

    return guided


def _take_w(cond):
    """w [B] and the rest of a cond."""
    return cond["w"], {name: value for name, value in cond.items() if name != "w"}


def _away_from(worse, better, w):
    """(1 + w) better - w worse, of two Predictions; w [B]."""

    def combine(theirs, ours):
        strength = diffusion.expand(w, ours)
        return (1.0 + strength) * ours - strength * theirs

    return jax.tree.map(combine, worse, better)


def _interleave(a, b):
    """[B, ...] twice -> [2B, ...], a's example k beside b's: what one device holds of a batch stays where it is."""
    return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained network and all that distilling it needs; every stage's student is the teacher of the next.

    Without `w_conditioned` the guided output is made from two evaluations; with it the network takes w itself and one
    is enough. Without a `null_cond` there is nothing to guide with, and the network is taken as it is: a student of
    one fixed w.
    """

    model_fn: Callable  # (params, z [B, *S], logsnr [B], cond, *, dropout_key=None) -> raw [B, *S]
    params: Any
    schedule: Any
    parameterisation: str  # a key of diffusion.PARAMETERISATIONS
    null_cond: Callable | None  # cond -> the cond that stands for no condition
    num_classes: int  # labels are 0 .. num_classes - 1
    sample_shape: tuple[int, ...]  # S
    # (name, shape of one example, dtype) of what cond holds besides "label" and "w", such as ("tokens", (L,), "int32")
    cond_fields: tuple[tuple[str, tuple[int, ...], str], ...] = ()
    data_range: float | None = 1.0  # samples are clipped to [-data_range, data_range]; None: they are not
    w_conditioned: bool = False
    guided: Callable | None = None  # params -> guided Denoiser, where it is more than guiding model_fn
    guided_calls: int | None = None  # network evaluations of `guided`, where they are not twice the members
    members: int = 1  # networks evaluated in one call of model_fn
    student: tuple[Callable, Callable] | None = None  # (its ModelFn with a w input, key -> the weights it starts from)

    @property
    def calls_per_step(self):
        """Network evaluations of one guided prediction."""
        if self.guided_calls is not None:
            return self.guided_calls
        return self.members * (1 if self.w_conditioned or self.null_cond is None else 2)

    def num_labels(self, conditions):
        """How many labels there are: classes, or where `conditions` {name: [C, ...]} are given the rows of those."""
        return self.num_classes if conditions is None else len(next(iter(conditions.values())))

    def cond_shapes(self, batch):
        """The cond of `batch` examples, as ShapeDtypeStructs."""
        fields = (("label", (), "int32"), ("w", (), "float32"), *self.cond_fields)
        return {name: jax.ShapeDtypeStruct((batch, *shape), dtype) for name, shape, dtype in fields}

    def static(self):
        """This without its weights: hashable, so that one compiled program serves all weights."""
        return dataclasses.replace(self, params=None)

    def denoiser(self, params):
        """The guided denoiser, for cond with "w", of this network with `params`."""
        if self.guided is not None:
            return self.guided(params)
        denoiser = make_denoiser(self.model_fn, params, self.schedule, self.parameterisation)
        if self.w_conditioned or self.null_cond is None:
            return denoiser
        return classifier_free(denoiser, self.null_cond)


def ensemble(teachers):
    """The Teacher whose output is the mean of its K members', taken before guidance.

    Members of one network are stacked and evaluated together; of several, one after the other. The mean is the same in
    x, eps and v, so members may differ in what they predict, but not in schedule or data. A student starts from the
    first member.
    """
    first = teachers[0]
    same_kind = all((t.schedule, t.sample_shape, t.num_classes) == (first.schedule, first.sample_shape,
                    first.num_classes) for t in teachers)  # fmt: skip
    if not same_kind:
        raise ValueError("members of an ensemble need the same schedule, sample shape and classes")
    _refuse_guided("an ensemble", *teachers)
    members = sum(teacher.members for teacher in teachers)
    if all((t.model_fn, t.parameterisation) == (first.model_fn, first.parameterisation) for t in teachers):
        params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(teacher.params for teacher in teachers))
        model_fn = functools.partial(_mean_of_stacked, first.model_fn)
        return dataclasses.replace(first, model_fn=model_fn, params=params, members=members)
    model_fn = functools.partial(_mean_velocity, tuple(teacher.static() for teacher in teachers))
    params = tuple(teacher.params for teacher in teachers)
    # The first member's student says what the first member does, which need not be v.
    student = first.student if first.parameterisation == "v" else None
    return dataclasses.replace(
        first, model_fn=model_fn, params=params, parameterisation="v", members=members, student=student
    )


def _refuse_guided(what, *teachers):
    if any(teacher.guided is not None for teacher in teachers):
        raise ValueError(f"{what} is made of plain teachers; combine them first, and guide or gate the result")


def _mean_of_stacked(model_fn, params, z, logsnr, cond, *, dropout_key=None):
    def member(own):
        return model_fn(own, z, logsnr, cond, dropout_key=dropout_key).astype(jnp.float32)

    return jax.vmap(member)(params).mean(0)


def _mean_velocity(teachers, params, z, logsnr, cond, *, dropout_key=None):
    at = teachers[0].schedule.alpha_sigma(logsnr)
    velocities = [
        diffusion.velocity(make_denoiser(t.model_fn, own, t.schedule, t.parameterisation)(z, logsnr, cond), *at)
        for t, own in zip(teachers, params, strict=True)
    ]
    return sum(velocities) / len(velocities)


def autoguidance(strong, weak):
    """The Teacher x^w = (1 + w) strong(z, c) - w weak(z, c), both conditional (arXiv 2406.02507, eq. 3, with w + 1).

    `weak` is a smaller or less trained model of the same data and schedule. A student starts from `strong`.
    """
    if (strong.schedule, strong.sample_shape) != (weak.schedule, weak.sample_shape):
        raise ValueError("autoguidance needs two models of the same schedule and sample shape")
    _refuse_guided("autoguidance", strong, weak)
    guided = functools.partial(_autoguided, strong.static(), weak.static())
    params = {"strong": strong.params, "weak": weak.params}
    return dataclasses.replace(strong, params=params, guided=guided, guided_calls=strong.members + weak.members)


def _autoguided(strong, weak, params):
    good, bad = (
        make_denoiser(teacher.model_fn, params[name], teacher.schedule, teacher.parameterisation)
        for name, teacher in (("strong", strong), ("weak", weak))
    )

    def denoiser(z, logsnr, cond):
        w, cond = _take_w(cond)
        return _away_from(bad(z, logsnr, cond), good(z, logsnr, cond), w)

    return denoiser


@functools.cache  # a compiled step is looked up by its teacher: rounds of one network have the same one
def clipped(teacher):
    """The static Teacher whose x_hat is kept in its data's range, as its sampler keeps it; itself where there is none.

    At high w x_hat leaves that range, and the sampler's path is another than the unclipped one.
    """
    if teacher.data_range is None:
        return teacher
    return dataclasses.replace(teacher, guided=functools.partial(_clipped, teacher))


def _clipped(teacher, params):
    denoiser = teacher.denoiser(params)

    def within_range(z, logsnr, cond):
        at = teacher.schedule.alpha_sigma(logsnr)
        return diffusion.clip_prediction(denoiser(z, logsnr, cond), z, *at, teacher.data_range)

    return within_range


def interval(teacher, logsnr_min, logsnr_max):
    """The Teacher that guides only where logsnr_min <= log-SNR < logsnr_max, and is conditional elsewhere.

    (arXiv 2404.07724, eq. 6, where the interval is one of sigma = exp(-logsnr / 2).)
    """
    guided = functools.partial(_within_interval, teacher.static(), logsnr_min, logsnr_max)
    return dataclasses.replace(teacher, guided=guided)


def _within_interval(teacher, logsnr_min, logsnr_max, params):
    denoiser = teacher.denoiser(params)

    def gated(z, logsnr, cond):
        inside = (logsnr >= logsnr_min) & (logsnr < logsnr_max)
        return denoiser(z, logsnr, {**cond, "w": jnp.where(inside, cond["w"], 0.0)})

    return gated
