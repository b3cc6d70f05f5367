import builtins
import dataclasses
import sys
import types

import numpy as np
import pytest
import shapes

from guided_distill import prepare_data
from guided_distill.data import DataConfig, load_dataset
from guided_distill.errors import UserError
from guided_distill.prepare_data import crop_and_resize, prepare

SPLITS = shapes.draw_splits({"train": (6, 5, 4), "test": (5,)}, 24, 16)  # twice 8 pixels on the short side
SMALL = DataConfig("pictures_8", 8, 3, shapes.NUM_CLASSES)


@pytest.fixture(autouse=True)
def no_tensorflow(monkeypatch):
    """Refuses it to the package. (A None in sys.modules would make etils and TFDS take it for loaded.)"""
    importing = builtins.__import__

    def refusing(name, globals=None, *rest, **named):
        ours = (globals or {}).get("__name__", "").startswith("guided_distill")
        if name == "tensorflow" and ours and name not in sys.modules:
            raise ModuleNotFoundError("No module named 'tensorflow'", name=name)
        return importing(name, globals, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refusing)


def write_pictures(data_dir, stored="array_record"):
    shapes.write_set(data_dir, "pictures", SPLITS, shape=(None, None, 3), stored=stored)
    return dataclasses.replace(SMALL, data_dir=str(data_dir))


def records(shards):
    return [record for shard in shards for record in shard]


def assert_holds(source, wanted):
    assert len(source) == len(wanted)
    for i, (image, label) in enumerate(wanted):
        np.testing.assert_array_equal(source[i]["image"], image)
        assert source[i]["label"] == label


