"""The autoencoders: their published sizes, what encode and decode promise, the codebook, tiles."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from guided_distill.models.autoencoder import AUTOENCODERS, Autoencoder, AutoencoderConfig, tiled_decode

TINY = AutoencoderConfig(channels=4, multipliers=(1, 2), num_blocks=1, latent_channels=2, norm_groups=2)
CODED = dataclasses.replace(TINY, num_codes=7, scale=1.0)
X = np.random.default_rng(0).uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def abstract(config, x=X):
    return jax.eval_shape(Autoencoder(config).init, jax.random.key(0), x)["params"]


@functools.cache
def trained(config):
    rng = np.random.default_rng(1)
    fan_in = lambda leaf: np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else len(leaf)  # noqa: E731
    return jax.tree.map(lambda x: (rng.normal(size=x.shape) / fan_in(x) ** 0.5).astype(x.dtype), abstract(config))


@functools.cache
def method(config, name):
    return jax.jit(lambda *args: Autoencoder(config).apply({"params": trained(config)}, *args, method=name))


@pytest.mark.parametrize("name, count", [("sd", 83_653_863), ("vq_f4", 55_322_782)])
def test_published_number_of_parameters(name, count):
    config = AUTOENCODERS[name]
    assert size(abstract(config, jnp.zeros((1, 64, 64, 3)))) == count
    assert config.factor == {"sd": 8, "vq_f4": 4}[name]


def test_a_latent_is_the_scaled_posterior():
    posterior = method(TINY, "moments")(X)
    assert posterior.mean.shape == posterior.logvar.shape == (2, 4, 6, 2)
    np.testing.assert_allclose(method(TINY, "encode")(X), 0.18215 * posterior.mean, rtol=1e-5)
    noise = np.random.default_rng(2).normal(size=posterior.mean.shape).astype(np.float32)
    sample = np.asarray(posterior.mean) + np.exp(np.asarray(posterior.logvar) / 2) * noise
    np.testing.assert_allclose(method(TINY, "encode")(X, noise), 0.18215 * sample, rtol=1e-4, atol=1e-6)


def test_decoding_undoes_the_scale():
    z = np.random.default_rng(3).normal(size=(2, 4, 6, 2)).astype(np.float32)
    unscaled = dataclasses.replace(TINY, scale=1.0)
    params = {"params": trained(TINY)}
    expected = jax.jit(lambda z: Autoencoder(unscaled).apply(params, z, method="decode"))(z / 0.18215)
    got = method(TINY, "decode")(z)
    assert got.shape == X.shape and got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_a_codebook_is_not_in_the_latent_but_behind_it():
    latent = method(CODED, "encode")(X)
    assert latent.shape == (2, 4, 6, 2)
    np.testing.assert_array_equal(latent, method(CODED, "moments")(X))


def test_codes_are_the_nearest_and_decoding_starts_from_them():
    table = np.asarray(trained(CODED)["codebook"]["embedding"])
    z = np.random.default_rng(3).normal(size=(2, 4, 6, 2)).astype(np.float32)
    distance = ((np.asarray(z)[..., None, :] - table) ** 2).sum(-1)
    codes = method(CODED, "codes")(z)
    np.testing.assert_array_equal(codes, distance.argmin(-1))
    assert len(np.unique(codes)) > 2
    np.testing.assert_array_equal(method(CODED, "codes")(table[np.asarray(codes)]), codes)
    decode = method(CODED, "decode")
    np.testing.assert_allclose(decode(z), decode(table[np.asarray(codes)]), rtol=1e-5, atol=1e-6)


def test_bfloat16_is_near_and_comes_out_as_float32():
    half = dataclasses.replace(TINY, dtype="bfloat16")
    z = np.random.default_rng(3).normal(size=(2, 4, 6, 2)).astype(np.float32)
    got = jax.jit(lambda z: Autoencoder(half).apply({"params": trained(TINY)}, z, method="decode"))(z)
    expected = method(TINY, "decode")(z)
    assert got.dtype == jnp.float32
    assert 0.0 < float(jnp.abs(got - expected).max() / jnp.abs(expected).max()) < 0.1


def test_remat_changes_neither_output_nor_gradient():
    z = np.random.default_rng(3).normal(size=(2, 4, 6, 2)).astype(np.float32)

    def loss(config, params):
        return (Autoencoder(config).apply({"params": params}, z, method="decode") ** 2).mean()

    configs = TINY, dataclasses.replace(TINY, remat=True)
    step = lambda config: jax.jit(jax.value_and_grad(functools.partial(loss, config)))  # noqa: E731
    (a, grad_a), (b, grad_b) = (step(config)(trained(TINY)) for config in configs)
    traced = [str(jax.make_jaxpr(functools.partial(loss, config))(trained(TINY))) for config in configs]
    assert ["prevent_cse" in program for program in traced] == [False, True]  # an argument of jax.checkpoint alone
    np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), grad_a, grad_b)


# Tiles


def enlarge(z):
    """A decoder that looks at nothing around a pixel: tiles of it must add up to the whole to rounding."""
    return jnp.repeat(jnp.repeat(jnp.tanh(z), 2, axis=1), 2, axis=2)


@pytest.mark.parametrize("shape", [(9, 9), (20, 13), (8, 30), (5, 17), (16, 16)])
def test_tiles_add_up_to_the_whole_and_are_all_of_one_shape(shape):
    seen = set()

    def decode(z):
        seen.add(z.shape)
        return enlarge(z)

    z = np.random.default_rng(0).normal(size=(2, *shape, 3)).astype(np.float32)
    got = tiled_decode(decode, z, factor=2, tile=8, overlap=3)
    np.testing.assert_allclose(got, enlarge(z), rtol=1e-5, atol=1e-6)
    assert seen == {(2, min(8, shape[0]), min(8, shape[1]), 3)}


def test_a_latent_of_one_tile_is_decoded_as_it_is():
    z = np.zeros((1, 8, 6, 3), np.float32)
    assert tiled_decode(lambda z: z.shape, z, factor=2, tile=8, overlap=3) == z.shape


def test_two_tiles_fade_into_each_other():
    """Tiles that say 0 and 1: along the row the picture rises from one to the other without a jump."""
    said = iter([0.0, 1.0])

    def decode(z):
        return np.full((1, 2 * z.shape[1], 2 * z.shape[2], 1), next(said), np.float32)

    row = tiled_decode(decode, np.zeros((1, 4, 12, 1), np.float32), factor=2, tile=8, overlap=4)[0, 3, :, 0]
    np.testing.assert_array_equal(row[:8], 0.0)
    np.testing.assert_array_equal(row[16:], 1.0)
    assert 0.0 < np.diff(row[8:16]).min() and np.diff(row[7:17]).max() < 0.2
