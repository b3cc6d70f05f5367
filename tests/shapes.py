"""Tiny TFDS sets of coloured shapes, written without TensorFlow: the committed fixture, and sources to convert."""

import io
import pathlib
import struct

import numpy as np
from PIL import Image, ImageDraw

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
NUM_CLASSES = 3  # disc, box, triangle
FIXTURE_SHARDS = {"train": (20, 12), "test": (8,)}


def draw_shape(i: int, width: int, height: int) -> tuple[np.ndarray, int]:
    """Image uint8[height,width,3] and label of picture `i`: its colours from `i`, its shape i mod 3."""
    rng = np.random.default_rng(i)
    back, front = (tuple(int(c) for c in rng.integers(0, 256, 3)) for _ in range(2))
    image = Image.new("RGB", (width, height), back)
    draw, label = ImageDraw.Draw(image), i % NUM_CLASSES
    left, right = 1, width - 2 - i % 2
    if label == 0:
        draw.ellipse((left, 1, right, height - 2), fill=front)
    elif label == 1:
        draw.rectangle((left, 1, right, height - 2), fill=front)
    else:
        draw.polygon(((left, height - 2), (right, height - 2), (width // 2 - i % 2, 1)), fill=front)
    return np.asarray(image), label


def serialize(image: np.ndarray, label: int) -> bytes:
    """The tf.train.Example that TFDS would store."""
    from tensorflow_datasets.proto import tf_example_pb2

    png = io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    example = tf_example_pb2.Example()
    example.features.feature["image"].bytes_list.value.append(png.getvalue())
    example.features.feature["label"].int64_list.value.append(label)
    return example.SerializeToString()


def write_set(data_dir, name, splits, *, shape=(8, 8, 3), stored="array_record", num_classes=NUM_CLASSES):
    """A TFDS folder data_dir/name/1.0.0: `splits` maps a split to its shards, each a list of (image, label)."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import dataset_info
    from tensorflow_datasets.core.proto import dataset_info_pb2

    folder = pathlib.Path(data_dir) / name / "1.0.0"
    folder.mkdir(parents=True)
    info = dataset_info_pb2.DatasetInfo(name=name, version="1.0.0", file_format=stored, description="Coloured shapes.")
    for split, shards in splits.items():
        lengths, size = [len(shard) for shard in shards], 0
        for k, shard in enumerate(shards):
            records = [serialize(image, label) for image, label in shard]
            _WRITERS[stored](folder / f"{name}-{split}.{stored}-{k:05d}-of-{len(shards):05d}", records)
            size += sum(map(len, records))
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        info.splits.add(name=split, shard_lengths=lengths, num_bytes=size, filepath_template=template)
    dataset_info.write_dataset_info_proto(info, folder)
    tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=shape, encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=num_classes),
        }
    ).save_config(folder)
    return folder


def write_fixture(data_dir):
    """The committed set: python -c "import shapes; shapes.write_fixture(shapes.FIXTURES)" in tests/."""
    return write_set(data_dir, "shapes", draw_splits(FIXTURE_SHARDS, 8, 8))


def draw_splits(shards: dict, width: int, height: int) -> dict:
    """Splits for write_set from shard lengths; pictures are numbered through all splits."""
    numbers = iter(range(10**6))
    return {
        split: [[draw_shape(next(numbers), width, height) for _ in range(length)] for length in lengths]
        for split, lengths in shards.items()
    }


def _write_array_records(path, records):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def _write_tfrecords(path, records):
    crc = b"\0\0\0\0"  # as the converter's reader leaves it unchecked
    path.write_bytes(b"".join(struct.pack("<Q", len(r)) + crc + r + crc for r in records))


_WRITERS = {"array_record": _write_array_records, "tfrecord": _write_tfrecords}
