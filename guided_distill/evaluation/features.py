"""Feature networks behind one interface: images in, features and logits out, by the batch and over all devices."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from guided_distill import compilation, sharding
from guided_distill.errors import UserError
from guided_distill.interop import feature_weights
from guided_distill.models import classifier
from guided_distill.models.efficientnet_lite import EfficientNetLite0
from guided_distill.models.inception import InceptionV3


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """What samples are measured with."""

    name: str  # that the names of its figures end in
    params: Any
    apply: Callable  # (params, x f32[B,*S] in [-1, 1]) -> (features f32[B,D], logits f32[B,K]); one object per network
    weights_hash: str  # SHA-256 of the parameters
    resize: str  # what it does to the size of an image, in words
    labels_are_the_datas: bool  # whether logit k is class k of the data set


def _inception_v3(params, x):
    taps = InceptionV3().apply({"params": params}, _pixels(x))
    return taps["2048"], taps["logits_unbiased"]


def _efficientnet_lite0(params, x):
    return EfficientNetLite0().apply({"params": params}, _pixels(x))


# name -> (what it computes, its resize in words), of the networks whose weights --mode=import converts
NETWORKS = {
    "inception_v3": (_inception_v3, "299x299, bilinear as in TensorFlow 1"),
    "efficientnet_lite0": (_efficientnet_lite0, "224x224, bicubic with antialiasing"),
}
# Operations of each for one image, two for a multiplication and an addition: what progress is told.
OPERATIONS = {"inception_v3": 11.4e9, "efficientnet_lite0": 0.71e9}


def load_feature_network(name: str) -> FeatureNetwork:
    """A network trained on ImageNet, from its cached weights.

    Raises UserError for an unknown name, and where the weights are missing one that names the command which makes them.
    """
    if name not in NETWORKS:
        raise UserError(f"evaluate.features: {name!r} is not one of {', '.join(NETWORKS)}")
    apply, resize = NETWORKS[name]
    params = feature_weights.load_weights(name)
    return FeatureNetwork(name, params, apply, _hash(params), resize, labels_are_the_datas=False)


def classifier_network(params) -> FeatureNetwork:
    """The small classifier of models/classifier.py, trained on the data set itself, with its parameters."""
    return FeatureNetwork(
        "classifier", params, classifier.features_and_logits, _hash(params), "none", labels_are_the_datas=True
    )


def compute(network: FeatureNetwork, x, *, batch_size: int, mesh=None) -> tuple[np.ndarray, np.ndarray]:
    """(features f32[n,D], logits f32[n,K]) on the host of samples f32[n,*S] in [-1, 1], n > 0, in their order.

    Every batch is the same program, the last one padded, and split over the devices of the mesh (one device where there
    is none). Networks of ImageNet see an image as a PNG would hold it, grey in three channels; for samples that are no
    images of one or three channels they raise UserError, as does a `batch_size` that the devices do not divide.
    """
    mesh = mesh or sharding.make_mesh(jax.devices()[:1])
    sharding.check_batch(mesh, "batch_size", batch_size)
    whole, split = sharding.replicate(mesh, network.params), sharding.batched(mesh)
    # jit finds the program of an earlier call again, as `apply` is the same object.
    program = jax.jit(network.apply, out_shardings=split, compiler_options=compilation.compiler_options(mesh))
    batches = []
    for start in range(0, len(x), batch_size):
        rows = np.asarray(x[start : start + batch_size], np.float32)
        padded = np.concatenate([rows, np.zeros((batch_size - len(rows), *rows.shape[1:]), np.float32)])
        outputs = program(whole, sharding.spread(mesh, padded))
        batches.append([sharding.to_host(values)[: len(rows)] for values in outputs])
    features, logits = (np.concatenate(values) for values in zip(*batches, strict=True))
    return features, logits


def _pixels(x):
    """Samples in [-1, 1] as f32[B,H,W,3] of the whole numbers 0 ... 255 that a PNG would hold."""
    if x.ndim != 4 or x.shape[-1] not in (1, 3):
        raise UserError(
            f"evaluate.features: samples of shape {x.shape[1:]} are no images of one or three channels, which networks "
            "of ImageNet measure; the classifier measures any"
        )
    pixels = jnp.round((jnp.clip(x, -1.0, 1.0) + 1.0) * 127.5)
    return jnp.repeat(pixels, 3, axis=-1) if x.shape[-1] == 1 else pixels


def _hash(params):
    digest = hashlib.sha256()
    for name, value in sorted(flatten_dict(params, sep="/").items()):
        digest.update(f"{name} {value.shape} {value.dtype}".encode() + np.asarray(value).tobytes())
    return digest.hexdigest()
