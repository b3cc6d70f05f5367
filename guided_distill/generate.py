"""Images by the batch: the samplers compiled, spread over devices, one seed per image."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from guided_distill import compilation, samplers, sharding


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
        return sampler(denoiser, grid, z, cond, num_steps, keys, clip=model.data_range)

    options = compilation.compiler_options(mesh)
    return jax.jit(sample, out_shardings=sharding.batched(mesh), compiler_options=options)


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
    labels=None,
    captions=None,
    sampler="deterministic",
):
    """Yields (index [b], label [b], x [b, *S]) as host arrays for the images 0 .. num - 1 of a seed.

    Image k depends on (seed, k), its label and w alone. `labels` i32 [num]; None draws them uniformly. Where the model
    takes captions a label is the number of one of `captions`, the tokens i32 [C, L]. The last batch is computed whole
    and cut, so that every batch runs the same program.
    """
    num_labels = model.num_classes if captions is None else len(captions)
    sample = compiled(model.static(), samplers.SAMPLERS[sampler], mesh)
    for start in range(0, num, batch_size):
        index = np.arange(start, start + batch_size)
        keys = samplers.image_keys(seed, jnp.asarray(index))
        label = (
            samplers.random_labels(keys, num_labels)
            if labels is None
            else jnp.asarray(np.resize(labels[start:], batch_size))
        )
        cond = {"label": label, "w": jnp.full(batch_size, w, jnp.float32)}
        if captions is not None:
            cond["tokens"] = jnp.asarray(captions)[label]
        keys, cond = sharding.spread(mesh, (keys, cond))
        x = sample(params, grid, keys, cond, jnp.asarray(num_steps, jnp.int32))
        kept = min(batch_size, num - start)
        yield index[:kept], np.asarray(label)[:kept], sharding.to_host(x)[:kept]
