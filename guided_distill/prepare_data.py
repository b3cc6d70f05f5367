"""Puts a TFDS data set into array_record form, which data.py reads at random and without TensorFlow.

Only a download needs TensorFlow. Sets on disk are converted shard by shard; a shard is written under a temporary name
and renamed, and the metadata that makes the set visible comes last, so the same command continues an interrupted one.
"""

import concurrent.futures
import functools
import io
import os
import pathlib
import struct
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image
from rich.progress import track

from guided_distill.data import DataConfig
from guided_distill.errors import UserError
from guided_distill.factories import is_factory
from guided_distill.pairs import crop_and_resize
from guided_distill.small_sets import SMALL_SETS
from guided_distill.tfds_files import find_builder, has_array_record


def prepare(config: DataConfig) -> None:
    """Makes `config.name` readable by load_dataset, by whichever is needed of download, conversion and resizing.

    A name that ends in `_<image_size>`, such as imagenet2012_64, is made from the set before the underscore (which is
    prepared first; for ImageNet, TFDS wants the ILSVRC archives in <data_dir>/downloads/manual). A set that is there is
    left alone. Raises UserError for a missing TensorFlow, an unknown set, a failed download or a damaged file.
    """
    if config.name in SMALL_SETS or is_factory(config.name):
        return print(f"{config.name!r} comes with Python code: there is nothing to prepare")
    builder = find_builder(config.name, config.data_dir)
    source, _, size = config.name.rpartition("_")
    if builder is None and source and "/" not in source and size == str(config.image_size):
        _resize_set(find_builder(source, config.data_dir) or _download(source, config.data_dir), config)
    elif builder is None:
        _download(config.name, config.data_dir)
    elif not has_array_record(builder):
        _convert_in_place(builder)
    print(f"{config.name!r} is ready in {find_builder(config.name, config.data_dir).data_path}")


def _download(name: str, data_dir: str | None):
    """The builder of a set that TFDS downloads, or builds from files in its manual folder."""
    try:
        import tensorflow  # noqa: F401
    except ImportError as e:
        raise UserError(
            f"data.name: {name!r} isn't on disk, and TFDS needs TensorFlow to make it; install the extra: pip install "
            "'guided_distill[tfds]'"
        ) from e
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except ValueError as e:
        raise UserError(f"data.name: TFDS has no data set {name!r}") from e
    try:
        builder.download_and_prepare()
    except (AssertionError, OSError, tfds.download.DownloadError) as e:  # tfds asserts that manual files are there
        raise UserError(f"data.name: {name!r} could not be made: {' '.join(str(e).split())}") from e
    return find_builder(name, data_dir)


def _convert_in_place(builder) -> None:
    """Adds array_record shards to a set in another form; the files that are there stay."""
    from tensorflow_datasets.core import dataset_info

    folder = pathlib.Path(builder.data_path)
    for split in builder.info.splits.values():
        _write_shards(builder, split, split.filename_template, lambda record: record)
    info = dataset_info.read_proto_from_builder_dir(folder)
    info.alternative_file_formats.append("array_record")
    _replace(folder / "dataset_info.json", lambda path: path.write_text(dataset_info.get_dataset_info_json(info)))


