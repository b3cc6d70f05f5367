"""CLIP (arXiv 2103.00020) in Flax Linen: the text encoders of Stable Diffusion, and the image tower of the CLIP score.

Counted in `tests/test_clip.py`: 123,060,480 parameters for the text encoder of Stable Diffusion 1 (ViT-L/14) and
340,387,840 for that of 2 (OpenCLIP's ViT-H/14 without its last layer).
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from guided_distill.models.attention import Attention

_EPSILON = 1e-5  # of every LayerNorm
ACTIVATIONS = {"quick_gelu": lambda x: x * nn.sigmoid(1.702 * x), "gelu": lambda x: nn.gelu(x, approximate=False)}


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Hyper-parameters of a text encoder; the defaults are Stable Diffusion 1's, TEXT_ENCODERS has others."""

    vocabulary: int = 49_408
    positions: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    activation: str = "quick_gelu"  # a key of ACTIVATIONS
    projection: int = 0  # width of the space shared with images; 0: there is none
    dtype: str = "float32"  # of the computation; parameters stay float32


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Hyper-parameters of an image tower; the defaults are ViT-L/14."""

    side: int = 224
    patch: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    activation: str = "quick_gelu"  # a key of ACTIVATIONS
    projection: int = 768
    dtype: str = "float32"


TEXT_ENCODERS = {
    "sd1": TextConfig(),
    # OpenCLIP's ViT-H/14 has 24 layers, of which the last is not used.
    "sd2": TextConfig(width=1024, layers=23, heads=16, mlp=4096, activation="gelu"),
}
VISION_ENCODERS = {
    "vit_l14": VisionConfig(),
    "vit_b32": VisionConfig(patch=32, width=768, layers=12, heads=12, mlp=3072, projection=512),
}


def _norm(dtype, name):
    return nn.LayerNorm(epsilon=_EPSILON, dtype=jnp.dtype(dtype), name=name)


class Layer(nn.Module):
    """Self-attention, then an MLP, each after LayerNorm with a residual: tokens x [B, T, C] -> the same."""

    config: TextConfig | VisionConfig
    causal: bool

    @nn.compact
    def __call__(self, x):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        h = _norm(dtype, "norm1")(x)
        x = x + Attention(config.heads, dtype, bias=True, causal=self.causal, name="attention")(h, h)
        h = nn.Dense(config.mlp, dtype=dtype, name="mlp1")(_norm(dtype, "norm2")(x))
        return x + nn.Dense(x.shape[-1], dtype=dtype, name="mlp2")(ACTIVATIONS[config.activation](h))


class TextEncoder(nn.Module):
    """Tokens i32 [B, L] -> (states [B, L, width], embedding [B, projection or width]), float32.

    States are what a U-Net attends to; the embedding is the state at the first end of text, projected where there is a
    projection. End of text is the last word of the vocabulary.
    """

    config: TextConfig

    @nn.compact
    def __call__(self, tokens):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        positions = self.param("positions", nn.initializers.normal(0.01), (config.positions, config.width))
        h = nn.Embed(config.vocabulary, config.width, dtype=dtype, name="tokens")(tokens)
        h = h + positions[None, : tokens.shape[1]].astype(dtype)
        for i in range(config.layers):
            h = Layer(config, True, name=f"layer_{i}")(h)
        states = _norm(dtype, "norm_out")(h)
        embedding = states[jnp.arange(len(tokens)), jnp.argmax(tokens, axis=-1)]
        if config.projection:
            embedding = nn.Dense(config.projection, use_bias=False, dtype=dtype, name="project")(embedding)
        return states.astype(jnp.float32), embedding.astype(jnp.float32)


class VisionEncoder(nn.Module):
    """Images [B, side, side, 3] as `clip_pixels` makes them -> embedding [B, projection], float32."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        square = (config.patch, config.patch)
        patches = nn.Conv(config.width, square, square, "VALID", use_bias=False, dtype=dtype, name="patches")
        h = patches(x.astype(dtype)).reshape(len(x), -1, config.width)
        first = self.param("first_token", nn.initializers.normal(0.01), (config.width,))
        first = jnp.broadcast_to(first.astype(dtype)[None, None], (len(x), 1, config.width))
        tokens = 1 + (config.side // config.patch) ** 2
        positions = self.param("positions", nn.initializers.normal(0.01), (tokens, config.width))
        h = _norm(dtype, "norm_in")(jnp.concatenate([first, h], axis=1) + positions[None].astype(dtype))
        for i in range(config.layers):
            h = Layer(config, False, name=f"layer_{i}")(h)
        h = _norm(dtype, "norm_out")(h[:, 0])
        return nn.Dense(config.projection, use_bias=False, dtype=dtype, name="project")(h).astype(jnp.float32)


_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of the training pictures


def clip_pixels(images, side):
    """Images [B, H, W, 3] in [-1, 1] -> what CLIP was trained on, [B, side, side, 3].

    The shorter side is resized to `side` (bicubic, antialiased), the middle is cut out, and channels are standardised.
    """
    height, width = images.shape[1:3]
    short = min(height, width)
    size = (round(height * side / short), round(width * side / short))
    x = images
    # One axis after the other: what the first overshoots is cut off before the second, as the published code does.
    for shape in ((len(images), height, size[1], 3), (len(images), *size, 3)):
        x = jnp.clip(jax.image.resize(x, shape, "cubic", antialias=True), -1.0, 1.0)
    top, left = ((length - side) // 2 for length in size)
    x = x[:, top : top + side, left : left + side] * 0.5 + 0.5
    mean, std = (jnp.asarray(value, x.dtype)[None, None, None] for value in (_MEAN, _STD))
    return (x - mean) / std


def clip_score(image_embedding, text_embedding):
    """100 max(cos, 0) of embeddings [B, D] each (arXiv 2104.08718, without its factor 2.5): [B]."""
    a, b = (e / jnp.linalg.norm(e, axis=-1, keepdims=True) for e in (image_embedding, text_embedding))
    return 100.0 * jnp.maximum((a * b).sum(-1), 0.0)
