"""The pixel U-Net: its published size, where w, the label and attention enter, and what its options must not change."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from guided_distill import costs, diffusion
from guided_distill.models import make_model_fn
from guided_distill.models.embeddings import noise_level, sinusoid
from guided_distill.models.remat import POLICIES
from guided_distill.models.unet import UNet, UNetConfig, _depth_to_space, _downsample, _space_to_depth, upsample

CIFAR10 = UNetConfig(num_classes=0)
IMAGENET64 = UNetConfig(
    channels=192,
    emb_channels=768,
    multipliers=(1, 2, 3, 4),
    attention_resolutions=(8, 16, 32),
    head_dim=64,
    num_classes=1000,
)

TINY = UNetConfig(
    channels=8,
    emb_channels=16,
    multipliers=(1,),
    num_blocks=1,
    attention_resolutions=(),
    norm_groups=4,
    dropout=0.5,
    num_classes=3,
    out_channels=2,
)
Z = jax.random.normal(jax.random.key(1), (3, 8, 8, 2))
LOGSNR = jnp.array([4.0, 0.0, -6.0])
COND = {"label": jnp.array([0, 2, 1]), "w": jnp.array([0.0, 1.0, 4.0])}


def replace(**options):
    return dataclasses.replace(TINY, **options)


def shapes(config, side):
    image = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    vector = jax.ShapeDtypeStruct((2,), jnp.float32)
    label = jax.ShapeDtypeStruct((2,), jnp.int32)
    return jax.eval_shape(UNet(config).init, jax.random.key(0), image, vector, label, vector)["params"]


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def abstract(config):
    """The structure of the parameters."""
    arguments = jax.random.key(0), Z, LOGSNR, COND["label"], COND["w"]
    return jax.eval_shape(UNet(config).init, *arguments)["params"]


@functools.cache
def initial(config):
    return jax.jit(UNet(config).init)(jax.random.key(0), Z, LOGSNR, COND["label"], COND["w"])["params"]


def trained(config):
    """Parameters as after training: none of the zeros that new networks start from."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype), abstract(config))


@functools.cache
def compiled(config):
    return jax.jit(make_model_fn(UNet(config)))


def apply(config, params, *, cond=COND, dropout_key=None):
    return compiled(config)(params, Z, LOGSNR, cond, dropout_key=dropout_key)


def output_shape(config, cond):
    return jax.eval_shape(make_model_fn(UNet(config)), abstract(config), Z, LOGSNR, cond).shape


# Size


@pytest.mark.parametrize(
    ("config", "side", "count"),
    [
        (CIFAR10, 32, 60_004_099),
        (dataclasses.replace(CIFAR10, num_classes=10), 32, 60_015_363),
        (dataclasses.replace(CIFAR10, w_conditioned=True), 32, 60_004_099 + 1_312_768),
        (IMAGENET64, 64, 295_900_035),
        (dataclasses.replace(IMAGENET64, out_channels=6), 64, 295_905_222),
        (dataclasses.replace(IMAGENET64, w_conditioned=True), 64, 295_900_035 + 738_816),
    ],
    ids=["cifar10", "cifar10 labels", "cifar10 w", "imagenet64", "imagenet64 both", "imagenet64 w"],
)
def test_published_number_of_parameters(config, side, count):
    assert size(shapes(config, side)) == count


def test_the_defaults_are_the_published_cifar10_network():
    assert UNetConfig() == dataclasses.replace(CIFAR10, num_classes=10)


# Where things enter


@pytest.mark.parametrize("resolutions", [(), (4,), (8,), (4, 8)])
def test_attention_is_in_the_middle_and_at_the_listed_resolutions_only(resolutions):
    config = replace(multipliers=(1, 2), attention_resolutions=resolutions)
    names = {path.split("/")[0] for path in flat(abstract(config))}
    at_side = {8: {"down_0_0", "up_0_0", "up_0_1"}, 4: {"down_1_0", "up_1_0", "up_1_1"}}
    blocks = {"mid"}.union(*(at_side[side] for side in resolutions))
    assert {name for name in names if "attention" in name} == {f"{block}_attention" for block in blocks}