def _resize_set(builder, config: DataConfig) -> None:
    """Writes the set of `builder` again as `config.name`, its images square, of the config's size, in PNG."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import dataset_info
    from tensorflow_datasets.core.proto import dataset_info_pb2

    source = builder.info.features
    if not {"image", "label"} <= set(source):
        raise UserError(f"data.name: {builder.name!r} has the features {', '.join(source)}, not image and label")
    folder = pathlib.Path(builder.data_path).parent.parent / config.name / str(builder.version)
    folder.mkdir(parents=True, exist_ok=True)
    info = dataset_info_pb2.DatasetInfo(
        name=config.name,
        version=str(builder.version),
        file_format="array_record",
        description=f"{builder.name}, central square, area resize to {config.image_size} pixels",
    )
    for split in builder.info.splits.values():
        template = split.filename_template.replace(data_dir=folder, dataset_name=config.name)
        paths = _write_shards(builder, split, template, functools.partial(_resize_record, config=config))
        info.splits.add(
            name=split.name,
            shard_lengths=split.shard_lengths,
            num_bytes=sum(path.stat().st_size for path in paths),
            filepath_template=template.template,
        )
    image = tfds.features.Image(shape=config.sample_shape, encoding_format="png")
    dataset_info.write_dataset_info_proto(info, folder)
    # Last, since find_builder takes a folder with features.json for a finished set.
    kept = {name: source[name] for name in ("label", "text") if name in source}
    tfds.features.FeaturesDict({"image": image, **kept}).save_config(folder)


def _resize_record(record: bytes, config: DataConfig) -> bytes:
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example.FromString(record)
    feature = example.features.feature
    image = Image.open(io.BytesIO(feature["image"].bytes_list.value[0])).convert("L" if config.channels == 1 else "RGB")
    image = np.asarray(image).reshape(*image.size[::-1], config.channels)
    resized = crop_and_resize(image, config.image_size)
    png = io.BytesIO()
    Image.fromarray(resized[..., 0] if config.channels == 1 else resized).save(png, "PNG")
    small = tf_example_pb2.Example()
    small.features.feature["image"].bytes_list.value.append(png.getvalue())
    for name in ("label", "text"):
        if name in feature:
            small.features.feature[name].CopyFrom(feature[name])
    return small.SerializeToString()


def _write_shards(builder, split, template, convert: Callable[[bytes], bytes]) -> list[pathlib.Path]:
    """Each stored shard of `split` through `convert` into an array_record shard; finished ones are kept."""
    stored = "array_record" if has_array_record(builder) else builder.info.file_format.value
    count = len(split.shard_lengths)
    old = split.filename_template.replace(filetype_suffix=stored).sharded_filepaths(count)
    new = [pathlib.Path(p) for p in template.replace(filetype_suffix="array_record").sharded_filepaths(count)]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        shards = [
            pool.submit(_write_shard, str(source), path, stored, length, convert)
            for source, path, length in zip(old, new, split.shard_lengths, strict=True)
            if not path.exists()
        ]
        try:
            for shard in track(
                concurrent.futures.as_completed(shards),
                description=f"{template.dataset_name} {split.name}: {count} shards, {count - len(shards)} there",
                total=len(shards),
            ):
                shard.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return new


def _write_shard(source: str, path: pathlib.Path, stored: str, length: int, convert: Callable[[bytes], bytes]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    if not os.path.exists(source):
        raise UserError(f"{source} is missing: the data set that it belongs to is incomplete")

    def write(temporary):
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        written = 0
        for record in _read_records(source, stored):
            writer.write(convert(record))
            written += 1
        writer.close()
        if written != length:
            raise UserError(f"{source} has {written} records, its dataset_info.json says {length}: it is incomplete")

    _replace(path, write)


def _replace(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """Writes `path` whole or not at all."""
    temporary = path.with_name(path.name + ".incomplete")
    write(temporary)
    temporary.rename(path)


def _read_records(path: str, stored: str) -> Iterator[bytes]:
    if stored == "array_record":
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        with ArrayRecordDataSource([path]) as records:
            yield from (records[i] for i in range(len(records)))
    elif stored == "tfrecord":
        yield from _read_tfrecords(path)
    else:
        raise UserError(f"{path}: {stored} files cannot be converted; tfrecord and array_record can")


def _read_tfrecords(path: str) -> Iterator[bytes]:
    """The records of a TFRecord file: u64 length, its crc, the record, its crc; the two crcs are not checked."""
    with open(path, "rb") as file:
        while header := file.read(12):
            size = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else 0
            body = file.read(size + 4)
            if len(header) < 12 or len(body) < size + 4:
                raise UserError(f"{path} ends in the middle of a record: it is incomplete")
            yield body[:size]
