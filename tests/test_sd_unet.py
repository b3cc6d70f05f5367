"""The latent U-Net: its published sizes, its start, where its inputs enter, its clock, what options must not change."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from guided_distill import sharding
from guided_distill.diffusion import DiscreteBetas
from guided_distill.models import make_model_fn
from guided_distill.models.embeddings import sinusoid
from guided_distill.models.sd_unet import SD_UNETS, SDUNet, SDUNetConfig, time_sinusoid, timestep

TINY = SDUNetConfig(
    channels=8,
    multipliers=(1,),
    num_blocks=1,
    attention=(False,),
    heads=(2,),
    context_dim=6,
    norm_groups=4,
    out_channels=2,
)
PAINTER = dataclasses.replace(TINY, extra_channels=3, multipliers=(1, 2), attention=(True, False), heads=(2, 4))
CLASSES = dataclasses.replace(TINY, num_classes=3)
Z = jax.random.normal(jax.random.key(1), (3, 4, 6, 2))
LOGSNR = jnp.array([4.0, 0.0, -4.0])
TEXT = {"text": jax.random.normal(jax.random.key(2), (3, 5, 6))}
W = {"w": jnp.array([0.0, 1.0, 4.0])}
PICTURE = {"mask": (Z[..., :1] > 0).astype(jnp.float32), "masked": Z[::-1] * 0.5}
LABEL = {"label": jnp.array([0, 3, 1])}
KEY = jax.random.key(0, impl="unsafe_rbg")  # initialisers compile sooner than with the default


def of_w(config):
    return dataclasses.replace(config, w_conditioned=True)


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def abstract(config, z=Z, cond=None):
    """The structure of the parameters."""
    cond = TEXT | W if cond is None else cond
    rest = {name: value for name, value in cond.items() if name not in ("label", "w")}
    init = functools.partial(SDUNet(config).init, jax.random.key(0), z, LOGSNR, cond.get("label"), cond.get("w"))
    return jax.eval_shape(functools.partial(init, **rest))["params"]


def trained(tree):
    """Parameters as after training: none of the zeros that new networks start from."""
    rng = np.random.default_rng(0)
    fan_in = lambda leaf: np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else len(leaf)  # noqa: E731
    return jax.tree.map(lambda leaf: (rng.normal(size=leaf.shape) / fan_in(leaf) ** 0.5).astype(leaf.dtype), tree)


@functools.cache
def compiled(config):
    return jax.jit(make_model_fn(SDUNet(config)))


# Sizes


@pytest.mark.parametrize(
    ("name", "count"),
    [("sd1", 859_520_964), ("sd2", 865_910_724), ("sd1_inpainting", 859_535_364), ("ldm_imagenet256", 400_920_579)],
)
def test_published_number_of_parameters(name, count):
    config = SD_UNETS[name]
    z = jnp.zeros((3, 64, 64, config.out_channels))
    cond = LABEL if config.num_classes else {"text": jnp.zeros((3, 77, config.context_dim))}
    if name == "sd1_inpainting":
        cond |= {"mask": z[..., :1], "masked": z}
    params = abstract(config, z, cond)
    assert size(params) - size(params.get("classes", {})) == count
    if config.num_classes:
        assert size(params["classes"]) == 1001 * 512
    wider = abstract(of_w(config), z, cond | W)
    assert size(wider) - size(params) == config.channels * 256


# The start


def test_a_student_at_the_start_is_its_teacher_to_the_bit_for_any_w():
    teacher = trained(abstract(TINY))
    fresh = jax.jit(SDUNet(of_w(TINY)).init)(KEY, Z, LOGSNR, None, W["w"], **TEXT)["params"]
    flat_teacher, flat_fresh = (traverse_util.flatten_dict(tree, sep="/") for tree in (teacher, fresh))
    assert flat_fresh.keys() - flat_teacher.keys() == {"embedding/w/kernel"}
    student = traverse_util.unflatten_dict(flat_fresh | flat_teacher, sep="/")
    expected = compiled(TINY)(teacher, Z, LOGSNR, TEXT)
    assert float(jnp.abs(expected).max()) > 0.1
    for w in (W["w"], jnp.full(3, 13.3)):
        np.testing.assert_array_equal(compiled(of_w(TINY))(student, Z, LOGSNR, TEXT | {"w": w}), expected)
    moved = student | {"embedding": student["embedding"] | {"w": {"kernel": jnp.full((256, 8), 0.01)}}}
    assert not np.allclose(compiled(of_w(TINY))(moved, Z, LOGSNR, TEXT | W), expected, atol=1e-3)


def test_a_new_network_says_zero():
    params = jax.jit(SDUNet(TINY).init)(KEY, Z, LOGSNR, None, None, **TEXT)["params"]
    np.testing.assert_array_equal(compiled(TINY)(params, Z, LOGSNR, TEXT), np.zeros_like(Z))


# Where things enter


@pytest.mark.parametrize(
    "config, cond", [(PAINTER, TEXT | PICTURE), (CLASSES, LABEL)], ids=["text and picture", "classes"]
)
def test_output_changes_with_every_input_of_its_own_example_only(config, cond):
    config, cond = of_w(config), cond | W
    params = trained(abstract(config, cond=cond))
    before = np.asarray(compiled(config)(params, Z, LOGSNR, cond))
    others = {name: value.at[1].set(value[2]) for name, value in cond.items()}
    for name in ("z", "logsnr", *cond):
        z = Z.at[1, 0, 0, 0].add(1.0) if name == "z" else Z
        logsnr = LOGSNR.at[1].add(0.7) if name == "logsnr" else LOGSNR
        changed = cond | ({name: others[name]} if name in cond else {})
        after = np.asarray(compiled(config)(params, z, logsnr, changed))
        np.testing.assert_array_equal(after[::2], before[::2], err_msg=name)
        assert np.abs(after[1] - before[1]).max() > 1e-3, name


def test_the_null_label_has_a_row_of_its_own():
    params = trained(abstract(CLASSES, cond=LABEL))
    assert params["classes"]["embedding"].shape == (4, 6)
    moved = params | {"classes": {"embedding": params["classes"]["embedding"].copy()}}
    moved["classes"]["embedding"][3] += 1.0
    before, after = (np.asarray(compiled(CLASSES)(tree, Z, LOGSNR, LABEL)) for tree in (params, moved))
    np.testing.assert_array_equal(after[::2], before[::2])
    assert np.abs(after[1] - before[1]).max() > 1e-3


def test_cross_attention_takes_tokens_in_any_order_and_repeated_ones_as_one():
    """What sets words apart is in their vectors: the network adds no positions of its own."""
    params, order = trained(abstract(TINY)), np.array([3, 0, 4, 2, 1])
    expected = compiled(TINY)(params, Z, LOGSNR, TEXT)
    for text in (TEXT["text"][:, order], jnp.repeat(TEXT["text"], 2, axis=1)):
        np.testing.assert_allclose(compiled(TINY)(params, Z, LOGSNR, {"text": text}), expected, rtol=1e-4, atol=1e-5)


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="bring 0 channels; the U-Net takes 3 besides z"):
        abstract(PAINTER)
    with pytest.raises(ValueError, match=r"cond\['text'\] is missing"):
        abstract(TINY, cond=LABEL)
    with pytest.raises(ValueError, match="5 x 6: its sides must be multiples of 2"):
        abstract(dataclasses.replace(PAINTER, extra_channels=0), Z[:, [0, 1, 2, 3, 3]])


# The clock


def test_time_is_that_of_the_schedule_of_discrete_betas():
    schedule = DiscreteBetas()
    index = np.array([0.0, 1.0, 61.5, 499.0, 749.25, 999.0])
    logsnr = schedule.logsnr((index + 1) / 1000).astype(np.float32)
    got = timestep(jnp.asarray(logsnr), schedule.beta_start, schedule.beta_end, schedule.num_betas)
    np.testing.assert_allclose(got, index, atol=2e-3)
    assert timestep(jnp.array([20.0, -9.0]), 0.00085, 0.012, 1000).tolist() == [0.0, 999.0]


def test_the_two_sinusoids_are_those_of_stock_pipelines():
    """cos || sin of time over dim / 2 frequencies, sin || cos of 1000 w over one less: written down by hand."""
    time, w = time_sinusoid(jnp.array([999.0]), 320)[0], sinusoid(jnp.array([2000.0]), 256)[0]
    last = np.exp(-np.log(1e4) * 159 / 160)
    expected = [np.cos(999.0), np.sin(999.0), np.cos(999.0 * last), np.sin(999.0 * last)]
    np.testing.assert_allclose(time[jnp.array([0, 160, 159, 319])], expected, atol=1e-4)
    expected = [0.930040, np.cos(2000.0), np.sin(0.2), np.cos(0.2)]
    np.testing.assert_allclose(w[jnp.array([0, 128, 127, 255])], expected, atol=1e-4)


# Options that must not change what comes out


def test_remat_changes_neither_output_nor_gradient():
    params = trained(abstract(TINY))

    def loss(config, params):
        return (make_model_fn(SDUNet(config))(params, Z, LOGSNR, TEXT) ** 2).sum()

    configs = TINY, dataclasses.replace(TINY, remat=True)
    (a, grad_a), (b, grad_b) = (jax.jit(jax.value_and_grad(functools.partial(loss, c)))(params) for c in configs)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), grad_a, grad_b)


def test_bfloat16_is_near_and_comes_out_as_float32():
    params, half = trained(abstract(TINY)), dataclasses.replace(TINY, dtype="bfloat16")
    expected, got = (compiled(config)(params, Z, LOGSNR, TEXT) for config in (TINY, half))
    assert got.dtype == jnp.float32
    error = float(jnp.abs(got - expected).max() / jnp.abs(expected).max())
    assert 0.0 < error < 0.05
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract(half))} == {jnp.dtype("float32")}


def test_split_weights_say_the_same(monkeypatch):
    config = of_w(CLASSES)
    params, cond = trained(abstract(config, cond=LABEL | W)), LABEL | W
    expected = compiled(config)(params, Z, LOGSNR, cond)
    monkeypatch.setattr(sharding, "SMALL", 64)  # so that those of a small network are split too
    mesh = sharding.make_mesh(fsdp=8)
    placed = sharding.place(mesh, params)
    split = [leaf for leaf in jax.tree.leaves(placed) if not leaf.sharding.is_fully_replicated]
    assert sum(leaf.size for leaf in split) > 0.9 * size(params)
    run = jax.jit(lambda params, *rest: make_model_fn(SDUNet(config))(sharding.gathered(mesh, params), *rest))
    # As many examples as there are devices, each with its own.
    arguments = jax.tree.map(lambda rows: jnp.resize(rows, (8, *rows.shape[1:])), (Z, LOGSNR, cond))
    found = run(placed, *sharding.spread(mesh, arguments))
    np.testing.assert_allclose(found, jnp.resize(expected, found.shape), rtol=1e-4, atol=1e-5)


def test_linear_projections_are_the_pointwise_convolutions():
    linear = dataclasses.replace(TINY, linear_projection=True)
    params = trained(abstract(TINY))
    flat = traverse_util.flatten_dict(params, sep="/")
    flat |= {path: leaf[0, 0] for path, leaf in flat.items() if "project_" in path and path.endswith("kernel")}
    assert {path: leaf.shape for path, leaf in flat.items()} == {
        path: leaf.shape for path, leaf in traverse_util.flatten_dict(abstract(linear), sep="/").items()
    }
    got = compiled(linear)(traverse_util.unflatten_dict(flat, sep="/"), Z, LOGSNR, TEXT)
    np.testing.assert_allclose(got, compiled(TINY)(params, Z, LOGSNR, TEXT), rtol=1e-4, atol=1e-5)
