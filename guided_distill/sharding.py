"""Where arrays lie: the mesh of devices, what is split along the batch, which weights along the axis "fsdp"."""

import math

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from guided_distill import distributed
from guided_distill.errors import UserError
from guided_distill.models.attention import IMAGINED

_AXES = ("data", "fsdp")
SMALL = 2**14  # elements; sharing out less saves nothing and costs a collective
_GATHERED = "gathered"


def make_mesh(devices=None, fsdp=1):
    """All devices of all processes, or those given, along the axes "data" and "fsdp", the latter `fsdp` long.

    Auto axes: Linen fails on explicit ones. Raises UserError where `fsdp` does not divide the devices.
    """
    devices = devices or jax.devices()
    if fsdp < 1 or len(devices) % fsdp:
        raise UserError(f"config.mesh.fsdp is {fsdp}, which does not divide {len(devices)} devices; name one that does")
    # By process, so that process p's rows of a batch are its p-th block: jax.make_mesh may order them by the torus of
    # a TPU, and examples would then meet other keys than on another number of hosts. XLA lays its rings out itself.
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    grid = np.array(devices).reshape(-1, fsdp)
    return Mesh(grid, _AXES, axis_types=(AxisType.Auto,) * len(_AXES))


def replicated(mesh):
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh):
    """The sharding of arrays [B, ...] split along B, over all devices."""
    return NamedSharding(mesh, PartitionSpec(_AXES))


def fsdp_spec(shape, fsdp):
    """The PartitionSpec of a weight: split along the longest dimension that `fsdp` divides; small ones are whole."""
    sides = [side if side % fsdp == 0 else 0 for side in shape]
    if fsdp == 1 or math.prod(shape) < SMALL or not any(sides):
        return PartitionSpec()
    return PartitionSpec(*(None,) * sides.index(max(sides)), "fsdp")


def by_size(mesh, shape):
    """The sharding of a weight of that shape, of its moments and its average."""
    return NamedSharding(mesh, fsdp_spec(shape, mesh.shape["fsdp"]))


def shardings_of(mesh, tree):
    """The tree of `by_size` for a tree of arrays or shapes."""
    return jax.tree.map(lambda leaf: by_size(mesh, np.shape(leaf)), tree)


def place(mesh, tree):
    """Puts a tree of host or device arrays where `by_size` says: weights split along "fsdp", the rest everywhere."""
    return _put(tree, shardings_of(mesh, tree))


def _put(tree, shardings):
    if not distributed.several():
        return jax.device_put(tree, shardings)
    # On processes with one device each, jax.device_put makes arrays of a device's array that know no shards (0.10.2).
    return jax.jit(_same, out_shardings=shardings)(tree)


def _same(tree):  # one object, by which jit finds the program of an earlier call
    return tree


def replicate(mesh, tree):
    """Puts a tree of host or device arrays on every device, whole."""
    return _put(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def visible(mesh):
    """A context inside a program: networks see the mesh, whose kernels have to be told what one device's share is."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def imagined(platform):
    """The same for one device of a platform, "tpu", "gpu" or "cpu", that programs are traced for and not run on."""
    device = jax.sharding.AbstractDevice(device_kind=IMAGINED, num_cores=None, platform=platform)
    types = (AxisType.Auto,) * len(_AXES)
    mesh = jax.sharding.AbstractMesh((1,) * len(_AXES), _AXES, axis_types=types, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def split(mesh, tree):
    """Inside a program: the tree lies as `place` puts it."""
    if mesh.shape["fsdp"] == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, shardings_of(mesh, tree))


def gathered(mesh, params):
    """Inside a program: weights whole on every device, where a network is about to use them."""
    if mesh.shape["fsdp"] == 1:
        return params
    whole = replicated(mesh)
    return jax.tree.map(lambda p: checkpoint_name(jax.lax.with_sharding_constraint(p, whole), _GATHERED), params)


def gathering_twice(mesh, loss):
    """A loss whose `gathered` weights are not kept for the backward pass, but gathered there again."""
    if mesh.shape["fsdp"] == 1:
        return loss
    return jax.checkpoint(loss, policy=jax.checkpoint_policies.save_anything_except_these_names(_GATHERED))


def check_batch(mesh, name, batch_size, parts=1):
    """Raises UserError unless `batch_size` (the config key `name`) divides over the devices, in `parts` parts."""
    unit = mesh.size * parts
    if batch_size % unit:
        of_parts = f" in {parts} accumulated parts" if parts > 1 else ""
        raise UserError(
            f"{name} is {batch_size}, which does not divide over {mesh.size} devices{of_parts}; "
            f"use a multiple of {unit}, such as {-(-batch_size // unit) * unit}"
        )


def parts_of_batch(mesh, batch, count):
    """Inside a program: a tree of [B, ...] as [count, B / count, ...], each part over all devices as the whole was."""
    parted = NamedSharding(mesh, PartitionSpec(None, _AXES))

    def part(rows):
        # Every device's own rows are shared out, so that none moves to another device.
        parts = rows.reshape(mesh.size, count, -1, *rows.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(parts.reshape(count, -1, *rows.shape[1:]), parted)

    return jax.tree.map(part, batch)


def spread(mesh, batch):
    """Puts a tree of [B, ...] that every process holds whole on the devices, split along B."""
    return _put(batch, jax.tree.map(lambda _: batched(mesh), batch))


def to_host(array):
    """A global array, which other processes may hold parts of, as a NumPy array on every process."""
    return multihost_utils.process_allgather(array, tiled=True) if distributed.several() else np.asarray(array)


def shard_batch(mesh, local_batch):
    """Global arrays [B, ...] from the rows that each process holds: process p has the p-th contiguous block."""
    sharding = batched(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), local_batch)
