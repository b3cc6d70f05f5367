"""Checkpoints of diffusion_distillation, against that network written in plain Linen with its own names."""

import dataclasses
import functools

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from tiny import tiny_config

from guided_distill.errors import UserError
from guided_distill.experiment import from_config
from guided_distill.interop import salimans_ho
from guided_distill.interop.command import import_weights
from guided_distill.models import make_model_fn
from guided_distill.models.unet import UNet, UNetConfig
from guided_distill.stages import make_stages
from guided_distill.teachers import make_module
from guided_distill.workdir import open_run

CONFIG = UNetConfig(
    channels=32, emb_channels=16, multipliers=(1, 2), num_blocks=1, attention_resolutions=(4,), head_dim=16,
    dropout=0.0, num_classes=5, out_channels=6,
)  # fmt: skip
KEYS = jax.random.split(jax.random.key(0), 4)
Z, LOGSNR = jax.random.normal(KEYS[0], (3, 8, 8, 3)), jnp.array([-6.0, 0.3, 7.0])


class Block(nn.Module):
    features: int
    resample: str = ""

    @nn.compact
    def __call__(self, x, emb):
        h = nn.swish(nn.GroupNorm(name="norm1")(x))
        if self.resample == "up":
            h, x = (jnp.repeat(jnp.repeat(a, 2, axis=1), 2, axis=2) for a in (h, x))
        elif self.resample == "down":
            h, x = (nn.avg_pool(a, (2, 2), (2, 2)) for a in (h, x))
        h = nn.Conv(self.features, (3, 3), name="conv1")(h)
        scale, shift = jnp.split(nn.Dense(2 * self.features, name="temb_proj")(nn.swish(emb))[:, None, None], 2, -1)
        h = nn.swish(nn.GroupNorm(name="norm2")(h) * (1 + scale) + shift)
        h = nn.Conv(self.features, (3, 3), name="conv2")(h)
        return h + (x if x.shape[-1] == self.features else nn.Dense(self.features, name="nin_shortcut")(x))


