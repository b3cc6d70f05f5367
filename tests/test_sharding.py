"""The same updates on any number of devices, weights whole or split, batches at once or in parts."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny import tiny_config

from configs import common, digits, imagenet64
from guided_distill import diffusion, sharding, train
from guided_distill.checkpoint import Checkpoints, load_eval_params
from guided_distill.errors import UserError
from guided_distill.experiment import from_config
from guided_distill.generate import sample_images
from guided_distill.plan import ahead
from guided_distill.stages import make_knobs, make_stages
from guided_distill.state import make_state
from guided_distill.teachers import initial_params, shapes_of

# Wide enough for its kernels to be worth splitting.
WIDE = tiny_config(clip_targets=False)
WIDE["model"].update(channels=32, norm_groups=8, emb_channels=128)
EXPERIMENT = from_config(WIDE)
UPDATES = 20


def quick_experiment():
    """One that compiles in a second."""
    config = digits.get_config()
    common.use_mlp(config, features=128, num_layers=2, emb_channels=32)
    config.stage2.update(teacher_steps=4, final_num_steps=(1,))
    config.evaluate.num_steps = (1, 2)
    return from_config(config.to_dict())


QUICK = quick_experiment()


def mesh_of(devices, fsdp=1):
    return sharding.make_mesh(jax.devices()[:devices], fsdp)


@functools.cache
def params_of(experiment, w_conditioned):
    params = initial_params(experiment, w_conditioned, jax.random.key(1))
    return jax.tree.map(lambda p: p + 0.05 * jnp.sin(jnp.arange(p.size, dtype=p.dtype).reshape(p.shape)), params)


def arguments_of(experiment, stage, mesh):
    """(state, frozen, knobs, key) of a stage's step, on a mesh."""
    params = jax.tree.map(jnp.copy, params_of(experiment, stage.model.w_conditioned))
    state = make_state(params, stage.training.optimiser)
    frozen = {} if stage.teacher is None else {"teacher": params_of(experiment, stage.teacher.w_conditioned)}
    knobs = make_knobs(stage, diffusion.make_grid(experiment.schedule, experiment.stage2.teacher_steps))
    return sharding.place(mesh, (state, frozen, knobs, jax.random.key(0)))


def batch_of(step, size=16):
    rng = np.random.default_rng(step)
    x = rng.uniform(-1, 1, (size, 8, 8, 1)).astype(np.float32)
    return {"x": x, "label": rng.integers(0, 10, size, dtype=np.int32)}


@functools.cache
def curve(experiment, name, devices, fsdp=1, accumulate=1, remat=False):
    """(loss and norm of the gradient of the first updates, the state after them)."""
    if remat:
        experiment = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, remat=True))
    stage = {stage.name: stage for stage in make_stages(experiment)}[name]
    mesh, optimiser = mesh_of(devices, fsdp), stage.training.optimiser
    step = train.make_train_step(stage.objective, stage.model, stage.teacher, optimiser, mesh, accumulate)
    state, frozen, knobs, key = arguments_of(experiment, stage, mesh)
    found = []
    for update in range(UPDATES):
        state, values = step(state, frozen, sharding.shard_batch(mesh, batch_of(update)), knobs, key)
        found.append([float(values["loss"]), float(values["grad_norm"])])
    assert step._cache_size() == 1
    return np.array(found), state


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
    "remat": (1, 1, 1, True),
    "8 fsdp, remat, in 2 parts": (8, 8, 2, True),
}
NAMES = ["teacher", "stage1", "stage2_det_0002"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["8 devices", "4 of 8 fsdp", "in 4 parts", "remat", "8 fsdp, remat, in 2 parts"])
def test_the_loss_curve_is_the_same_however_the_work_is_laid_out(name, layout):
    found, expected = curve(EXPERIMENT, name, *LAYOUTS[layout])[0], curve(EXPERIMENT, name, 1)[0]
    np.testing.assert_allclose(found[:, 0], expected[:, 0], rtol=1e-5)
    np.testing.assert_allclose(found[:, 1], expected[:, 1], rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if "remat" not in layout])  # it has nothing to remat
def test_the_loss_curve_of_a_quick_network_is_the_same(name, layout):
    (found, state), (expected, _) = curve(QUICK, name, *LAYOUTS[layout]), curve(QUICK, name, 1)
    np.testing.assert_allclose(found[:, 0], expected[:, 0], rtol=1e-5)
    np.testing.assert_allclose(found[:, 1], expected[:, 1], rtol=1e-3)
    shares = [leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(state)]
    assert min(shares) == (1 / 8 if "fsdp" in layout else 1)  # they still lie as they lay


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
    """The same from the compiled program's own account, of a small network."""
    stages = {stage.name: stage for stage in make_stages(QUICK)}
    stage, sizes = stages["stage1"], {}
    for fsdp in (1, 8):
        mesh = mesh_of(8, fsdp)
        step = train.make_train_step(stage.objective, stage.model, stage.teacher, stage.training.optimiser, mesh)
        arguments = ahead.step_arguments(QUICK, stage, stages[stage.parent], mesh)
        sizes[fsdp] = step.lower(*arguments).compile().memory_analysis().argument_size_in_bytes
    large = sum(leaf.size for leaf in jax.tree.leaves(shapes_of(stage.init)) if leaf.size >= 2**14)
    copies = 4 + bool(
        stage.training.ema
    )  # weights, two moments, an average, and the teacher; the batch is split always
    assert sizes[1] - sizes[8] > 0.9 * 7 / 8 * 4 * copies * large > 0


@pytest.mark.parametrize(("before", "after"), [(4, 1), (1, 4), (8, 2)])
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
