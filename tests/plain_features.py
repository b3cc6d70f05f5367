"""A feature network whose weights are always here, under the name of one whose weights need not be."""

import numpy as np

from guided_distill.evaluation import features, yardstick
from guided_distill.interop import feature_weights


def use(monkeypatch):
    """Features of the means of a picture's quarters, 8x8x3, in place of EfficientNet's."""

    def apply(params, x):
        means = x.reshape(len(x), 2, 4, 2, 4, 3).mean((2, 4)).reshape(len(x), -1)
        return means, means

    network = features.FeatureNetwork("efficientnet_lite0", {"p": np.zeros(1)}, apply, "0" * 64, "none", False)
    monkeypatch.setattr(yardstick, "load_feature_network", lambda name: network)
    monkeypatch.setattr(feature_weights, "load_weights", lambda name: network.params)
