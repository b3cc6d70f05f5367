"""Pictures of samples: grids and labelled comparisons as uint8 arrays, and PNG files."""

import io
import math

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

MIN_CELL = 40  # pixels: smaller images are enlarged by a whole factor, so that 8 × 8 shows its pixels crisply
GAP = 4
MARGIN = 20
TITLE_HEIGHT = 34
HEADING_HEIGHT = 46
LABEL_GAP = 16
BACKGROUND = (255, 255, 255)
INK = (32, 32, 32)
PALE_INK = (90, 90, 90)
RULE = (214, 214, 214)


def to_uint8(x) -> np.ndarray:
    """Images in [-1, 1] as uint8 0 … 255, rounded; values outside are clipped."""
    return np.round((np.clip(np.asarray(x, np.float32), -1, 1) + 1) * 127.5).astype(np.uint8)


def image_grid(x, columns: int | None = None) -> np.ndarray:
    """Images [N,H,W,C] in [-1, 1], C = 1 or 3, row by row in one picture uint8[H',W',3]; a square by default."""
    tiles = _tiles(x)
    columns = min(columns or math.ceil(math.sqrt(len(tiles))), len(tiles))
    rows = math.ceil(len(tiles) / columns)
    height, width = tiles.shape[1:3]
    picture = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3), BACKGROUND, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = GAP + i // columns * (height + GAP), GAP + i % columns * (width + GAP)
        picture[top : top + height, left : left + width] = tile
    return picture


def comparison(groups: list[tuple[str, list[tuple[str, np.ndarray]]]], title: str) -> np.ndarray:
    """Rows of images that share their columns' noise and label, in groups, as one picture uint8[H',W',3].

    `groups` is [(heading, [(row label, images [N,H,W,C] in [-1, 1]), …]), …], C = 1 or 3. Texts are ASCII.
    """
    title_font, heading_font, font = (ImageFont.load_default(size) for size in (22, 17, 15))
    title = _drawable(title)
    strips = [(_drawable(heading), [(_drawable(label), _strip(x)) for label, x in rows]) for heading, rows in groups]
    all_rows = [row for _, rows in strips for row in rows]
    left = MARGIN + max(math.ceil(font.getlength(label)) for label, _ in all_rows) + LABEL_GAP
    right = max(
        left + max(strip.shape[1] for _, strip in all_rows),
        MARGIN + math.ceil(title_font.getlength(title)),
        *(MARGIN + math.ceil(heading_font.getlength(heading)) for heading, _ in strips),
    )
    rows_height = sum(strip.shape[0] + GAP for _, strip in all_rows)
    height = MARGIN + TITLE_HEIGHT + HEADING_HEIGHT * len(groups) + rows_height + MARGIN
    picture = Image.new("RGB", (right + MARGIN, height), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN), title, INK, title_font, anchor="lt")
    y = MARGIN + TITLE_HEIGHT
    for heading, rows in strips:
        draw.line([(MARGIN, y + 6), (right, y + 6)], RULE)
        draw.text((MARGIN, y + 28), heading, INK, heading_font, anchor="lm")
        y += HEADING_HEIGHT
        for label, strip in rows:
            draw.text((left - LABEL_GAP, y + strip.shape[0] // 2), label, PALE_INK, font, anchor="rm")
            picture.paste(Image.fromarray(strip), (left, y))
            y += strip.shape[0] + GAP
    return np.asarray(picture)


def png_bytes(picture: np.ndarray) -> bytes:
    """A picture uint8[H,W,3] or uint8[H,W,1] as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(buffer, "PNG")
    return buffer.getvalue()


def save_png(path: epath.PathLike, picture: np.ndarray) -> None:
    """Writes a picture as a PNG file, whole or not at all: no reader finds half of one under its name."""
    path = epath.Path(path)
    temporary = path.parent / (path.name + ".tmp")
    temporary.write_bytes(png_bytes(picture))
    temporary.replace(path)


def _tiles(x) -> np.ndarray:
    """uint8[N,H',W',3] from images in [-1, 1], each pixel repeated so that a tile is at least MIN_CELL high."""
    tiles = to_uint8(x)
    if tiles.shape[-1] == 1:
        tiles = np.repeat(tiles, 3, axis=-1)
    factor = math.ceil(MIN_CELL / tiles.shape[1])
    return tiles.repeat(factor, axis=1).repeat(factor, axis=2)


def _strip(x) -> np.ndarray:
    """The images side by side, uint8[H',W',3]."""
    tiles = _tiles(x)
    height, width = tiles.shape[1:3]
    strip = np.full((height, len(tiles) * (width + GAP) - GAP, 3), BACKGROUND, np.uint8)
    for i, tile in enumerate(tiles):
        strip[:, i * (width + GAP) : i * (width + GAP) + width] = tile
    return strip


def _drawable(text: str) -> str:
    """Pillow's own font draws anything but ASCII as an empty box."""
    return text.replace("×", "x").encode("ascii", "replace").decode()