def test_a_patched_network_attends_at_the_sides_of_its_feature_maps():
    names = flat(abstract(replace(multipliers=(1, 2), patch=2, attention_resolutions=(2,))))
    assert any(path.startswith("down_1_0_attention") for path in names)
    assert not any(path.startswith("down_0_0_attention") for path in names)


def test_exactly_the_last_layer_of_each_branch_starts_at_zero():
    params = flat(initial(replace(w_conditioned=True)))
    kernels = {path: leaf for path, leaf in params.items() if path.endswith("kernel")}
    zero = {path for path, kernel in kernels.items() if not np.any(kernel)}
    assert zero == {path for path in kernels if path.split("/")[-2] in ("conv2", "out", "w2", "conv_out")}
    assert {"conv_out/kernel", "embedding/w2/kernel", "mid_0/conv2/kernel", "mid_attention/out/kernel"} <= zero


def test_student_at_initialisation_is_its_conditional_teacher_to_the_bit_for_any_w():
    teacher = trained(TINY)
    fresh = flat(initial(replace(w_conditioned=True)))
    assert {path for path in fresh if path not in flat(teacher)} == {
        f"embedding/{layer}/{leaf}" for layer in ("w1", "w2") for leaf in ("kernel", "bias")
    }
    student = traverse_util.unflatten_dict(fresh | flat(teacher), sep="/")
    expected = apply(TINY, teacher)
    assert float(jnp.abs(expected).max()) > 0.1
    for w in (COND["w"], jnp.full(3, 17.3)):
        got = apply(replace(w_conditioned=True), student, cond=COND | {"w": w})
        np.testing.assert_array_equal(got, expected)


def test_output_changes_with_every_input_of_its_own_example_only():
    config = replace(w_conditioned=True)
    params, model_fn = trained(config), compiled(config)
    before = np.asarray(model_fn(params, Z, LOGSNR, COND))
    changed = {
        "z": model_fn(params, Z.at[1, 0, 0, 0].add(1.0), LOGSNR, COND),
        "logsnr": model_fn(params, Z, LOGSNR.at[1].add(1.0), COND),
        "label": model_fn(params, Z, LOGSNR, COND | {"label": COND["label"].at[1].set(0)}),
        "null": model_fn(params, Z, LOGSNR, COND | {"label": COND["label"].at[1].set(TINY.num_classes)}),
        "w": model_fn(params, Z, LOGSNR, COND | {"w": COND["w"].at[1].add(0.5)}),
    }
    for name, after in changed.items():
        np.testing.assert_array_equal(after[::2], before[::2], err_msg=name)
        assert float(np.abs(after[1] - before[1]).max()) > 1e-3, name


def test_the_null_label_is_the_zero_one_hot():
    params = trained(TINY)
    without = flat(params)
    without["embedding/label/kernel"] = jnp.zeros_like(without["embedding/label/kernel"])
    null = apply(TINY, params, cond=COND | {"label": jnp.full(3, TINY.num_classes)})
    np.testing.assert_array_equal(null, apply(TINY, traverse_util.unflatten_dict(without, sep="/")))


# Options


def test_dropout_is_off_without_a_key_and_follows_its_key():
    params = trained(TINY)
    evaluated = apply(TINY, params)
    np.testing.assert_array_equal(evaluated, apply(replace(dropout=0.0), params))
    first, again, other = (apply(TINY, params, dropout_key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, evaluated) and not np.allclose(first, other)


def test_bfloat16_computes_in_it_and_keeps_float32_outside():
    config = replace(dtype="bfloat16", w_conditioned=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract(config))} == {jnp.dtype("float32")}
    params = trained(config)
    low, high = apply(config, params), apply(dataclasses.replace(config, dtype="float32"), params)
    assert low.dtype == jnp.float32
    error = float(jnp.sqrt(jnp.mean((low - high) ** 2) / jnp.mean(high**2)))
    assert 1e-3 < error < 0.1
    program = str(jax.make_jaxpr(make_model_fn(UNet(config)))(params, Z, LOGSNR, COND))
    convolutions = [line for line in program.splitlines() if "= conv_general_dilated" in line]
    assert convolutions and all("bf16" in line.split("=")[0] for line in convolutions)


