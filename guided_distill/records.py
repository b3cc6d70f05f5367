"""One record of a data set: decoded, and held against what the config says of it."""

import io

import numpy as np
from PIL import Image

from guided_distill.errors import UserError
from guided_distill.text import hashed_words


def times(shape) -> str:
    """A shape in words: 32x32x3, with ? for what is not known."""
    return "x".join("?" if size is None else str(size) for size in shape)


def decode(record: dict, i: int, config) -> dict:
    """{"image": uint8 [H, W, C], "label": i32} of record i as it is stored, "text" and "tokens" of captions.

    Raises UserError for an image of another size than the DataConfig's, or a label outside its classes.
    """
    image = record["image"]
    if isinstance(image, bytes):
        image = Image.open(io.BytesIO(image))
        image = np.asarray(image.convert("L" if config.channels == 1 else "RGB")).reshape(*image.size[::-1], -1)
    if image.shape != config.sample_shape:
        raise UserError(
            f"data.image_size: image {i} of {config.name!r} is {times(image.shape)}, the config says "
            f"{times(config.sample_shape)}; --mode=prepare_data makes a resized set, {config.name}_{config.image_size}"
        )
    label = record["label"]
    if not 0 <= label < config.num_classes:
        last = config.num_classes - 1
        raise UserError(f"data.num_classes: label {label} of image {i} of {config.name!r} is outside 0..{last}")
    found = {"image": image, "label": np.int32(label)}
    if config.text_length:
        found["text"] = record["text"].decode() if isinstance(record["text"], bytes) else record["text"]
        tokens = hashed_words([found["text"]], length=config.text_length, vocabulary=config.vocabulary)
        found["tokens"] = tokens[0]
    return found
