"""The pixel U-Net's parameters under the names of the same network in PyTorch."""

import numpy as np


def to_torch(params):
    """{key: array f32} of `export.class_folder.pixel_unet.PixelUNet` from a Linen tree; every value keeps its bits."""
    state = {}

    def put(prefix, node):
        if {"q", "k", "v"} <= node.keys():  # three matrices here, one there
            kernels, biases = ([np.asarray(node[part][leaf]) for part in "qkv"] for leaf in ("kernel", "bias"))
            state[f"{prefix}qkv.weight"] = np.concatenate(kernels, axis=1).T
            state[f"{prefix}qkv.bias"] = np.concatenate(biases)
            node = {key: value for key, value in node.items() if key not in "qkv"}
        for key, value in node.items():
            if hasattr(value, "keys"):
                put(f"{prefix}{key}.", value)
            elif key == "kernel":
                weight = np.moveaxis(np.asarray(value), (-1, -2), (0, 1))
                # A skip is a matrix here and a 1x1 convolution there.
                state[f"{prefix}weight"] = weight[:, :, None, None] if prefix.endswith("skip.") else weight
            else:
                state[f"{prefix}{'weight' if key == 'scale' else key}"] = np.asarray(value)

    put("", params)
    return {key: np.ascontiguousarray(value, np.float32) for key, value in state.items()}
