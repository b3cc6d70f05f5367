import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from guided_distill.models.classifier import (
    FEATURES,
    Classifier,
    _epochs,
    _moved,
    _patched,
    accuracy,
    features_and_logits,
    train_classifier,
)


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    x, label = (data.images / 8 - 1).astype(np.float32)[..., None], data.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(x))
    return x[order], label[order]


@pytest.fixture(scope="module")
def trained(digits):
    x, label = digits
    return train_classifier(x[:1500], label[:1500], 10, seed=0, updates=200)


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3)])
def test_features_and_logits_have_their_shapes(shape):
    x = jax.ShapeDtypeStruct((5, *shape), jnp.float32)
    (features, logits), _ = jax.eval_shape(Classifier(7).init_with_output, jax.random.key(0), x)
    assert features.shape == (5, FEATURES) and logits.shape == (5, 7)


def test_held_out_digits_are_recognised(trained, digits):
    x, label = digits
    assert accuracy(trained, x[1500:], label[1500:]) >= 0.97


def test_features_are_what_the_logits_are_computed_from(trained, digits):
    features, logits = features_and_logits(trained, digits[0][:20])
    top = trained["logits"]
    np.testing.assert_allclose(features @ top["kernel"] + top["bias"][None], logits, rtol=1e-4, atol=1e-4)


def test_an_image_is_judged_alone(trained, digits):
    x = digits[0][:20]
    together = features_and_logits(trained, x)
    alone = features_and_logits(trained, x[7:8])
    for whole, one in zip(together, alone, strict=True):
        np.testing.assert_allclose(whole[7:8], one, rtol=1e-4, atol=1e-4)


def test_same_seed_same_parameters(digits):
    x, label = digits

    def train(seed):
        return train_classifier(x[:200], label[:200] % 3, 3, seed=seed, updates=4, batch_size=32)

    first, second, other = train(1), train(1), train(2)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert not np.array_equal(first["stem"]["kernel"], other["stem"]["kernel"])
    assert features_and_logits(first, x[:2])[1].shape == (2, 3)


def test_accuracy_counts_every_image_once(trained, digits):
    x, label = digits
    wrong = (label[:50] + 1) % 10
    right = accuracy(trained, x[:50], label[:50])
    assert accuracy(trained, x[:50], label[:50], batch_size=7) == right > 0.9
    mixed = accuracy(trained, np.concatenate([x[:50]] * 2), np.concatenate([label[:50], wrong]), batch_size=30)
    assert mixed == pytest.approx((right + accuracy(trained, x[:50], wrong)) / 2)


def test_too_few_images_are_refused(digits):
    x, label = digits
    with pytest.raises(ValueError, match="64 cannot be drawn from 10"):
        train_classifier(x[:10], label[:10], 10, seed=0, updates=1)


def test_every_row_once_an_epoch():
    batches = list(_epochs(12, 4, 6, seed=0))
    for epoch in (batches[:3], batches[3:]):
        np.testing.assert_array_equal(np.sort(np.concatenate(epoch)), np.arange(12))
    assert not np.array_equal(np.concatenate(batches[:3]), np.concatenate(batches[3:]))


def test_patches_hold_their_four_pixels():
    h = jnp.arange(2 * 4 * 6 * 3, dtype=jnp.float32).reshape(2, 4, 6, 3)
    patched = _patched(h)
    assert patched.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(patched[1, 1, 2], h[1, 2:4, 4:6].reshape(-1))
    assert _patched(h[:, :3, :5]).shape == (2, 2, 3, 12)


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (8, 12, 3)])
def test_moves_are_small_and_go_every_way(shape):
    height, width, channels = shape
    rows, columns = np.meshgrid(np.arange(height) - height / 2, np.arange(width) - width / 2, indexing="ij")
    blob = np.exp(-(rows**2 + columns**2) / 2).astype(np.float32)
    x = jnp.asarray(np.tile(blob[None, ..., None], (200, 1, 1, channels)))
    moved = np.asarray(_moved(x, jax.random.key(0)))
    assert moved.shape == x.shape
    np.testing.assert_array_equal(moved, moved[..., :1].repeat(channels, axis=-1))
    for axis in (rows, columns):
        at = (moved[..., 0] * axis).sum((1, 2)) / moved[..., 0].sum((1, 2))
        reach = max(1.0, height / 14)
        assert np.abs(at).max() < reach + 0.5 and at.min() < -reach / 2 and at.max() > reach / 2


def test_moves_leave_an_even_image_even():
    x = jnp.full((3, 8, 8, 1), -1.0)
    np.testing.assert_allclose(_moved(x, jax.random.key(0)), x, atol=1e-6)
