import io

import numpy as np
import pytest
from PIL import Image

from guided_distill.pictures import GAP, MIN_CELL, comparison, image_grid, png_bytes, save_png, to_uint8

RNG = np.random.default_rng(0)


def images(n, size=8, channels=1):
    return RNG.uniform(-1, 1, (n, size, size, channels)).astype(np.float32)


def test_to_uint8_maps_the_range_and_clips():
    np.testing.assert_array_equal(to_uint8(np.array([-3.0, -1.0, 0.0, 1.0, 3.0])), [0, 0, 128, 255, 255])


def test_to_uint8_undoes_the_scaling_of_the_data():
    stored = np.arange(256)
    np.testing.assert_array_equal(to_uint8(stored / 127.5 - 1), stored)


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 1), (32, 3), (64, 3)])
def test_grid_shows_each_image_in_its_place_enlarged_by_a_whole_factor(size, channels):
    x = images(5, size, channels)
    grid = image_grid(x, columns=3)
    cell = (grid.shape[1] - GAP) // 3 - GAP
    factor = cell // size
    assert cell % size == 0 and cell >= MIN_CELL and cell - size < MIN_CELL
    assert grid.shape == (2 * (cell + GAP) + GAP, 3 * (cell + GAP) + GAP, 3) and grid.dtype == np.uint8
    for i in range(5):
        top, left = GAP + i // 3 * (cell + GAP), GAP + i % 3 * (cell + GAP)
        shown = grid[top : top + cell, left : left + cell]
        expected = np.broadcast_to(to_uint8(x[i]), (size, size, 3))
        for offset in (0, factor - 1):
            np.testing.assert_array_equal(shown[offset::factor, offset::factor], expected)


def test_grid_is_a_square_by_default_and_no_wider_than_its_images():
    assert image_grid(images(9)).shape[0] == image_grid(images(9)).shape[1]
    np.testing.assert_array_equal(image_grid(x := images(2), columns=8), image_grid(x, columns=2))


def find(picture, tile):
    """Corners (row, column) at which `tile` stands in the picture."""
    height, width = tile.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(picture[..., 0], (height, width))
    return np.argwhere((windows == tile[..., 0]).all(axis=(2, 3)))


def test_comparison_aligns_columns_and_keeps_the_order_of_rows():
    x = [images(4) for _ in range(3)]
    rows = [("teacher 32x2 (64 calls)", x[0]), ("student 4 (4 calls)", x[1])]
    picture = comparison([("w = 0", rows), ("w = 1", [("student", x[2])])], "title")
    factor = MIN_CELL // 8
    tiles = [[np.kron(to_uint8(image), np.ones((factor, factor, 1), np.uint8)) for image in row] for row in x]
    at = np.array([[find(picture, tile) for tile in row] for row in tiles])
    assert at.shape == (3, 4, 1, 2)  # each image once
    tops, lefts = at[:, :, 0, 0], at[:, :, 0, 1]
    np.testing.assert_array_equal(tops, np.broadcast_to(tops[:, :1], (3, 4)))
    np.testing.assert_array_equal(lefts, np.broadcast_to(lefts[:1], (3, 4)))
    assert (np.diff(tops[:, 0]) >= MIN_CELL + GAP).all() and (np.diff(lefts[0]) == MIN_CELL + GAP).all()


@pytest.mark.parametrize("long", ["title", "heading", "label"])
def test_long_texts_are_not_cut(long):
    texts = {"title": "t", "heading": "h", "label": "l"} | {long: "a text that is wider than two small images " * 3}
    picture = comparison([(texts["heading"], [(texts["label"], images(2))])], texts["title"])
    for edge in (picture[0], picture[-1], picture[:, :15], picture[:, -15:]):
        assert (edge == 255).all()
    assert picture.shape[1] > 600


def test_texts_are_drawn():
    x = images(2)
    pictures = [comparison([(h, [(label, x)])], t) for t, h, label in ("xyz", "Xyz", "xYz", "xyZ")]
    assert len({png_bytes(picture) for picture in pictures}) == 4


def test_a_multiplication_sign_is_drawn_as_x():
    x = images(2)
    picture, plain = (comparison([(f"2{sign}2", [(f"4{sign}2", x)])], f"8{sign}8") for sign in "×x")
    np.testing.assert_array_equal(picture, plain)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_bytes_round_trip(channels):
    picture = RNG.integers(0, 256, (5, 7, channels), dtype=np.uint8)
    read = np.asarray(Image.open(io.BytesIO(png_bytes(picture)))).reshape(5, 7, channels)
    np.testing.assert_array_equal(read, picture)


def test_save_png_replaces_and_leaves_nothing_else(tmp_path):
    first, second = (RNG.integers(0, 256, (4, 4, 3), dtype=np.uint8) for _ in range(2))
    save_png(tmp_path / "a.png", first)
    save_png(str(tmp_path / "a.png"), second)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), second)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
