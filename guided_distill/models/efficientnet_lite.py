"""EfficientNet-Lite0, an ImageNet classifier of 4.65 million parameters (arXiv 1905.11946, without squeeze-excitation).

Batch normalisation is folded: a layer here is a convolution with a bias, and interop/feature_weights.py multiplies
scale / sqrt(variance + 1e-3) into its kernel.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

SIDE = 224
FEATURES = 1280
CLASSES = 1000
# repeats, kernel, stride, expansion, features
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_PRECISION = jax.lax.Precision.HIGHEST  # features agree between kinds of devices to 1e-4 only in whole float32


class EfficientNetLite0(nn.Module):
    """f32[B,H,W,3] of whole numbers 0 ... 255, of any size -> (features f32[B,1280], logits f32[B,1000])."""

    @nn.compact
    def __call__(self, x):
        x = (resize(x) - 127.0) / 128.0
        x = nn.relu6(Conv(32, 3, 2, name="stem")(x))
        number = 0
        for repeats, kernel, stride, expansion, features in _STAGES:
            for repeat in range(repeats):
                x = Block(kernel, 1 if repeat else stride, expansion, features, name=f"block_{number}")(x)
                number += 1
        x = nn.relu6(Conv(FEATURES, 1, name="head")(x))
        features = x.mean((1, 2))
        return features, nn.Dense(CLASSES, precision=_PRECISION, name="logits")(features)


def resize(x):
    """f32[B,H,W,C] -> f32[B,224,224,C]: bicubic, low-pass where the image shrinks, as Pillow does it.

    The network was trained on crops that TensorFlow's bicubic resize had made, which aliases; samples of every size
    are measured here, and aliasing would be measured with them (arXiv 2104.11222).
    """
    batch, _, _, channels = x.shape
    return jax.image.resize(x, (batch, SIDE, SIDE, channels), "cubic")


class Conv(nn.Module):
    """Convolution with the folded batch normalisation as its bias, padded as TensorFlow pads."""

    features: int
    kernel: int
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        kernel, bias = _parameters(self, x.shape[-1])
        x = jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=_PRECISION,
        )
        return x + bias[None, None, None]


class DepthwiseConv(nn.Module):
    """The same with one filter for each channel, as a sum of shifted images: XLA's grouped convolution takes the whole
    network from 60 to 230 ms an image on one CPU core (jax 0.10.2)."""

    features: int
    kernel: int
    stride: int

    @nn.compact
    def __call__(self, x):
        kernel, bias = _parameters(self, 1)
        stride, (batch, height, width, channels) = self.stride, x.shape
        pads = jax.lax.padtype_to_pads((height, width), kernel.shape[:2], (stride, stride), "SAME")
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        down, across = (stride * (-(-side // stride) - 1) + 1 for side in (height, width))
        total = bias[None, None, None]
        for i in range(self.kernel):
            for j in range(self.kernel):
                shifted = jax.lax.slice(
                    x, (0, i, j, 0), (batch, i + down, j + across, channels), (1, stride, stride, 1)
                )
                total = total + shifted * kernel[None, None, i, j]
        return total


def _parameters(conv, channels):
    shape = (conv.kernel, conv.kernel, channels, conv.features)
    kernel = conv.param("kernel", nn.initializers.he_normal(), shape)
    return kernel, conv.param("bias", nn.initializers.zeros, (conv.features,))


class Block(nn.Module):
    """Inverted bottleneck: expand, depthwise convolution, project; plus the input where shapes allow."""

    kernel: int
    stride: int
    expansion: int
    features: int

    @nn.compact
    def __call__(self, x):
        inner = x.shape[-1] * self.expansion
        h = nn.relu6(Conv(inner, 1, name="expand")(x)) if self.expansion > 1 else x
        h = nn.relu6(DepthwiseConv(inner, self.kernel, self.stride, name="depthwise")(h))
        h = Conv(self.features, 1, name="project")(h)
        return x + h if h.shape == x.shape else h
