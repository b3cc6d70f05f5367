"""Where arrays lie: the mesh of devices, what is replicated on it and what is split along the batch."""

import functools

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from guided_distill.errors import UserError


def make_mesh(devices=None):
    """All devices of all processes, or those given, along one axis, "data". Auto axes: Linen fails on explicit ones."""
    devices = devices or jax.devices()
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


# Of dots and reductions alone, XLA's CPU library for them takes less time than of all it would do by default: a U-Net's
# training step at 32x32 takes four fifths, sampling two thirds (jax 0.10.2; benchmarks/train_step.py).
_ONE_CPU = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"}


@functools.cache
def compiler_options(mesh):
    """Options for `jax.jit` on a mesh: {} unless it is one CPU device, and its XLA knows the option.

    On several CPU devices of one process, where programs run at the same time, about half of the sampled batches had
    their first rows overwritten with this option, and with the library switched off, and none with XLA's default
    (jaxlib 0.10.2; two unconnected programs at once will do).
    """
    return dict(_ONE_CPU) if mesh.size == 1 and mesh.devices.flat[0].platform == "cpu" and _accepted() else {}


@functools.cache
def _accepted():
    # The option is experimental: another release of XLA may have another name for it, and refuse this one.
    try:
        jax.jit(lambda: 0, compiler_options=_ONE_CPU).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def replicated(mesh):
    """The sharding of what every device holds whole: weights, optimiser state, tables."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh):
    """The sharding of arrays [B, ...] split along B."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch(mesh, name, batch_size):
    """Raises UserError unless `batch_size` (the config key `name`) divides over the devices."""
    if batch_size % mesh.size:
        raise UserError(
            f"{name} is {batch_size}, which does not divide over {mesh.size} devices; "
            f"use a multiple of {mesh.size}, such as {-(-batch_size // mesh.size) * mesh.size}"
        )


def replicate(mesh, tree):
    """Puts a tree of host or device arrays on every device."""
    return jax.device_put(tree, replicated(mesh))


def shard_batch(mesh, local_batch):
    """Global arrays [B, ...] from the rows that each process holds: process p has the p-th contiguous block."""
    sharding = batched(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), local_batch)
