"""Images by the batch: the samplers compiled, spread over devices, one seed per image."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from guided_distill import compilation, editing, samplers, sharding


@functools.cache
def compiled(model, sampler, mesh):
    """(params, grid, keys, cond, num_steps[, z]) -> x [B, *S]: a sampler of a `Teacher.static()`, jitted for a mesh.

    One compilation serves all numbers of steps, and all weights of the same network. From a given z a sampler that
    draws nothing needs no keys (None).
    """

    def sample(params, grid, keys, cond, num_steps, z=None):
        if z is None:
            z = samplers.initial_noise(keys, model.sample_shape, model.schedule.prior_std)
        denoiser = model.denoiser(sharding.gathered(mesh, params))
        with sharding.visible(mesh):
            return sampler(denoiser, grid, z, cond, num_steps, keys, clip=model.data_range)

    options = compilation.compiler_options(mesh)
    return jax.jit(sample, out_shardings=sharding.batched(mesh), compiler_options=options)


@dataclasses.dataclass(frozen=True)
class Edit:
    """A picture to go out from: x f32 [*S], how far to t = start/N, and what to make anew: mask f32 [*S], 1 there."""

    x: Any
    mask: Any
    start: int


@functools.cache
def compiled_edit(model, mesh):
    """(params, grid, keys, cond, num_steps, x [*S], mask [*S], start) -> x [B, *S]: `editing.edit`, jitted."""

    def run(params, grid, keys, cond, num_steps, x, mask, start):
        eps = samplers.initial_noise(keys, model.sample_shape)
        denoiser = model.denoiser(sharding.gathered(mesh, params))
        x, mask = (jnp.broadcast_to(value[None], eps.shape) for value in (x, mask))
        prior_std, clip = model.schedule.prior_std, model.data_range
        with sharding.visible(mesh):
            return editing.edit(denoiser, grid, x, eps, cond, num_steps, start, mask, prior_std=prior_std, clip=clip)

    options = compilation.compiler_options(mesh)
    return jax.jit(run, out_shardings=sharding.batched(mesh), compiler_options=options)


def noise_between(model, seed, to_seed, num):
    """Index [b] -> z [b, *S]: noises on the way from image 0 of one seed to image 0 of another, `num` in all.

    Of one seed all are the same.
    """

    def noise(index):
        first = jnp.zeros(len(index), jnp.int32)
        ends = [samplers.initial_noise(samplers.image_keys(s, first), model.sample_shape) for s in (seed, to_seed)]
        if seed == to_seed:
            return model.schedule.prior_std * ends[0]
        share = jnp.minimum(jnp.asarray(index), num - 1) / max(num - 1, 1)
        return model.schedule.prior_std * editing.between(*ends, share)

    return noise


def cond_of(label, conditions):
    """The cond of labels i32 [b] but for w, of host arrays: with the rows of `conditions` {name: [C, ...]}, if any."""
    rows = {} if conditions is None else {name: table[label] for name, table in conditions.items()}
    # Tables of floats may be kept in half precision.
    rows = {name: row if row.dtype == np.int32 else row.astype(np.float32) for name, row in rows.items()}
    return {"label": np.asarray(label, np.int32), **rows}


def sample_images(
    model,
    params,
    grid,
    mesh,
    *,
    seed,
    num,
    w,
    num_steps,
    batch_size,
    first=0,
    labels=None,
    conditions=None,
    sampler="deterministic",
    noise=None,
    edit=None,
):
    """Yields (index [b], label [b], x [b, *S]) as host arrays for the images first .. num - 1 of a seed.

    Image k depends on (seed, k), its label and w alone; in the same batches (`first` a multiple of their size) bit for
    bit. `labels` i32 [num]; None draws them uniformly. Where the model takes more than classes a label is the number of
    a row of `conditions` {name: [C, ...]}, such as the "tokens" of captions. `w` is a number or f32 [num].
    `noise`, index [b] -> z [b, *S], stands for the noise of the seed; an `Edit` for starting from noise at all. The
    last batch is computed whole and cut, so that every batch runs the same program.
    """
    sample = compiled(model.static(), samplers.SAMPLERS[sampler], mesh)
    for start in range(first, num, batch_size):
        index = np.arange(start, start + batch_size)
        keys = samplers.image_keys(seed, jnp.asarray(index))
        label = (
            np.asarray(samplers.random_labels(keys, model.num_labels(conditions)))
            if labels is None
            else np.resize(labels[start:], batch_size)
        )
        strengths = np.resize(w[start:] if np.ndim(w) else w, batch_size)
        cond = {**cond_of(label, conditions), "w": np.asarray(strengths, np.float32)}
        z = None if noise is None else sharding.spread(mesh, noise(index))
        keys, cond = sharding.spread(mesh, (keys, cond))
        steps = jnp.asarray(num_steps, jnp.int32)
        if edit is None:
            x = sample(params, grid, keys, cond, steps, z)
        else:
            at = sharding.replicate(mesh, (edit.x, edit.mask, np.int32(edit.start)))
            x = compiled_edit(model.static(), mesh)(params, grid, keys, cond, steps, *at)
        kept = min(batch_size, num - start)
        yield index[:kept], label[:kept], sharding.to_host(x)[:kept]