@pytest.mark.parametrize("policy", POLICIES)
def test_remat_changes_neither_parameters_nor_gradients(policy):
    params = trained(TINY)
    assert jax.tree.structure(params) == jax.tree.structure(abstract(replace(remat=True, remat_policy=policy)))

    def gradient(remat):
        model_fn = make_model_fn(UNet(replace(remat=remat, remat_policy=policy)))

        def loss(params):
            return (model_fn(params, Z, LOGSNR, COND, dropout_key=jax.random.key(3)) ** 2).mean()

        return str(jax.make_jaxpr(loss)(params)), flat(jax.jit(jax.grad(loss))(params))

    (plain_program, plain), (remat_program, remat) = gradient(False), gradient(True)
    for path, leaf in plain.items():
        np.testing.assert_allclose(remat[path], leaf, rtol=1e-4, atol=1e-4, err_msg=path)
    # Each of the down, middle and up blocks, and the attention in the middle.
    recomputed = re.compile(r"= (?:remat|checkpoint)\w*\[").findall
    assert (len(recomputed(plain_program)), len(recomputed(remat_program))) == (0, 6)


def test_products_are_made_again_where_nothing_is_kept():
    """Products in the program of the gradient: of three passes, and of a fourth unless they are kept."""

    def products(**changes):
        model_fn = make_model_fn(UNet(replace(**changes)))
        loss = lambda params: (model_fn(params, Z, LOGSNR, COND) ** 2).mean()  # noqa: E731
        return costs.cost_of(jax.grad(loss), abstract(TINY)).flops

    plain = products()
    assert products(remat=True, remat_policy="products") == plain < products(remat=True)


def test_one_head_is_the_default_and_heads_split_the_channels():
    params = trained(TINY)
    whole = apply(TINY, params)
    np.testing.assert_array_equal(apply(replace(head_dim=TINY.channels), params), whole)
    assert not np.allclose(apply(replace(head_dim=4), params), whole)


@pytest.mark.parametrize("patch", [2, 4])
def test_depth_to_space_undoes_space_to_depth(patch):
    deep = _space_to_depth(Z, patch)
    assert deep.shape == (3, 8 // patch, 8 // patch, 2 * patch**2)
    np.testing.assert_array_equal(_depth_to_space(deep, patch), Z)
    corner = Z[:, patch : 2 * patch, :patch]
    np.testing.assert_array_equal(deep[:, 1, 0], corner.reshape(3, -1))


def test_upsampling_repeats_each_pixel_and_its_gradient_is_their_sum():
    repeated, pullback = jax.vjp(upsample, Z)
    np.testing.assert_array_equal(repeated, np.repeat(np.repeat(Z, 2, axis=1), 2, axis=2))
    cotangent = jax.random.normal(jax.random.key(2), repeated.shape)
    np.testing.assert_allclose(pullback(cotangent)[0], 4.0 * _downsample(cotangent), rtol=1e-5, atol=1e-6)


def test_a_patched_network_gives_images_of_the_size_it_takes():
    config = replace(multipliers=(1, 2), patch=2, out_channels=4)
    assert output_shape(config, COND) == (3, 8, 8, 4)


def test_a_network_without_classes_takes_no_label():
    config = replace(num_classes=0)
    assert not any("label" in path for path in flat(abstract(config)))
    assert output_shape(config, {}) == Z.shape


# Embeddings


def test_noise_level_is_the_time_of_the_cosine_schedule():
    t = np.linspace(0.0, 1.0, 101)
    np.testing.assert_allclose(noise_level(jnp.asarray(diffusion.Cosine().logsnr(t))), t, atol=3e-5)
    np.testing.assert_array_equal(noise_level(jnp.array([40.0, -40.0])), noise_level(jnp.array([20.0, -20.0])))


def test_sinusoid_is_sines_then_cosines_at_falling_frequencies():
    position, frequency = np.array([0.0, 3.0, 500.0]), np.exp(-np.log(1e4) * np.arange(4) / 3)
    angle = position[:, None] * frequency
    assert (frequency[0], frequency[-1]) == pytest.approx((1.0, 1e-4))
    got = sinusoid(jnp.asarray(position), 8)
    np.testing.assert_allclose(got, np.concatenate([np.sin(angle), np.cos(angle)], -1), atol=1e-4)
