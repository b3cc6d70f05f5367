"""Denoisers, and guided teachers as functions from denoisers to a denoiser.

A Denoiser is (z [B, *S], logsnr [B], cond) -> Prediction. cond is a dict of arrays with leading axis B ("label",
later "text"), and "w" [B], the guidance strength of arXiv 2210.03142: w = 0 is the conditional model, and what other
code bases call guidance scale is 1 + w.
"""

import dataclasses
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


def classifier_free(denoiser, null_cond):
    """x^w = (1 + w) x(z, c) - w x(z, null), (arXiv 2207.12598, eq. 6), w = cond["w"] [B], per example.

    Conditional and unconditional halves go through the network as one batch of 2B. `null_cond` maps a cond to the one
    that stands for no condition. The combination is the same in x, eps and v, as its weights sum to one; nothing is
    clipped.
    """

    def guided(z, logsnr, cond):
        w = cond["w"]
        cond = {name: value for name, value in cond.items() if name != "w"}
        both = jax.tree.map(lambda c, u: jnp.concatenate([c, u]), cond, null_cond(cond))
        prediction = denoiser(jnp.concatenate([z, z]), jnp.concatenate([logsnr, logsnr]), both)

        def combine(output):
            conditional, unconditional = jnp.split(output, 2)
            strength = diffusion.expand(w, z)
            return (1.0 + strength) * conditional - strength * unconditional

        return diffusion.Prediction(*map(combine, prediction))

    return guided


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained network and all that distilling it needs; every stage's student is the teacher of the next.

    Without `w_conditioned` the guided output is made from two evaluations; with it the network takes w itself and one
    is enough.
    """

    model_fn: Callable  # (params, z [B, *S], logsnr [B], cond, *, dropout_key=None) -> raw [B, *S]
    params: Any
    schedule: Any
    parameterisation: str  # a key of diffusion.PARAMETERISATIONS
    null_cond: Callable  # cond -> the cond that stands for no condition
    num_classes: int  # labels are 0 .. num_classes - 1
    sample_shape: tuple[int, ...]  # S
    data_range: float | None = 1.0  # samples are clipped to [-data_range, data_range]; None for latents
    w_conditioned: bool = False

    @property
    def calls_per_step(self):
        """Network evaluations of one guided prediction."""
        return 1 if self.w_conditioned else 2

    def static(self):
        """This without its weights: hashable, so that one compiled program serves all weights."""
        return dataclasses.replace(self, params=None)

    def denoiser(self, params):
        """The guided denoiser, for cond with "w", of this network with `params`."""
        denoiser = make_denoiser(self.model_fn, params, self.schedule, self.parameterisation)
        return denoiser if self.w_conditioned else classifier_free(denoiser, self.null_cond)
