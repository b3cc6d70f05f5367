"""Masks of what is to be painted in, drawn as inpainting networks are trained with."""

import numpy as np
from PIL import Image, ImageDraw

_WHOLE = 0.25  # of the masks cover all: the network stays one of plain text to image


def draw_mask(rng: np.random.Generator, size: int) -> np.ndarray:
    """A mask u8 [size, size, 1], 1 = repaint: everything, some boxes, or strokes of a broad brush.

    The shares and the shapes follow the published recipes (arXiv 2109.07161, appendix; Stable Diffusion's inpainting
    network masks everything in a quarter of the examples). Never empty.
    """
    if rng.random() < _WHOLE:
        return np.ones((size, size, 1), np.uint8)
    image = Image.new("L", (size, size))
    draw = ImageDraw.Draw(image)
    if rng.random() < 0.5:
        _boxes(rng, draw, size)
    else:
        _strokes(rng, draw, size)
    return np.asarray(image, np.uint8)[..., None]


def _boxes(rng, draw, size):
    for _ in range(rng.integers(1, 5)):
        width, height = rng.integers(max(size // 8, 1), max(size // 2, 2), size=2)
        left, top = rng.integers(0, size - width + 1), rng.integers(0, size - height + 1)
        draw.rectangle([int(left), int(top), int(left + width - 1), int(top + height - 1)], fill=1)


def _strokes(rng, draw, size):
    for _ in range(rng.integers(1, 6)):
        at, angle = rng.uniform(0, size, 2), rng.uniform(0, 2 * np.pi)
        width = int(rng.integers(max(size // 20, 2), max(size // 6, 3)))
        for _ in range(rng.integers(1, 6)):
            angle += rng.uniform(-2.0, 2.0)
            to = np.clip(at + rng.uniform(size / 20, size / 3) * np.array([np.cos(angle), np.sin(angle)]), 0, size - 1)
            draw.line([*at, *to], fill=1, width=width)
            radius = width / 2
            draw.ellipse([*(to - radius), *(to + radius)], fill=1)  # rounds the bend
            at = to


def shrink(mask, side):
    """A mask [..., H, H, 1] at the latent's side, by the nearest pixel, as the published pipelines do."""
    at = (np.arange(side) * (mask.shape[-2] / side)).astype(int)
    return mask[..., at, :, :][..., at, :]
