"""Prepared TFDS data sets as they lie on disk: found by their files, and read at random without TensorFlow."""

from guided_distill.errors import UserError


def find_builder(name: str, data_dir: str | None):
    """The TFDS builder of the prepared data set `name` under `data_dir`, from its files alone, or None."""
    import tensorflow_datasets as tfds

    try:
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
    except ValueError:  # tfds's DatasetNotFoundError is one, and so is its complaint about a malformed name
        return None


def has_array_record(builder) -> bool:
    """Whether the data set is stored as array_record, the form that can be read at random and without TensorFlow."""
    return "array_record" in {form.value for form in builder.info.available_file_formats()}


def open_set(name: str, data_dir: str | None):
    """The builder of a set that can be read at random. Raises UserError where it is missing, or stored otherwise."""
    import tensorflow_datasets as tfds

    builder = find_builder(name, data_dir)
    where = data_dir or tfds.core.constants.DATA_DIR
    if builder is None:
        raise UserError(f"data.name: no data set {name!r} in {where}; prepare it once with --mode=prepare_data")
    if not has_array_record(builder):
        raise UserError(
            f"data.name: {builder.data_path} is stored as {builder.info.file_format.value}, which cannot be read at "
            "random; convert it once to array_record with --mode=prepare_data"
        )
    return builder


def open_split(builder, name: str, key: str, split: str):
    """The records of a split, named by the config's `key`, pictures undecoded. Raises UserError for an unknown one."""
    import tensorflow_datasets as tfds

    try:
        # Only images and labels are wanted, and Pillow decodes an image in a third of the time tfds takes.
        return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except ValueError as e:
        known = ", ".join(builder.info.splits)
        raise UserError(f"data.{key}: {name!r} has no split {split!r}; it has {known}") from e