class SelfAttention(nn.Module):
    head_dim: int | None

    @nn.compact
    def __call__(self, x):
        b, height, width, c = x.shape
        h = nn.GroupNorm(name="norm")(x).reshape(b, height * width, c)
        d = self.head_dim or c
        q, k, v = (nn.DenseGeneral((c // d, d), name=name)(h) for name in "qkv")
        h = nn.DenseGeneral(c, axis=(-2, -1), name="proj_out")(nn.dot_product_attention(q, k, v))
        return x + h.reshape(x.shape)


def time_embedding(logsnr, dim):
    # In this order, and the frequencies by NumPy: where angles are a thousand, another rounding shows.
    angle = 1000.0 * (jnp.arctan(jnp.exp(-0.5 * logsnr)) / (0.5 * jnp.pi))[:, None]
    frequencies = np.exp(-np.log(np.float32(10000)) / np.float32(dim // 2 - 1) * np.arange(dim // 2, dtype=np.float32))
    angle = angle * frequencies[None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class Theirs(nn.Module):
    config: UNetConfig

    @nn.compact
    def __call__(self, z, logsnr, label):
        config = self.config
        emb = nn.Dense(config.emb_channels, name="dense0")(time_embedding(logsnr, config.channels))
        emb = nn.Dense(config.emb_channels, name="dense1")(nn.swish(emb))
        if config.num_classes > 1:
            one_hot = jax.nn.one_hot(label, config.num_classes)
            emb = emb + nn.Dense(config.emb_channels, name="class_emb")(one_hot)

        def attend(h, name):
            return SelfAttention(config.head_dim, name=name)(h) if h.shape[1] in config.attention_resolutions else h

        hs, levels = [nn.Conv(config.channels, (3, 3), name="conv_in")(z)], list(enumerate(config.multipliers))
        for level, multiplier in levels:
            features = config.channels * multiplier
            for i in range(config.num_blocks):
                h = Block(features, name=f"down_{level}.block_{i}")(hs[-1], emb)
                hs.append(attend(h, f"down_{level}.attn_{i}"))
            if level != levels[-1][0]:
                hs.append(Block(features, "down", name=f"down_{level}.downsample")(hs[-1], emb))
        h = Block(features, name="mid.block_1")(hs[-1], emb)
        h = SelfAttention(config.head_dim, name="mid.attn_1")(h)
        h = Block(features, name="mid.block_2")(h, emb)
        for level, multiplier in reversed(levels):
            features = config.channels * multiplier
            for i in range(config.num_blocks + 1):
                h = Block(features, name=f"up_{level}.block_{i}")(jnp.concatenate([h, hs.pop()], -1), emb)
                h = attend(h, f"up_{level}.attn_{i}")
            if level:
                h = Block(features, "up", name=f"up_{level}.upsample")(h, emb)
        h = nn.swish(nn.GroupNorm(name="norm_out")(h))
        return nn.Conv(config.out_channels, (3, 3), name="conv_out")(h)


def shapes(config):
    z, one = jnp.zeros((1, 8, 8, 3)), jnp.zeros(1)
    return jax.eval_shape(lambda key: UNet(config).init(key, z, one, one.astype(jnp.int32), None)["params"], KEYS[1])


def written(path, config, num_steps=0):
    """A file as their code writes it, of weights none of which is zero; and what their network makes of it."""
    label, net = jnp.array([0, 4, 2]), Theirs(config)
    params = jax.jit(net.init)(KEYS[1], Z, LOGSNR, label)["params"]
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(KEYS[2], len(leaves))
    leaves = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(treedef, leaves)
    state = {"step": 7, "optimizer": {"state": {"step": 7}}, "ema_params": params, "num_sample_steps": num_steps}
    path.write_bytes(flax.serialization.to_bytes(state))
    return jax.jit(net.apply)({"params": params}, Z, LOGSNR, label)


@pytest.mark.parametrize("changes", [{}, {"head_dim": None, "num_classes": 1}])
def test_the_network_is_theirs(tmp_path, changes):
    config = dataclasses.replace(CONFIG, **changes)
    expected = written(tmp_path / "checkpoint", config, num_steps=8)
    params, num_steps = salimans_ho.read_checkpoint(tmp_path / "checkpoint", config, shapes(config))
    assert num_steps == 8
    label = jnp.array([0, 4, 2]) if config.num_classes > 1 else jnp.array([0, 1, 0])
    ours = jax.jit(make_model_fn(UNet(config)))(params, Z, LOGSNR, {"label": label, "w": None})
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(ours, expected, atol=1e-5 * scale, rtol=0)


def test_there_and_back_is_the_same_to_the_bit(tmp_path):
    written(tmp_path / "theirs", CONFIG)
    params, _ = salimans_ho.read_checkpoint(tmp_path / "theirs", CONFIG, shapes(CONFIG))
    salimans_ho.write_checkpoint(tmp_path / "ours", CONFIG, params)
    theirs, ours = (
        flax.serialization.msgpack_restore((tmp_path / name).read_bytes())["ema_params"] for name in ("theirs", "ours")
    )
    assert jax.tree.structure(theirs) == jax.tree.structure(ours)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape and (a == b).all(), theirs, ours))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda state: {"ema_params": without(state, "class_emb")}, "is of a network without classes"),
        (lambda state: {"step": 1}, "is no checkpoint of diffusion_distillation"),
        (lambda state: {"ema_params": {**state, "more": np.zeros(1)}}, "left over: more"),
        (lambda state: {"ema_params": without(state, "dense0")}, "missing: dense0/bias"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, spoil, says):
    path = tmp_path / "checkpoint"
    written(path, CONFIG)
    state = flax.serialization.msgpack_restore(path.read_bytes())["ema_params"]
    path.write_bytes(flax.serialization.msgpack_serialize(spoil(state)))
    with pytest.raises(UserError, match=says):
        salimans_ho.read_checkpoint(path, CONFIG, shapes(CONFIG))


@pytest.mark.parametrize("network", [None, "sd1", "inception_v3"])
def test_an_import_of_one_says_that_it_needs_none(tmp_path, network):
    path = tmp_path / "checkpoint"
    path.write_bytes(flax.serialization.to_bytes({"step": 7, "ema_params": {"a": np.ones(3)}}))
    with pytest.raises(UserError, match=f"need no import: --config.teacher.checkpoint={path} reads them") as error:
        import_weights(network, str(path), None)
    assert "\n" not in str(error.value)


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


def test_norms_of_older_versions_of_flax_are_read(tmp_path):
    path = tmp_path / "checkpoint"
    written(path, CONFIG)
    new, _ = salimans_ho.read_checkpoint(path, CONFIG, shapes(CONFIG))
    state = flatten_dict(flax.serialization.msgpack_restore(path.read_bytes())["ema_params"])
    state = {key: value.reshape(1, 1, 1, -1) if "norm" in key[-2] else value for key, value in state.items()}
    assert sum(value.shape[:3] == (1, 1, 1) for value in state.values()) >= 20
    path.write_bytes(flax.serialization.msgpack_serialize({"ema_params": unflatten_dict(state)}))
    old, _ = salimans_ho.read_checkpoint(path, CONFIG, shapes(CONFIG))
    assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape and (a == b).all(), new, old))


def test_other_heads_other_files_and_students_are_refused(tmp_path):
    path = tmp_path / "checkpoint"
    written(path, CONFIG)
    other = dataclasses.replace(CONFIG, head_dim=32)
    with pytest.raises(UserError, match="of another shape: .*down_1.attn_0/k/bias"):
        salimans_ho.read_checkpoint(path, other, shapes(other))
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="is no checkpoint of diffusion_distillation"):
        salimans_ho.read_checkpoint(path, CONFIG, shapes(CONFIG))
    with pytest.raises(UserError, match="no place for the w input"):
        salimans_ho.write_checkpoint(path, dataclasses.replace(CONFIG, w_conditioned=True), {})