def block_mean(image, factor):
    h, w, c = image.shape
    return np.rint(image.reshape(h // factor, factor, w // factor, factor, c).mean((1, 3))).astype(np.uint8)


@pytest.mark.parametrize("shape", [(8, 8), (9, 13), (64, 50), (5, 6)])
@pytest.mark.parametrize("value", [0, 1, 127, 255])
def test_a_constant_image_stays_constant(shape, value):
    np.testing.assert_array_equal(crop_and_resize(np.full((*shape, 3), value, np.uint8), 8), np.full((8, 8, 3), value))


@pytest.mark.parametrize("factor", [1, 2, 3, 8])
def test_an_integer_factor_is_the_block_mean(factor):
    image = np.random.default_rng(0).integers(0, 256, (8 * factor, 8 * factor, 3), dtype=np.uint8)
    np.testing.assert_array_equal(crop_and_resize(image, 8), block_mean(image, factor))


def test_a_pixel_counts_by_the_area_that_it_shares():
    # 3 -> 2: a new pixel covers one old pixel and half of the next, in each direction.
    image = np.array([[90, 0, 0], [0, 0, 0], [0, 0, 180]], np.uint8)[..., None]
    np.testing.assert_array_equal(crop_and_resize(image, 2)[..., 0], [[40, 0], [0, 80]])
    image = np.array([[0, 90, 0], [0, 0, 0], [0, 0, 0]], np.uint8)[..., None]
    np.testing.assert_array_equal(crop_and_resize(image, 2)[..., 0], [[20, 20], [0, 0]])


@pytest.mark.parametrize(("height", "width"), [(8, 12), (8, 13), (12, 8), (13, 8), (9, 12)])
def test_the_crop_is_the_middle_of_the_long_side(height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    side = min(height, width)
    top, left = height // 2 - side // 2, width // 2 - side // 2
    np.testing.assert_array_equal(crop_and_resize(image, side), image[top : top + side, left : left + side])
    assert abs((height - side) - 2 * top) <= 1 and abs((width - side) - 2 * left) <= 1


@pytest.mark.parametrize("stored", ["array_record", "tfrecord"])
def test_a_resized_set_holds_every_record_in_order(tmp_path, stored):
    config = write_pictures(tmp_path, stored)
    prepare(config)
    dataset = load_dataset(config)
    for source, shards in ((dataset.train, SPLITS["train"]), (dataset.test, SPLITS["test"])):
        assert_holds(source, [(block_mean(image[:, 4:20], 2), label) for image, label in records(shards)])


def test_a_resized_set_can_be_grey(tmp_path):
    config = dataclasses.replace(write_pictures(tmp_path), channels=1)
    prepare(config)
    assert load_dataset(config).train[0]["image"].shape == (8, 8, 1)


def test_a_tfrecord_set_is_read_after_its_conversion_and_keeps_its_files(tmp_path):
    splits = shapes.draw_splits({"train": (6, 5), "test": (5,)}, 8, 8)
    folder = shapes.write_set(tmp_path, "pictures", splits, stored="tfrecord")
    before = {path: path.read_bytes() for path in folder.glob("*tfrecord*")}
    config = dataclasses.replace(SMALL, name="pictures", data_dir=str(tmp_path))
    prepare(config)
    dataset = load_dataset(config)
    assert_holds(dataset.train, records(splits["train"]))
    assert_holds(dataset.test, records(splits["test"]))
    assert len(before) == 3 and all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("name", ["pictures", "pictures_8"])
def test_an_interrupted_conversion_keeps_its_finished_shards_and_goes_on(tmp_path, monkeypatch, name):
    config = dataclasses.replace(write_pictures(tmp_path, "tfrecord"), name=name)
    read, done = prepare_data._read_records, []

    def power_cut(path, stored):
        if "train" in path and "00002-of" in path:
            yield next(iter(read(path, stored)))
            raise KeyboardInterrupt
        yield from read(path, stored)

    def remembers(path, stored):
        done.append(path)
        return read(path, stored)

    monkeypatch.setattr(prepare_data, "_read_records", power_cut)
    monkeypatch.setattr(prepare_data.os, "cpu_count", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    with pytest.raises(UserError, match="--mode=prepare_data"):
        load_dataset(config)
    finished = sorted((tmp_path / name / "1.0.0").glob("*array_record*of-00003"))
    assert [path.name.split("-")[2] for path in finished] == ["00000", "00001"]
    stamps = [path.stat().st_mtime_ns for path in finished]

    monkeypatch.setattr(prepare_data, "_read_records", remembers)
    prepare(config)
    assert sorted(path.rpartition("tfrecord-")[2] for path in done) == ["00000-of-00001", "00002-of-00003"]
    assert [path.stat().st_mtime_ns for path in finished] == stamps
    assert not list(tmp_path.rglob("*.incomplete"))
    if name == "pictures_8":
        wanted = [(block_mean(image[:, 4:20], 2), label) for image, label in records(SPLITS["train"])]
        assert_holds(load_dataset(config).train, wanted)


def test_a_set_that_is_there_is_left_alone(tmp_path, capsys):
    config = write_pictures(tmp_path)
    prepare(config)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    prepare(config)
    prepare(dataclasses.replace(config, name="digits"))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == files
    assert "nothing to prepare" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cifar10", "imagenet2012_8"])
def test_a_download_without_tensorflow_names_the_extra(tmp_path, name):
    with pytest.raises(UserError, match=r"TensorFlow.*guided_distill\[tfds\]") as error:
        prepare(dataclasses.replace(SMALL, name=name, data_dir=str(tmp_path)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("failure", [AssertionError("Manual directory is\nempty."), ConnectionError("no\nnetwork")])
def test_a_failed_download_is_one_line_with_its_reason(tmp_path, monkeypatch, failure):
    import tensorflow_datasets as tfds

    class Builder:
        def download_and_prepare(self):
            raise failure

    monkeypatch.setitem(sys.modules, "tensorflow", types.ModuleType("tensorflow"))
    monkeypatch.setattr(tfds, "builder", lambda name, **_: Builder())
    with pytest.raises(UserError, match=f"'imagenet2012' could not be made: {' '.join(str(failure).split())}") as error:
        prepare(dataclasses.replace(SMALL, name="imagenet2012_8", data_dir=str(tmp_path)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cut", [5, 12, -3])
def test_a_truncated_tfrecord_file_is_named(tmp_path, cut):
    config = write_pictures(tmp_path, "tfrecord")
    path = tmp_path / "pictures" / "1.0.0" / "pictures-test.tfrecord-00000-of-00001"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=rf"{path.name}.*incomplete"):
        prepare(config)


def test_a_file_with_fewer_records_than_the_metadata_says_is_named(tmp_path):
    config = write_pictures(tmp_path, "tfrecord")
    folder = tmp_path / "pictures" / "1.0.0"
    (folder / "pictures-train.tfrecord-00001-of-00003").unlink()
    with pytest.raises(UserError, match="00001-of-00003 is missing"):
        prepare(config)
    (folder / "pictures-train.tfrecord-00001-of-00003").write_bytes(b"")
    with pytest.raises(UserError, match="00001-of-00003 has 0 records.* 5"):
        prepare(config)
