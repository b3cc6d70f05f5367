"""Whether reading keeps up with training: images a second of a config's data, read, on the devices, and trained on.

    python -m benchmarks.input --config=digits [--seconds=5] [--data_dir=DIR]

One after the other, of stage one, on weights and pictures that are random.
"""

import argparse
import time

import jax

from benchmarks import plain_errors
from benchmarks.train_step import make_step_arguments, random_params
from guided_distill import config_files, sharding
from guided_distill.data import load_dataset, make_batches
from guided_distill.experiment import from_config
from guided_distill.stages import make_stages


def rate(next_batch, seconds):
    """Calls of next_batch() a second, after a few that fill buffers."""
    for _ in range(3):
        next_batch()
    calls, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        next_batch()
        calls += 1
    return calls / passed


def updates_of(experiment, mesh):
    """A function that makes an update of stage one and waits for it."""
    stages = {stage.name: stage for stage in make_stages(experiment)}
    stage = stages["stage1"]
    models = (stage.model, stages[stage.parent].model)
    params, theirs = (random_params(experiment, w_conditioned=model.w_conditioned) for model in models)
    step_fn, (state, *arguments) = make_step_arguments(experiment, stage, params, theirs, mesh)

    def update():
        nonlocal state
        state, metrics = step_fn(state, *arguments)
        jax.block_until_ready(metrics)

    return update


def main():
    """Prints images a second as they are read, and as they reach the devices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="digits", help="a config by name or file, as digits or x.py:variant")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--data_dir")
    args = parser.parse_args()
    config = config_files.load(args.config)
    if args.data_dir:
        config.data.data_dir = args.data_dir
    experiment = from_config(config.to_dict())
    size, mesh = experiment.stage1.batch_size, sharding.make_mesh()
    batches = make_batches(load_dataset(experiment.data).train, batch_size=size, seed=0, flip=experiment.data.flip)
    read = rate(lambda: next(batches), args.seconds)
    put = rate(lambda: jax.block_until_ready(sharding.shard_batch(mesh, next(batches))), args.seconds)
    trained = rate(updates_of(experiment, mesh), args.seconds)
    print(
        f"{args.config}, images/s in batches of {size}: {size * read:,.0f} read, {size * put:,.0f} read and put on the "
        f"devices, {size * trained:,.0f} trained on: reading is {put / trained:,.0f} times as fast"
    )


if __name__ == "__main__":
    with plain_errors():
        main()