def test_one_is_the_teacher_of_a_run(tmp_path):
    network = {"model.channels": 32, "model.norm_groups": 32, "evaluate.w": (0.0,), "stage1.w_max": 0.0}
    values = tiny_config(**network)
    experiment = from_config(values)
    params = jax.device_get(make_stages(experiment)[0].init(KEYS[3]))
    module = make_module(experiment, False, experiment.parameterisation)
    path = str(tmp_path / "theirs")
    salimans_ho.write_checkpoint(path, module.config, params)
    values["teacher"]["checkpoint"] = path
    run = open_run(values, tmp_path / "run")
    assert run.finished(run.stages[0])
    same = functools.partial(jax.tree.map, lambda a, b: (np.asarray(a) == b).all())
    assert jax.tree.all(same(run.params_of(run.stages[0]), params))
    state = flax.serialization.msgpack_restore((tmp_path / "theirs").read_bytes())
    student = flax.serialization.msgpack_serialize(state | {"num_sample_steps": 8})
    (tmp_path / "student").write_bytes(student)
    for changes, says in (
        ({"stage1.checkpoint": path}, "config.stage1.checkpoint: .* is a file"),
        ({"teacher.checkpoint": path + "_"}, "config.teacher.checkpoint: .*theirs_: no such checkpoint"),
        ({"teacher.checkpoint": str(tmp_path / "student")}, "is a student of 8 steps"),
        ({"stage1.w_max": 1.0}, "config.stage1.w_max=0"),
        ({"model.norm_groups": 16}, "norms of 32 groups"),
        ({"schedule.name": "rectified_flow"}, "the cosine schedule"),
    ):
        config = tiny_config(**{**network, "teacher.checkpoint": path, **changes})
        with pytest.raises(UserError, match=says):
            open_run(config, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    config = tiny_config(**{**network, "teacher.checkpoint": str(tmp_path / "student"), "stage2.teacher_steps": 8})
    assert open_run(config, tmp_path / "student_run").experiment.stage2.teacher_steps == 8
