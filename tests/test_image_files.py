"""Samples of other programs, read from folders and npz files."""

import numpy as np
import pytest
from PIL import Image

from guided_distill.errors import UserError
from guided_distill.evaluation.image_files import open_samples

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3)).astype(np.uint8)
LABELS = np.array([0, 1, 1, 0, 1, 0, 0])


def save_pictures(folder, names):
    for name, image in zip(names, IMAGES, strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)


def read_all(path, size):
    index, x, label = zip(*open_samples(path).batches(size), strict=True)
    return np.concatenate(index), np.concatenate(x), None if label[0] is None else np.concatenate(label)


@pytest.mark.parametrize("size", [1, 3, 7, 100])
@pytest.mark.parametrize("keys", [("arr_0", "arr_1"), ("x", "label")])
def test_an_npz_and_a_folder_hold_the_same_images_in_batches_of_any_size(tmp_path, size, keys):
    np.savez(tmp_path / "s.npz", **dict(zip(keys, (IMAGES, LABELS), strict=True)))
    save_pictures(tmp_path / "pictures", [f"{k:03d}.png" for k in range(7)])
    want = IMAGES.astype(np.float32) / 127.5 - 1.0
    index, x, label = read_all(tmp_path / "s.npz", size)
    np.testing.assert_array_equal(x, want)
    np.testing.assert_array_equal(label, LABELS)
    np.testing.assert_array_equal(index, np.arange(7))
    index, x, label = read_all(tmp_path / "pictures", size)
    np.testing.assert_array_equal(x, want)
    assert label is None


def test_floats_are_taken_as_they_are_and_folders_named_by_numbers_are_classes(tmp_path):
    x = np.linspace(-1, 1, 2 * 4 * 4).reshape(2, 4, 4, 1).astype(np.float32)
    np.savez(tmp_path / "s.npz", x=x)
    np.testing.assert_array_equal(read_all(tmp_path / "s.npz", 2)[1], x)
    save_pictures(tmp_path / "p", ["0/a.png", "0/b.png", "3/a.png"])
    np.testing.assert_array_equal(read_all(tmp_path / "p", 2)[2], [0, 0, 3])
    save_pictures(tmp_path / "7", ["a.png", "b.png"])
    assert read_all(tmp_path / "7", 2)[2] is None


def _empty(path):
    path.mkdir()


def _no_pictures(path):
    path.mkdir()
    (path / "notes.txt").write_text("x")


def _torn(path):
    save_pictures(path, ["a.png", "b.png"])
    (path / "b.png").write_bytes((path / "a.png").read_bytes()[:60])


def _no_picture_inside(path):
    path.mkdir()
    (path / "a.png").write_text("not a picture")


def _two_shapes(path):
    save_pictures(path, ["a.png"])
    Image.fromarray(IMAGES[0, :3]).save(path / "b.png")


def _of_mode(path, mode):
    path.mkdir()
    Image.new(mode, (4, 4)).save(path / "a.png")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "no such folder"),
        (_empty, "holds no picture"),
        (_no_pictures, "holds no picture"),
        (_torn, "b.png cannot be read"),
        (_no_picture_inside, "a.png cannot be read"),
        (_two_shapes, "b.png is"),
        (lambda path: _of_mode(path, "I;16"), "a.png is of mode I;16"),
        (lambda path: _of_mode(path, "RGBA"), "a.png is of mode RGBA"),
    ],
)
def test_a_folder_that_is_wrong_is_named(tmp_path, make, says):
    make(tmp_path / "p")
    with pytest.raises(UserError, match=says):
        read_all(tmp_path / "p", 4)


def _array_alone(path):
    np.save(path.with_suffix(".npy"), IMAGES)
    path.with_suffix(".npy").rename(path)


def _write(content):
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (_write(b"no zip"), "cannot be read"),
        (lambda path: np.savez(path, y=IMAGES), "x or arr_0 is needed"),
        (lambda path: np.savez(path, x=IMAGES[0]), r"\[N, H, W, C\]"),
        (lambda path: np.savez(path, x=IMAGES[:0]), r"\[N, H, W, C\]"),
        (lambda path: np.savez(path, x=IMAGES, label=LABELS[:3]), "labels int64 of shape"),
        (lambda path: np.savez(path, x=IMAGES.astype(np.float32)), "save uint8"),
        (lambda path: np.savez(path, x=np.full((2, 3, 3, 1), np.nan)), "save uint8"),
        (lambda path: np.savez(path, x=np.array([{"a": 1}], object)), "cannot be read"),
        (lambda path: np.savez(path, x=IMAGES / np.float32(255)), r"lies in \[0, 1\], and floats are taken as of"),
        (lambda path: np.savez(path, x=IMAGES, label=LABELS.astype(str)), "labels <U"),
        (lambda path: np.savez(path, x=IMAGES.astype(str)), "not all numbers"),
        (_write(b""), "cannot be read"),
        (_array_alone, "cannot be read"),
    ],
)
def test_an_npz_that_is_wrong_is_named(tmp_path, write, says):
    write(tmp_path / "s.npz")
    with pytest.raises(UserError, match=says):
        open_samples(tmp_path / "s.npz")
