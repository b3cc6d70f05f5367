"""Where arrays lie: the mesh of devices, what is replicated on it and what is split along the batch."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from guided_distill.errors import UserError


def make_mesh(devices=None):
    """All devices of all processes, or those given, along one axis, "data". Auto axes: Linen fails on explicit ones."""
    devices = devices or jax.devices()
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


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
