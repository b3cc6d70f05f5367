"""The same updates on any number of devices, weights whole or split, batches at once or in parts."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from curves import EXPERIMENT, NAMES, QUICK, arguments_of, curve, mesh_of, params_of
from jax.sharding import PartitionSpec

from configs import common, digits, imagenet64
from guided_distill import diffusion, sharding, train
from guided_distill.checkpoint import Checkpoints, load_eval_params
from guided_distill.errors import UserError
from guided_distill.experiment import from_config
from guided_distill.generate import sample_images
from guided_distill.plan import ahead
from guided_distill.stages import make_stages
from guided_distill.teachers import initial_params, shapes_of

LAYOUTS = {
    "2 devices": (2,),
    "4 devices": (4,),
    "8 devices": (8,),
    "2 fsdp": (2, 2),
    "4 of 8 fsdp": (8, 4),
    "8 fsdp": (8, 8),
    "in 4 parts": (1, 1, 4),
    "8 devices in 2 parts": (8, 1, 2),
    "8 fsdp in 2 parts": (8, 8, 2),
    "4 devices, remat, products kept": (4, 1, 1, True, "products"),
    "8 fsdp, remat, in 2 parts": (8, 8, 2, True),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout"),
    [(NAMES[-1], layout) for layout in LAYOUTS if "remat" in layout]
    + [(name, "4 devices, remat, products kept") for name in NAMES[:-1]],
)
def test_the_loss_curve_of_a_unet_is_the_same_however_the_work_is_laid_out(name, layout):
    found, expected = curve(EXPERIMENT, name, *LAYOUTS[layout])[0], curve(EXPERIMENT, name, 1)[0]
    np.testing.assert_allclose(found[:, 0], expected[:, 0], rtol=1e-5)
    np.testing.assert_allclose(found[:, 1], expected[:, 1], rtol=1e-3)


_QUICK_LAYOUTS = [layout for layout in LAYOUTS if "remat" not in layout]  # it has nothing to remat


@pytest.mark.parametrize(
    ("name", "layout"),
    [(NAMES[-1], layout) for layout in _QUICK_LAYOUTS] + [(name, "8 fsdp in 2 parts") for name in NAMES[:-1]],
)
def test_the_loss_curve_of_a_quick_network_is_the_same(name, layout):
    (found, state), (expected, _) = curve(QUICK, name, *LAYOUTS[layout]), curve(QUICK, name, 1)
    np.testing.assert_allclose(found[:, 0], expected[:, 0], rtol=1e-5)
    np.testing.assert_allclose(found[:, 1], expected[:, 1], rtol=1e-3)
    lies = jax.tree.map(lambda leaf: leaf.sharding, state)
    assert lies == sharding.shardings_of(mesh_of(*LAYOUTS[layout][:2]), state)  # as it lay before the updates


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((3, 3, 64, 128), PartitionSpec(None, None, None, "fsdp")),
        ((3, 3, 128, 64), PartitionSpec(None, None, "fsdp")),
        ((3, 3, 1020, 64), PartitionSpec(None, None, None, "fsdp")),  # 1020 does not divide
        ((4096, 7), PartitionSpec("fsdp")),
        ((128,), PartitionSpec()),  # small
        ((127, 129), PartitionSpec()),  # nothing divides
        ((), PartitionSpec()),
    ],
)
def test_weights_are_split_along_the_longest_side_that_divides(shape, spec):
    assert sharding.fsdp_spec(shape, 8) == spec
    assert sharding.fsdp_spec(shape, 1) == PartitionSpec()


def bytes_of(tree):
    """(bytes on one device, bytes of the whole) of a tree of placed shapes."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    one = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    return one, sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def test_eight_devices_hold_a_seventh_of_the_weights_at_most_each():
    """Of ImageNet 64's network: parameters, average, moments and teacher, as the train step takes them."""
    experiment = from_config(imagenet64.get_config().to_dict())
    stages = {stage.name: stage for stage in make_stages(experiment)}
    stage = stages["stage1"]
    state, frozen, *_ = ahead.step_arguments(experiment, stage, stages[stage.parent], mesh_of(8, 8))
    one, whole = bytes_of((state, frozen))
    assert one <= whole / 7
    assert bytes_of(ahead.step_arguments(experiment, stage, stages[stage.parent], mesh_of(8))[0])[0] > whole / 2


