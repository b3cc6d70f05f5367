"""Whether reading keeps up with training: batches a second of a config's data, beside the rate of a train step.

    python -m benchmarks.input --config=digits [--seconds=5] [--data_dir=DIR]

Compare with the images/s that training logs, or with benchmarks.config_step.
"""

import argparse
import importlib
import time

import jax

from guided_distill import sharding
from guided_distill.data import load_dataset, make_batches
from guided_distill.experiment import from_config


def rate(next_batch, seconds):
    """Calls of next_batch() a second, after a few that fill buffers."""
    for _ in range(3):
        next_batch()
    calls, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        next_batch()
        calls += 1
    return calls / passed


def main():
    """Prints images a second as they are read, and as they reach the devices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="digits", help="the stem of a file in configs/")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--data_dir")
    args = parser.parse_args()
    config = importlib.import_module(f"configs.{args.config}").get_config()
    if args.data_dir:
        config.data.data_dir = args.data_dir
    experiment = from_config(config.to_dict())
    size, mesh = experiment.stage1.batch_size, sharding.make_mesh()
    batches = make_batches(load_dataset(experiment.data).train, batch_size=size, seed=0, flip=experiment.data.flip)
    read = rate(lambda: next(batches), args.seconds)
    put = rate(lambda: jax.block_until_ready(sharding.shard_batch(mesh, next(batches))), args.seconds)
    print(f"{args.config}, batches of {size}: {size * read:,.0f} images/s read, {size * put:,.0f} images/s on devices")


if __name__ == "__main__":
    main()
