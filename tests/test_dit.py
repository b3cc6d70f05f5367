"""The diffusion transformer: its published sizes, its start, where its inputs enter, what options must not change."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from guided_distill.models import BACKBONES, make_model_fn
from guided_distill.models.dit import Block, DiT, DiTConfig, patchify, position_table, unpatchify

# (hidden, depth, heads) of arXiv 2212.09748, table 1.
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}

TINY = DiTConfig(hidden=16, depth=1, heads=2, num_classes=3, out_channels=2)
STUDENT = dataclasses.replace(TINY, w_conditioned=True)
Z = jax.random.normal(jax.random.key(1), (3, 4, 6, 2))
LOGSNR = jnp.array([4.0, 0.0, -6.0])
TOKENS = np.random.default_rng(2).normal(size=(3, 6, 16)).astype(np.float32)
EMB = TOKENS[:, 0]
COND = {"label": jnp.array([0, 2, 1]), "w": jnp.array([0.0, 1.0, 4.0])}


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def abstract(config, z=Z):
    """The structure of the parameters."""
    arguments = jax.random.key(0), z, LOGSNR, COND["label"], COND["w"]
    return jax.eval_shape(DiT(config).init, *arguments)["params"]


@functools.cache
def initial(config):
    return jax.jit(DiT(config).init)(jax.random.key(0), Z, LOGSNR, COND["label"], COND["w"])["params"]


def trained(tree):
    """Parameters as after training: none of the zeros that new networks start from, and attention not saturated."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: (rng.normal(size=leaf.shape) / len(leaf) ** 0.5).astype(leaf.dtype), tree)


@functools.cache
def compiled(config):
    return jax.jit(make_model_fn(DiT(config)))


def apply(config, params, *, z=Z, cond=COND):
    return compiled(config)(params, z, LOGSNR, cond)


_BLOCK = jax.jit(Block(TINY).apply)


def block(params, tokens):
    """One Block, conditioned on some vector."""
    return np.asarray(_BLOCK({"params": params}, tokens, EMB))


# Size


def weights(hidden, depth, *, patch=2, channels=4, out_channels=8, num_classes=1000):
    """The number of weights from the architecture alone: a Dense from m to n has (m + 1) n."""
    embeddings = (patch**2 * channels + 1) * hidden + (256 + 1) * hidden + (hidden + 1) * hidden
    labels = (num_classes + 1) * hidden  # a table whose last row stands for no label
    attention = (hidden + 1) * 3 * hidden + (hidden + 1) * hidden
    mlp = (hidden + 1) * 4 * hidden + (4 * hidden + 1) * hidden
    block = (hidden + 1) * 6 * hidden + attention + mlp
    last = (hidden + 1) * 2 * hidden + (hidden + 1) * patch**2 * out_channels
    return embeddings + labels + depth * block + last


@pytest.mark.parametrize(
    ("name", "published", "count", "with_table"),
    [
        ("S", "33M", 32_865_056, 32_963_360),
        ("B", "130M", 130_315_808, 130_512_416),
        ("L", "458M", 457_840_672, 458_102_816),
        ("XL", "675M", 674_834_720, 675_129_632),
    ],
)
def test_published_number_of_parameters(name, published, count, with_table):
    """On latents of 256 pixels with learnt variances; the published code's own count holds its fixed position table."""
    hidden, depth, heads = SIZES[name]
    config = DiTConfig(hidden=hidden, depth=depth, heads=heads, out_channels=8)
    table = jax.eval_shape(lambda: position_table(16, 16, hidden))
    assert size(abstract(config, jnp.zeros((3, 32, 32, 4)))) == count == weights(hidden, depth)
    assert count + table.size == with_table
    assert f"{count / 1e6:.0f}M" == published


def test_the_defaults_are_the_smallest_published_size():
    assert (DiTConfig().hidden, DiTConfig().depth, DiTConfig().heads, DiTConfig().patch) == (*SIZES["S"], 2)
    assert BACKBONES["dit"] == (DiT, DiTConfig)


def test_the_branch_of_w_adds_its_two_layers_and_nothing_else():
    assert size(abstract(STUDENT)) - size(abstract(TINY)) == (256 + 1) * 16 + (16 + 1) * 16


