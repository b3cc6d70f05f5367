"""Seconds per image of the few-step student beside its guided teacher at 1024 x 2 calls, side by side in one run.

    python -m benchmarks.sampling [--config=configs/digits.py]

--config is a name or a file, as cifar10_small or configs/cifar10_small.py:cores. The time does not depend on the
weights, so fresh ones are used.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from benchmarks import plain_errors
from guided_distill import compilation, config_files, diffusion, generate, samplers, sharding
from guided_distill.experiment import from_config
from guided_distill.teachers import initial_params, make_model

TEACHER_STEPS, STUDENT_STEPS, RUNS = 1024, 4, 3


def median_seconds(call, runs=RUNS):
    """Median wall-clock seconds of `call`, after one call that is not counted."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def sampler_call(model, params, grid, mesh, batch_size, num_steps):
    """A call of the compiled sampler on `batch_size` images."""
    sample = generate.compiled(model, samplers.deterministic, mesh)
    keys = samplers.image_keys(0, jnp.arange(batch_size))
    cond = {"label": jnp.zeros(batch_size, jnp.int32), "w": jnp.ones(batch_size)}
    steps = jnp.asarray(num_steps, jnp.int32)
    return lambda: sample(params, grid, keys, cond, steps)


def network_call(model, params, mesh, batch_size):
    """One jitted evaluation of the network on `batch_size` images."""
    z, one = jnp.zeros((batch_size, *model.sample_shape)), jnp.ones(batch_size)
    cond = {"label": jnp.zeros(batch_size, jnp.int32), "w": one}
    z, one, cond = jax.device_put((z, one, cond), sharding.batched(mesh))
    options = compilation.compiler_options(mesh)
    forward = jax.jit(model.model_fn, out_shardings=sharding.batched(mesh), compiler_options=options)
    return lambda: forward(params, z, one, cond)


def main():
    """Prints a row per batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 64])
    args = parser.parse_args()
    experiment = from_config(config_files.load(args.config).to_dict())

    mesh = sharding.make_mesh()
    grid = sharding.place(mesh, diffusion.make_grid(experiment.schedule, TEACHER_STEPS))
    key = jax.random.key(0)
    teacher, student = (make_model(experiment, w_conditioned=w_conditioned) for w_conditioned in (False, True))
    teacher_params, student_params = (initial_params(experiment, w, key) for w in (False, True))
    print(
        f"{args.config} on {jax.device_count()} x {jax.devices()[0].device_kind}; medians of {RUNS} runs after warm-up"
    )
    print("batch  teacher 1024x2 ms/image  student 4 ms/image  times faster  sampler(8) / (8 x one network call)")
    for batch_size in args.batch_sizes:
        slow = median_seconds(sampler_call(teacher, teacher_params, grid, mesh, batch_size, TEACHER_STEPS))
        fast = median_seconds(sampler_call(student, student_params, grid, mesh, batch_size, STUDENT_STEPS), 3 * RUNS)
        eight = median_seconds(sampler_call(student, student_params, grid, mesh, batch_size, 8), 9 * RUNS)
        one = median_seconds(network_call(student, student_params, mesh, batch_size), 27 * RUNS)
        per_image = 1e3 / batch_size
        print(
            f"{batch_size:5d}  {slow * per_image:23.2f}  {fast * per_image:18.3f}  {slow / fast:12.0f}"
            f"  {eight / (8 * one):.3f}",
            flush=True,
        )


if __name__ == "__main__":
    with plain_errors():
        main()
