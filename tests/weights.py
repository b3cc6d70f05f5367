"""Random weights of the feature networks under the names that they have in PyTorch."""

import numpy as np

from guided_distill.interop.feature_weights import source_shapes


def random_state(network, seed=0):
    """{PyTorch's key: f32 array}: kernels that keep the size of what passes them, and statistics of one's order."""
    rng = np.random.default_rng(seed)
    state = {}
    for key, shape in source_shapes(network).items():
        normal = rng.normal(size=shape)
        if len(shape) > 1:
            value = normal * np.sqrt(2 / np.prod(shape[1:]))
        elif key.endswith("running_var"):
            value = np.exp(0.3 * normal)
        elif key.endswith(".weight"):
            value = 1 + 0.2 * normal
        else:
            value = 0.2 * normal
        state[key] = value.astype(np.float32)
    return state
