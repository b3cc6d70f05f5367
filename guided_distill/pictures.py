"""Pictures of samples: grids and labelled comparisons as uint8 arrays, and PNG files.

Samples are images [N,H,W,C] in [-1, 1] with C = 1 or 3, signals [N,L,C], drawn as lines, or vectors [N,D], whose first
two numbers are points of one panel.
"""

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
LINES = ((0, 114, 178), (213, 94, 0), (0, 158, 115))  # colours that the colour-blind tell apart
SIGNAL_CELL = (56, 96)  # height and width of a signal's tile
POINTS_CELL = 220  # side of a panel of points


def to_uint8(x) -> np.ndarray:
    """Images in [-1, 1] as uint8 0 … 255, rounded; values outside are clipped."""
    return np.round((np.clip(np.asarray(x, np.float32), -1, 1) + 1) * 127.5).astype(np.uint8)


def image_grid(x, columns: int | None = None) -> np.ndarray:
    """Samples row by row in one picture uint8[H',W',3]; a square by default."""
    tiles = _tiles(x)
    columns = min(columns or math.ceil(math.sqrt(len(tiles))), len(tiles))
    rows = math.ceil(len(tiles) / columns)
    height, width = tiles.shape[1:3]
    picture = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3), BACKGROUND, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = GAP + i // columns * (height + GAP), GAP + i % columns * (width + GAP)
        picture[top : top + height, left : left + width] = tile
    return picture


def strip(x) -> np.ndarray:
    """Samples side by side in one picture uint8[H',W',3]."""
    tiles = _tiles(x)
    height, width = tiles.shape[1:3]
    picture = np.full((height, len(tiles) * (width + GAP) - GAP, 3), BACKGROUND, np.uint8)
    for i, tile in enumerate(tiles):
        picture[:, i * (width + GAP) : i * (width + GAP) + width] = tile
    return picture


def comparison(groups: list[tuple[str, list[tuple[str, np.ndarray]]]], title: str) -> np.ndarray:
    """Rows of images that share their columns' noise and label, in groups, as one picture uint8[H',W',3].

    `groups` is [(heading, [(row label, samples [N,*S]), …]), …]. Texts are ASCII.
    """
    title_font, heading_font, font = (ImageFont.load_default(size) for size in (22, 17, 15))
    title = _drawable(title)
    strips = [(_drawable(heading), [(_drawable(label), strip(x)) for label, x in rows]) for heading, rows in groups]
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
        for label, row in rows:
            draw.text((left - LABEL_GAP, y + row.shape[0] // 2), label, PALE_INK, font, anchor="rm")
            picture.paste(Image.fromarray(row), (left, y))
            y += row.shape[0] + GAP
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
    """uint8[N,H',W',3]: a tile for each image or signal, one for all points."""
    x = np.asarray(x)
    if x.ndim == 2:
        return _points(x)[None]
    if x.ndim == 3:
        return np.stack([_signal(signal) for signal in x])
    # Of latents with more channels, or two, the first ones are shown.
    tiles = to_uint8(x if x.shape[-1] in (1, 3) else x[..., : 3 if x.shape[-1] > 3 else 1])
    if tiles.shape[-1] == 1:
        tiles = np.repeat(tiles, 3, axis=-1)
    factor = math.ceil(MIN_CELL / tiles.shape[1])  # each pixel repeated so that a tile is at least MIN_CELL high
    return tiles.repeat(factor, axis=1).repeat(factor, axis=2)


def _signal(signal) -> np.ndarray:
    """A signal f32[L,C] as lines in uint8[H',W',3], from -1.2 at the bottom to 1.2 at the top."""
    height, width = SIGNAL_CELL
    tile = Image.new("RGB", (width, height), (246, 246, 246))
    draw = ImageDraw.Draw(tile)
    across = np.linspace(1, width - 2, len(signal))
    down = (1.2 - np.clip(signal, -1.2, 1.2)) / 2.4 * (height - 1)
    draw.line([(0, height // 2), (width, height // 2)], RULE)
    for channel in range(signal.shape[1]):
        colour = LINES[channel % len(LINES)]
        draw.line([(float(a), float(b)) for a, b in zip(across, down[:, channel], strict=True)], colour)
    return np.asarray(tile)


def _points(x) -> np.ndarray:
    """Points f32[N,D], by their first two numbers, within [-3, 3] in uint8[H',W',3]."""
    panel = Image.new("RGB", (POINTS_CELL, POINTS_CELL), (246, 246, 246))
    draw = ImageDraw.Draw(panel)
    middle = POINTS_CELL // 2
    draw.line([(0, middle), (POINTS_CELL, middle)], RULE)
    draw.line([(middle, 0), (middle, POINTS_CELL)], RULE)
    flat = np.pad(x[:, :2], ((0, 0), (0, 2 - min(x.shape[1], 2))))
    for across, up in (np.clip(flat, -3, 3) / 6 + 0.5) * (POINTS_CELL - 1):
        down = POINTS_CELL - 1 - up
        draw.ellipse([across - 1, down - 1, across + 1, down + 1], LINES[0])
    return np.asarray(panel)


def _drawable(text: str) -> str:
    """Pillow's own font draws anything but ASCII as an empty box."""
    return text.replace("×", "x").encode("ascii", "replace").decode()