def test_the_compiler_takes_a_seventh_of_the_weights_for_an_argument():
    """The same from the compiled program's own account, of a network of 2 M weights."""
    config = digits.get_config()
    common.use_mlp(config, features=1024, num_layers=2, emb_channels=128)
    experiment = from_config(config.to_dict())
    stages = {stage.name: stage for stage in make_stages(experiment)}
    stage, sizes = stages["stage1"], {}
    for fsdp in (1, 8):
        mesh = mesh_of(8, fsdp)
        step = train.make_train_step(stage.objective, stage.model, stage.teacher, stage.training.optimiser, mesh)
        arguments = ahead.step_arguments(experiment, stage, stages[stage.parent], mesh)
        batch = bytes_of(arguments[2])[0]  # which is split always
        sizes[fsdp] = step.lower(*arguments).compile().memory_analysis().argument_size_in_bytes - batch
    weights = sum(leaf.size for leaf in jax.tree.leaves(shapes_of(stage.init)))
    assert stage.training.ema and sizes[1] > 0.99 * 4 * 5 * weights  # with two moments, an average and the teacher
    assert sizes[8] <= sizes[1] / 7


@pytest.mark.parametrize(("before", "after"), [(4, 1), (8, 2)])
def test_a_checkpoint_is_read_with_another_split(tmp_path, before, after):
    stage = make_stages(EXPERIMENT)[0]
    states = {fsdp: arguments_of(EXPERIMENT, stage, mesh_of(8, fsdp))[0] for fsdp in (before, after)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, states[before], {"next": 1})
    like = jax.tree.map(jnp.zeros_like, states[after])
    with Checkpoints(tmp_path) as checkpoints:
        restored, _ = checkpoints.restore_newest(sharding.place(mesh_of(8, after), like))
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(states[after]), strict=True):
        assert ours.sharding == theirs.sharding
        np.testing.assert_array_equal(ours, theirs)
    params = load_eval_params(tmp_path, functools.partial(sharding.by_size, mesh_of(8, after)))
    expected = sharding.shardings_of(mesh_of(8, after), params)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == expected


def test_weights_are_made_where_they_lie():
    mesh = mesh_of(8, 8)
    params = initial_params(EXPERIMENT, True, jax.random.key(2), mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == sharding.shardings_of(mesh, params)
    for ours, theirs in zip(
        jax.tree.leaves(params), jax.tree.leaves(initial_params(EXPERIMENT, True, jax.random.key(2))), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def test_split_weights_sample_the_same_images():
    model = {stage.name: stage for stage in make_stages(EXPERIMENT)}["stage2_det_0002"].model
    images = []
    for mesh in (mesh_of(1), mesh_of(8, 8)):
        params, grid = sharding.place(mesh, (params_of(EXPERIMENT, True), diffusion.make_grid(EXPERIMENT.schedule, 4)))
        drawn = sample_images(model, params, grid, mesh, seed=0, num=8, w=1.0, num_steps=2, batch_size=8)
        images.append(np.concatenate([x for _, _, x in drawn]))
    np.testing.assert_allclose(*images, atol=2e-5)


def test_a_size_that_does_not_divide_is_named():
    with pytest.raises(UserError, match=r"config\.mesh\.fsdp is 3, which does not divide 8 devices"):
        mesh_of(8, 3)
    with pytest.raises(UserError, match=r"16, which does not divide over 8 devices in 4 accumulated parts; .* 32"):
        sharding.check_batch(mesh_of(8), "config.stage1.batch_size", 16, 4)


def test_each_device_keeps_its_rows_in_every_part():
    mesh = mesh_of(4)
    rows = sharding.spread(mesh, np.arange(16))
    parts = jax.jit(lambda rows: sharding.parts_of_batch(mesh, rows, 2))(rows)
    assert sorted(np.asarray(parts).ravel()) == list(range(16))
    held = {shard.device: sorted(np.ravel(shard.data).tolist()) for shard in parts.addressable_shards}
    assert held == {shard.device: sorted(np.ravel(shard.data).tolist()) for shard in rows.addressable_shards}