@pytest.mark.parametrize("ratio, inner", [(4.0, 64), (2.7, 43)])
def test_the_mlp_is_as_wide_as_its_ratio_says(ratio, inner):
    assert abstract(dataclasses.replace(TINY, mlp_ratio=ratio))["block_0"]["mlp1"]["kernel"].shape == (16, inner)


# The start


def test_exactly_modulations_and_the_last_layer_of_each_branch_start_at_zero():
    kernels = {path: leaf for path, leaf in flat(initial(STUDENT)).items() if path.endswith("kernel")}
    zero = {path.removesuffix("/kernel") for path, kernel in kernels.items() if not np.any(kernel)}
    assert zero == {"block_0/modulation", "embedding/w2", "modulation_out", "dense_out"}


def test_a_new_block_is_the_identity_and_a_trained_one_takes_tokens_in_any_order():
    new, order = initial(STUDENT)["block_0"], np.array([3, 0, 5, 1, 4, 2])
    np.testing.assert_array_equal(block(new, TOKENS), TOKENS)
    got = block(trained(new), TOKENS)
    assert float(np.abs(got - TOKENS).max()) > 0.1
    np.testing.assert_allclose(block(trained(new), TOKENS[:, order]), got[:, order], rtol=1e-4, atol=1e-4)


def test_student_at_initialisation_is_its_conditional_teacher_to_the_bit_for_any_w():
    teacher, fresh = trained(abstract(TINY)), flat(initial(STUDENT))
    assert {path for path in fresh if path not in flat(teacher)} == {
        f"embedding/{layer}/{leaf}" for layer in ("w1", "w2") for leaf in ("kernel", "bias")
    }
    student = traverse_util.unflatten_dict(fresh | flat(teacher), sep="/")
    expected = apply(TINY, teacher)
    assert float(jnp.abs(expected).max()) > 0.1
    for w in (COND["w"], jnp.full(3, 17.3)):
        np.testing.assert_array_equal(apply(STUDENT, student, cond=COND | {"w": w}), expected)


# Where things enter


def test_output_changes_with_every_input_of_its_own_example_only():
    params, model_fn = trained(abstract(STUDENT)), compiled(STUDENT)
    before = np.asarray(model_fn(params, Z, LOGSNR, COND))
    changed = {
        "z": model_fn(params, Z.at[1, 0, 0, 0].add(1.0), LOGSNR, COND),
        "logsnr": model_fn(params, Z, LOGSNR.at[1].add(1.0), COND),
        "label": model_fn(params, Z, LOGSNR, COND | {"label": COND["label"].at[1].set(0)}),
        "null": model_fn(params, Z, LOGSNR, COND | {"label": COND["label"].at[1].set(TINY.num_classes)}),
        "w": model_fn(params, Z, LOGSNR, COND | {"w": COND["w"].at[1].add(0.5)}),
    }
    swapped = model_fn(params, Z[::-1], LOGSNR[::-1], jax.tree.map(lambda leaf: leaf[::-1], COND))
    np.testing.assert_allclose(swapped, before[::-1], rtol=1e-4, atol=1e-5)
    for name, after in changed.items():
        np.testing.assert_array_equal(after[::2], before[::2], err_msg=name)
        # All tokens see each other: every pixel of the example moves.
        assert float(np.abs(after[1] - before[1]).max(-1).min()) > 1e-3, name


def test_the_null_label_has_a_row_of_its_own_in_the_table():
    params = trained(abstract(TINY))
    label = params["embedding"]["label"]
    assert size(label) == (TINY.num_classes + 1) * TINY.hidden
    null = COND | {"label": jnp.full(3, TINY.num_classes)}
    expected = apply(TINY, params, cond=null)
    moved = params | {"embedding": params["embedding"] | {"label": label | {"kernel": label["kernel"] + 1.0}}}
    np.testing.assert_array_equal(apply(TINY, moved, cond=null), expected)
    assert not np.allclose(apply(TINY, moved), apply(TINY, params))


def test_a_network_without_classes_takes_no_label():
    config = dataclasses.replace(TINY, num_classes=0, out_channels=5)
    params = abstract(config)
    assert "label" not in params["embedding"]
    assert jax.eval_shape(make_model_fn(DiT(config)), params, Z, LOGSNR, {}).shape == (3, 4, 6, 5)


