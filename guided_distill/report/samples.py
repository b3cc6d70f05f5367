"""Strips of samples as small pictures within the page, folded to a width that a phone shows."""

import base64
import io
import itertools
import math

import numpy as np
from PIL import Image

from guided_distill.pictures import GAP, SIGNAL_CELL

_BUDGET = 3_000_000  # bytes of all pictures of a page together, before base64 adds a third
_LARGEST = 160  # pixels: a tile is about 80 wide on the page, and screens have up to twice as many pixels
_SMALLER, _QUALITIES = (1, 2, 4), (90, 75, 55)


def data_uri(content: bytes, num_pictures: int) -> tuple[str, int, int, bool]:
    """A strip, as the bytes of its PNG, as (a data: URI, width, height, whether its pixels are to be seen as squares).

    `num_pictures` is how many share the page's weight. Raises OSError for what is not a picture.
    """
    with Image.open(io.BytesIO(content)) as opened:
        strip = np.asarray(opened.convert("RGB"))
    tiles, factor = shrunk(cut(strip))
    picture = Image.fromarray(fold(tiles), "RGBA")
    encoded = _encode(picture, _BUDGET // num_pictures)
    uri = "data:image/webp;base64," + base64.b64encode(encoded).decode()
    return uri, picture.width, picture.height, factor > 1


def cut(strip) -> np.ndarray:
    """uint8[N,h,w,3]: the tiles of a strip uint8[h,W,3] that lie GAP apart; the strip itself where none are seen."""
    height, width = strip.shape[:2]
    for tile in [height] + [SIGNAL_CELL[1]] * (height == SIGNAL_CELL[0]):
        starts = np.arange(0, width, tile + GAP)
        gaps = [strip[:, start - GAP : start] for start in starts[1:]]
        if (width + GAP) % (tile + GAP) == 0 and all((gap == 255).all() for gap in gaps):
            return np.stack([strip[:, start : start + tile] for start in starts])
    return strip[None]


def shrunk(tiles) -> tuple[np.ndarray, int]:
    """Tiles with one pixel for each square of equal ones, and the side of those squares; large tiles made smaller."""
    height, width = tiles.shape[1:3]
    for factor in range(math.gcd(height, width), 1, -1):
        if height % factor == width % factor == 0:
            small = tiles[:, ::factor, ::factor]
            if (small.repeat(factor, axis=1).repeat(factor, axis=2) == tiles).all() and small[0].size > 3:
                return small, factor
    if len(tiles) > 1 and max(height, width) > _LARGEST:
        size = (max(1, width * _LARGEST // max(height, width)), max(1, height * _LARGEST // max(height, width)))
        tiles = np.stack([np.asarray(Image.fromarray(tile).resize(size, Image.Resampling.LANCZOS)) for tile in tiles])
    return tiles, 1


def fold(tiles) -> np.ndarray:
    """Tiles in rows of nearly as many columns as rows, uint8[H,W,4], with nothing between them and after the last."""
    num, height, width = tiles.shape[:3]
    gap = max(1, width // 12)
    columns = _columns(num)
    rows = math.ceil(num / columns)
    picture = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        picture[top : top + height, left : left + width, :3] = tile
        picture[top : top + height, left : left + width, 3] = 255
    return picture


def _columns(num):
    """The fewest, from the square root on, that leave no row half empty; unless that would be far from a square."""
    least = math.ceil(math.sqrt(num))
    whole = [columns for columns in range(least, num + 1) if num % columns == 0]
    return whole[0] if whole[0] <= 1.6 * math.sqrt(num) else least


def _encode(picture, budget):
    """WebP: without loss where that is small enough, else at the best quality that is, and smaller if none is."""
    encoded = _webp(picture, lossless=True)
    for factor, quality in itertools.product(_SMALLER, _QUALITIES):
        if len(encoded) <= budget:
            break
        encoded = _webp(picture.reduce(factor), quality=quality)
    return encoded


def _webp(picture, **options):
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", **options)
    return buffer.getvalue()
