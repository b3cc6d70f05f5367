"""Inception-v3 of 2015-12-05, the network that FID and the Inception Score are defined with (arXiv 1512.00567).

It is the TensorFlow graph that was published then, which is not the Inception-v3 of other libraries: it resizes by
itself, its average pools leave the padding out, its last block pools by maxima, and it has 1008 logits.

Batch normalisation is folded: a layer here is a convolution with a bias, and interop/feature_weights.py multiplies
scale / sqrt(variance + 1e-3) into its kernel. Modules and layers have the names of the PyTorch ports.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SIDE = 299
FEATURES = 2048
CLASSES = 1008
_PRECISION = jax.lax.Precision.HIGHEST  # features agree between kinds of devices to 1e-4 only in whole float32


class InceptionV3(nn.Module):
    """f32[B,H,W,3] of whole numbers 0 ... 255, of any size -> {tap: f32[B,C]}.

    The taps are means over the image of what follows the first pool ("64"), the second ("192"), the last block of
    17 x 17 ("768") and the last of 8 x 8 ("2048", the features of FID), and "logits" and "logits_unbiased" [B,1008],
    with and without the bias of the last layer: the Inception Score is defined on those without.
    """

    @nn.compact
    def __call__(self, x):
        taps = {}
        x = (resize(x, SIDE) - 128.0) / 128.0
        x = Conv(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = Conv(32, (3, 3), padding="VALID", name="Conv2d_2a_3x3")(x)
        x = Conv(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = _halved(x)
        taps["64"] = x.mean((1, 2))
        x = Conv(80, (1, 1), name="Conv2d_3b_1x1")(x)
        x = Conv(192, (3, 3), padding="VALID", name="Conv2d_4a_3x3")(x)
        x = _halved(x)
        taps["192"] = x.mean((1, 2))
        for name, pool_features in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = InceptionA(pool_features, name=name)(x)
        x = InceptionB(name="Mixed_6a")(x)
        for name, features in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            x = InceptionC(features, name=name)(x)
        taps["768"] = x.mean((1, 2))
        x = InceptionD(name="Mixed_7a")(x)
        x = InceptionE(_average, name="Mixed_7b")(x)
        x = InceptionE(_largest, name="Mixed_7c")(x)
        taps["2048"] = x.mean((1, 2))
        taps["logits_unbiased"], taps["logits"] = Logits(name="fc")(taps["2048"])
        return taps


def resize(x, side):
    """f32[B,H,W,C] -> f32[B,side,side,C] by the bilinear resize of TensorFlow 1: pixel i lies at i * H / side.

    Neither corners nor centres are aligned, and nothing is averaged where the image shrinks.
    """
    low, high, share = _positions(x.shape[2], side)
    x = x[:, :, low] + (x[:, :, high] - x[:, :, low]) * share[None, None, :, None]
    low, high, share = _positions(x.shape[1], side)
    return x[:, low] + (x[:, high] - x[:, low]) * share[None, :, None, None]


def _positions(old, new):
    """For each new pixel the old ones before and after it, and its distance from the first."""
    position = np.arange(new, dtype=np.float32) * np.float32(old / new)
    low = position.astype(np.int32)
    return low, np.minimum(low + 1, old - 1), position - low


class Conv(nn.Module):
    """Convolution with the folded batch normalisation as its bias, then ReLU."""

    features: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x):
        shape = (*self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=_PRECISION,
        )
        return nn.relu(x + bias[None, None, None])


class Logits(nn.Module):
    """f32[B,2048] -> f32[B,1008] without the bias, and with it."""

    @nn.compact
    def __call__(self, features):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (FEATURES, CLASSES))
        bias = self.param("bias", nn.initializers.zeros, (CLASSES,))
        unbiased = jnp.matmul(features, kernel, precision=_PRECISION)
        return unbiased, unbiased + bias[None]


def _chain(x, name, *layers, halve=False):
    """Convolutions (features, height, width) one after another; with `halve` the last has stride 2 and no padding."""
    for number, (features, *kernel) in enumerate(layers, start=1):
        stride, padding = (2, "VALID") if halve and number == len(layers) else (1, "SAME")
        called = f"{name}_{number}" if len(layers) > 1 else name
        x = Conv(features, tuple(kernel), stride, padding, name=called)(x)
    return x


def _average(x):
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _largest(x):
    return nn.max_pool(x, (3, 3), (1, 1), "SAME")


def _halved(x):
    return nn.max_pool(x, (3, 3), (2, 2), "VALID")


def _joined(*branches):
    return jnp.concatenate(branches, axis=-1)


class InceptionA(nn.Module):
    """35 x 35: branches of 1 x 1, 5 x 5 and twice 3 x 3, and a pool."""

    pool_features: int

    @nn.compact
    def __call__(self, x):
        return _joined(
            _chain(x, "branch1x1", (64, 1, 1)),
            _chain(x, "branch5x5", (48, 1, 1), (64, 5, 5)),
            _chain(x, "branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3)),
            _chain(_average(x), "branch_pool", (self.pool_features, 1, 1)),
        )


class InceptionB(nn.Module):
    """From 35 x 35 to 17 x 17."""

    @nn.compact
    def __call__(self, x):
        return _joined(
            _chain(x, "branch3x3", (384, 3, 3), halve=True),
            _chain(x, "branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3), halve=True),
            _halved(x),
        )


class InceptionC(nn.Module):
    """17 x 17: branches of 1 x 1, 7 x 7 and twice 7 x 7 in factors of 1 x 7 and 7 x 1, and a pool."""

    features: int

    @nn.compact
    def __call__(self, x):
        inner, across, down = self.features, (1, 7), (7, 1)
        return _joined(
            _chain(x, "branch1x1", (192, 1, 1)),
            _chain(x, "branch7x7", (inner, 1, 1), (inner, *across), (192, *down)),
            _chain(
                x,
                "branch7x7dbl",
                (inner, 1, 1),
                (inner, *down),
                (inner, *across),
                (inner, *down),
                (192, *across),
            ),
            _chain(_average(x), "branch_pool", (192, 1, 1)),
        )


class InceptionD(nn.Module):
    """From 17 x 17 to 8 x 8."""

    @nn.compact
    def __call__(self, x):
        return _joined(
            _chain(x, "branch3x3", (192, 1, 1), (320, 3, 3), halve=True),
            _chain(x, "branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3), halve=True),
            _halved(x),
        )


class InceptionE(nn.Module):
    """8 x 8: branches that end in 1 x 3 and 3 x 1 side by side, and a pool."""

    pool: Callable

    @nn.compact
    def __call__(self, x):
        once = Conv(384, (1, 1), name="branch3x3_1")(x)
        twice = Conv(384, (3, 3), name="branch3x3dbl_2")(Conv(448, (1, 1), name="branch3x3dbl_1")(x))
        return _joined(
            Conv(320, (1, 1), name="branch1x1")(x),
            Conv(384, (1, 3), name="branch3x3_2a")(once),
            Conv(384, (3, 1), name="branch3x3_2b")(once),
            Conv(384, (1, 3), name="branch3x3dbl_3a")(twice),
            Conv(384, (3, 1), name="branch3x3dbl_3b")(twice),
            Conv(192, (1, 1), name="branch_pool")(self.pool(x)),
        )
