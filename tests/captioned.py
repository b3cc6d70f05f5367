"""A set of captioned pictures, and the smallest experiment on it: a plain square of the colour the caption names."""

import numpy as np
from tiny import tiny_config

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def squares():
    """{"train": (images, labels, captions), "test": ...}, as a function for config.data.name."""

    def split(num):
        names = [list(COLOURS)[i % len(COLOURS)] for i in range(num)]
        images = np.zeros((num, 8, 8, 3), np.uint8)
        images[:, 2:6, 2:6] = np.array([COLOURS[name] for name in names])[:, None, None]
        return images, np.zeros(num, np.int32), [f"a {name} square" for name in names]

    return {"train": split(40), "test": split(8)}


def uncaptioned():
    """The same pictures without a word."""
    return {name: values[:2] for name, values in squares().items()}


def captioned_config(**updates):
    """tiny_config on the squares, with a text encoder of one layer."""
    config = tiny_config(
        **{
            "data.name": "captioned:squares",
            "data.channels": 3,
            "data.num_classes": 1,
            "data.text_length": 5,
            "data.vocabulary": 256,
            "evaluate.features": ("efficientnet_lite0",),
            **updates,
        }
    )
    config["model"]["text"] = {"width": 16, "layers": 1, "heads": 2, "mlp": 32, "activation": "gelu"}
    return config
