"""The MLP for samples of any shape, and what every backbone has in common: where w, the label and time enter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from guided_distill.models import BACKBONES, make_model_fn
from guided_distill.models.mlp import MLP, MLPConfig

TINY = MLPConfig(features=8, num_layers=2, emb_channels=6, num_classes=3, out_channels=2)
STUDENT = dataclasses.replace(TINY, w_conditioned=True)
Z = np.random.default_rng(1).normal(size=(3, 2)).astype(np.float32)
LOGSNR = jnp.array([4.0, 0.0, -6.0])
COND = {"label": jnp.array([0, 2, 1]), "w": jnp.array([0.0, 1.0, 4.0])}


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def abstract(module, z=Z):
    """The structure of the parameters."""
    arguments = jax.random.key(0), z, LOGSNR, COND["label"], COND["w"]
    return jax.eval_shape(module.init, *arguments)["params"]


@functools.cache
def initial(config):
    return jax.jit(MLP(config).init)(jax.random.key(0), Z, LOGSNR, COND["label"], COND["w"])["params"]


def trained(config):
    """Parameters as after training: none of the zeros that new networks start from."""
    rng, tree = np.random.default_rng(0), abstract(MLP(config))
    return jax.tree.map(lambda leaf: (rng.normal(size=leaf.shape) / len(leaf) ** 0.5).astype(leaf.dtype), tree)


@functools.cache
def compiled(config):
    return jax.jit(make_model_fn(MLP(config)))


def apply(config, params, *, z=Z, logsnr=LOGSNR, cond=COND):
    return np.asarray(compiled(config)(params, z, logsnr, cond))


# Every backbone


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_has_what_the_pipeline_sets(name):
    module, config = BACKBONES[name]
    module = module(dataclasses.replace(config(), num_classes=3, out_channels=2, w_conditioned=True))
    arguments = jax.random.key(0), jax.ShapeDtypeStruct((3, 16, 16, 1), jnp.float32), LOGSNR, COND["label"], COND["w"]
    out, variables = jax.eval_shape(module.init_with_output, *arguments)
    embedding = variables["params"]["embedding"]
    assert (out.shape, out.dtype) == ((3, 16, 16, 2), jnp.float32)
    if name == "sd_unet":  # its label is a token to attend to, not a term of the embedding
        assert embedding.keys() == {"time1", "time2", "w"}
        assert variables["params"]["classes"]["embedding"].shape[0] == 3 + 1
    else:
        assert embedding.keys() == {"time1", "time2", "label", "w1", "w2"}
        assert embedding["label"]["kernel"].shape[0] == 3


# The MLP


@pytest.mark.parametrize("shape", [(2,), (64, 1), (8, 8, 1)])
@pytest.mark.parametrize("factor", [1, 2])
def test_a_sample_of_any_shape_comes_back_in_it(shape, factor):
    module = MLP(dataclasses.replace(STUDENT, out_channels=factor * shape[-1]))
    z = jnp.zeros((3, *shape))
    out = jax.eval_shape(make_model_fn(module), abstract(module, z), z, LOGSNR, COND)
    assert out.shape == (3, *shape[:-1], factor * shape[-1])


def test_a_sample_is_read_as_one_vector():
    """The same weights take [B, 2] and, with half the channels, [B, 2, 1]."""
    params = trained(TINY)
    signal = apply(dataclasses.replace(TINY, out_channels=1), params, z=Z[..., None])
    np.testing.assert_allclose(signal[..., 0], apply(TINY, params), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_layers", [1, 4])
def test_number_of_parameters(num_layers):
    """From the architecture alone: a Dense from m to n has (m + 1) n."""
    config = MLPConfig(features=256, num_layers=num_layers, emb_channels=128, num_classes=10, out_channels=2)
    embedding = 2 * 129 * 128 + 11 * 128
    layer = 257 * 256 + 129 * 512 + 257 * 256
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract(MLP(config))))
    assert count == embedding + 3 * 256 + num_layers * layer + 257 * 2


def test_exactly_the_last_layer_of_each_branch_starts_at_zero():
    kernels = {path: leaf for path, leaf in flat(initial(STUDENT)).items() if path.endswith("kernel")}
    zero = {path.removesuffix("/kernel") for path, kernel in kernels.items() if not np.any(kernel)}
    assert zero == {"layer_0/dense2", "layer_1/dense2", "embedding/w2", "dense_out"}


def test_new_layers_hand_z_on_as_it_is():
    """With a trained last layer a new network is affine in z."""
    new, last = initial(STUDENT), trained(STUDENT)["dense_out"]
    at_0, at_1, at_2 = (apply(STUDENT, new | {"dense_out": last}, z=factor * Z) for factor in np.float32([0, 1, 2]))
    assert np.abs(at_1 - at_0).max() > 0.1
    np.testing.assert_allclose(at_2 - at_0, 2 * (at_1 - at_0), rtol=1e-4, atol=1e-5)


def test_student_at_initialisation_is_its_conditional_teacher_to_the_bit_for_any_w():
    teacher, fresh = trained(TINY), flat(initial(STUDENT))
    assert {path for path in fresh if path not in flat(teacher)} == {
        f"embedding/{layer}/{leaf}" for layer in ("w1", "w2") for leaf in ("kernel", "bias")
    }
    student = traverse_util.unflatten_dict(fresh | flat(teacher), sep="/")
    expected = apply(TINY, teacher)
    assert np.abs(expected).max() > 0.1
    for w in (COND["w"], jnp.full(3, 17.3)):
        np.testing.assert_array_equal(apply(STUDENT, student, cond=COND | {"w": w}), expected)


def test_output_changes_with_every_input_of_its_own_example_only():
    params = trained(STUDENT)
    before = apply(STUDENT, params)
    changed = {
        "z": apply(STUDENT, params, z=Z + np.array([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]], np.float32)),
        "logsnr": apply(STUDENT, params, logsnr=LOGSNR.at[1].add(1.0)),
        "label": apply(STUDENT, params, cond=COND | {"label": COND["label"].at[1].set(0)}),
        "null": apply(STUDENT, params, cond=COND | {"label": COND["label"].at[1].set(TINY.num_classes)}),
        "w": apply(STUDENT, params, cond=COND | {"w": COND["w"].at[1].add(0.5)}),
    }
    swapped = apply(STUDENT, params, z=Z[::-1], logsnr=LOGSNR[::-1], cond=jax.tree.map(lambda leaf: leaf[::-1], COND))
    np.testing.assert_allclose(swapped, before[::-1], rtol=1e-5, atol=1e-6)
    for name, after in changed.items():
        np.testing.assert_array_equal(after[::2], before[::2], err_msg=name)
        assert np.abs(after[1] - before[1]).max() > 1e-3, name


@pytest.mark.parametrize("part", ["scale", "shift"])
def test_scale_and_shift_each_carry_the_embedding(part):
    params = trained(TINY)
    for layer in ("layer_0", "layer_1"):
        for leaf in params[layer]["emb"].values():
            half = slice(0, TINY.features) if part == "shift" else slice(TINY.features, None)
            leaf[..., half] = 0.0
    assert np.abs(apply(TINY, params, logsnr=LOGSNR - 2.0) - apply(TINY, params)).max() > 1e-2


def test_bfloat16_computes_in_it_and_keeps_float32_outside():
    config = dataclasses.replace(STUDENT, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract(MLP(config)))} == {jnp.dtype("float32")}
    low, high = apply(config, trained(config)), apply(STUDENT, trained(config))
    assert low.dtype == np.float32
    assert 1e-3 < np.sqrt(np.mean((low - high) ** 2) / np.mean(high**2)) < 0.1
    program = str(jax.make_jaxpr(make_model_fn(MLP(config)))(trained(config), Z, LOGSNR, COND))
    products = [line for line in program.splitlines() if "= dot_general" in line]
    assert products and all("bf16" in line.split("=")[0] for line in products)