def test_tokens_know_where_they_are():
    """Exchanging two patches of z would else exchange the same two of the output."""
    params = trained(abstract(TINY))
    exchange = [1, 0, 2, 3, 4, 5]
    before = patchify(apply(TINY, params), 2)
    after = patchify(apply(TINY, params, z=unpatchify(patchify(Z, 2)[:, jnp.array(exchange)], 2, 3, 2)), 2)
    assert float(jnp.abs(after - before[:, jnp.array(exchange)]).max()) > 0.1


def test_each_head_compares_by_its_own_queries():
    """With the layers behind attention taken away, another query of the first head moves only what that head says."""
    params = trained(abstract(TINY)["block_0"])
    params["out"], params["mlp2"] = (
        {"kernel": np.eye(16), "bias": np.zeros(16)},
        jax.tree.map(np.zeros_like, params["mlp2"]),
    )
    before = block(params, TOKENS)
    params["qkv"]["bias"][:8] += 1.0
    moved = np.abs(block(params, TOKENS) - before).max((0, 1))
    assert (moved[:8] > 1e-3).all() and (moved[8:] == 0.0).all()


# Patches and positions


@pytest.mark.parametrize("patch", [1, 2])
def test_unpatchify_undoes_patchify(patch):
    tokens = patchify(Z, patch)
    assert tokens.shape == (3, 24 // patch**2, 2 * patch**2)
    np.testing.assert_array_equal(unpatchify(tokens, 4 // patch, 6 // patch, patch), Z)
    # The token after the first row of patches is the leftmost patch of the second row.
    np.testing.assert_array_equal(tokens[:, 6 // patch], Z[:, patch : 2 * patch, :patch].reshape(3, -1))


def test_positions_tell_column_then_row_at_falling_frequencies():
    table = np.asarray(position_table(3, 5, 8)).reshape(3, 5, 2, 2, 2)  # row, column, axis, sin or cos, frequency
    angle = np.arange(5)[:, None] * np.array([1.0, 1e-2])
    waves = np.stack([np.sin(angle), np.cos(angle)], axis=1)
    np.testing.assert_allclose(table[:, :, 0], np.broadcast_to(waves, (3, 5, 2, 2)), atol=1e-6)
    np.testing.assert_allclose(table[:, :, 1], np.broadcast_to(waves[:3, None], (3, 5, 2, 2)), atol=1e-6)


# Options


def test_bfloat16_computes_in_it_and_keeps_float32_outside():
    config = dataclasses.replace(STUDENT, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract(config))} == {jnp.dtype("float32")}
    params = trained(abstract(config))
    low, high = apply(config, params), apply(STUDENT, params)
    assert low.dtype == jnp.float32
    error = float(jnp.sqrt(jnp.mean((low - high) ** 2) / jnp.mean(high**2)))
    assert 1e-3 < error < 0.1
    program = str(jax.make_jaxpr(make_model_fn(DiT(config)))(params, Z, LOGSNR, COND))
    products = [line for line in program.splitlines() if "= dot_general" in line]
    # Attention adds up its scores in float32.
    assert sum("f32" in line.split("=")[0].replace("bf16", "") for line in products) <= TINY.depth


def test_remat_changes_neither_parameters_nor_values_nor_gradients():
    """Its gradient is the derivative of the plain network's values, along a direction that moves every parameter."""
    params, config = trained(abstract(TINY)), dataclasses.replace(TINY, remat=True)
    assert jax.tree.structure(params) == jax.tree.structure(abstract(config))

    def loss(config, params):
        out = make_model_fn(DiT(config))(params, Z, LOGSNR, COND, dropout_key=jax.random.key(3))
        return (out**2).mean(), out

    (_, out), gradient = jax.jit(jax.value_and_grad(functools.partial(loss, config), has_aux=True))(params)
    np.testing.assert_allclose(out, apply(TINY, params), rtol=1e-4, atol=1e-4)
    ahead, behind = (
        np.float64(apply(TINY, jax.tree.map(lambda leaf, g, h=h: leaf + h * np.sign(g), params, gradient)) ** 2).mean()
        for h in (1e-4, -1e-4)
    )
    expected = sum(float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(gradient))
    assert (ahead - behind) / 2e-4 == pytest.approx(expected, rel=1e-2)

    programs = (str(jax.make_jaxpr(functools.partial(loss, c))(params)) for c in (TINY, config))
    recomputed = [len(re.findall(r"= (?:remat|checkpoint)\w*\[", program)) for program in programs]
    assert recomputed == [0, TINY.depth]
