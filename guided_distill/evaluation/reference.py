"""Reference statistics: what samples are compared with, made once, kept in one npz, and checked by name.

The npz files of guided-diffusion (ADM) and EDM are read as well: they hold mean and covariance, `mu` and `sigma`, of
Inception's 2,048 features, so that the Fréchet distance is all that they serve for.
"""

import dataclasses
import hashlib
import zipfile
import zlib

import numpy as np
from etils import epath

from guided_distill.errors import UserError
from guided_distill.evaluation.gaussians import GaussianStats
from guided_distill.evaluation.neighbours import DENSITY_K, PRECISION_K, Neighbourhood, neighbourhood
from guided_distill.files import write_npz

_TEXTS = ("network", "weights_hash", "resize", "resolution", "source", "hash")
_PUBLISHED_DIM = 2048


@dataclasses.dataclass(frozen=True)
class Reference:
    """Statistics of real images by one feature network; "" stands for what a published file does not say."""

    network: str
    weights_hash: str
    resize: str
    resolution: str  # of the images, as in "32x32x3"
    source: str  # which images, in words
    hash: str  # SHA-256 of all the rest, or of a published file as it is
    num_images: int | None  # None where a published file does not say
    gaussian: GaussianStats
    neighbours: Neighbourhood | None  # of the images that kernel distance, precision, … are measured with
    noise_floor: float | None = None  # Fréchet distance of two halves of the images; None where it is not known


def make_reference(
    gaussian, features, *, network, weights_hash, resize, resolution, source, noise_floor=None
) -> Reference:
    """The statistics of real images: moments of all of them, and features [m,D] of all or some, at even distances.

    Raises ValueError of fewer than 6 features.
    """
    reference = Reference(
        network=network,
        weights_hash=weights_hash,
        resize=resize,
        resolution=resolution,
        source=source,
        hash="",
        num_images=gaussian.count,
        gaussian=gaussian,
        neighbours=neighbourhood(np.ascontiguousarray(features)),
        noise_floor=noise_floor,
    )
    return dataclasses.replace(reference, hash=_content_hash(reference))


def check(reference: Reference, *, network, weights_hash, resize, resolution) -> None:
    """Raises UserError, naming both, where the reference was made in another way than samples are measured."""
    ours = {"network": network, "weights_hash": weights_hash, "resize": resize, "resolution": resolution}
    for name, wanted in ours.items():
        found = getattr(reference, name)
        if found and found != wanted:
            raise UserError(
                f"the reference {reference.source} has {name} {found}, and the samples have {wanted}: "
                f"name a reference of {wanted}, or make one with --mode=reference"
            )


def save(path: epath.PathLike, reference: Reference) -> None:
    """Writes a reference, whole or not at all."""
    write_npz(path, **_arrays(reference), **{name: np.asarray(getattr(reference, name)) for name in _TEXTS})


def load(path: epath.PathLike) -> Reference:
    """Reads what `save` wrote, or the published npz of ADM or EDM. Raises UserError for anything else."""
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"there is no reference {path}; make it with --mode=reference")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return _own(arrays) if "network" in arrays else _published(arrays, file, path.name)
    # np.load takes any other file for a pickle, and an .npy for an array.
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path} is no reference ({error}): name an npz of --mode=reference, or of ADM or EDM with mu and sigma"
        ) from error


def _own(arrays):
    neighbours = Neighbourhood(arrays["features"], {k: arrays[f"radii_{k}"] for k in (PRECISION_K, DENSITY_K)})
    return Reference(
        **{name: str(arrays[name]) for name in _TEXTS},
        num_images=int(arrays["count"]),
        gaussian=GaussianStats(int(arrays["count"]), arrays["mean"], arrays["scatter"]),
        neighbours=neighbours,
        noise_floor=None if np.isnan(arrays["noise_floor"]) else float(arrays["noise_floor"]),
    )


def _published(arrays, file, name):
    mean, covariance = (np.asarray(arrays[key], np.float64) for key in ("mu", "sigma"))
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError("mu or sigma is not finite")
    if mean.shape != (_PUBLISHED_DIM,) or covariance.shape != (_PUBLISHED_DIM, _PUBLISHED_DIM):
        raise ValueError(f"mu {mean.shape} and sigma {covariance.shape} are not of {_PUBLISHED_DIM} features")
    # Any count above the dimension means a covariance that is taken as it is.
    count = _PUBLISHED_DIM + 1
    return Reference(
        network="inception_v3",
        weights_hash="",
        resize="",
        resolution=_resolution(arrays) if "arr_0" in arrays else "",
        source=name,
        hash=_file_hash(file),
        num_images=None,
        gaussian=GaussianStats(count, mean, covariance * (count - 1)),
        neighbours=None,
    )


def _resolution(arrays):
    """Of ADM's images arr_0, [N,H,W,C], by the header alone: they may be gigabytes."""
    with arrays.zip.open("arr_0.npy") as file:
        major = np.lib.format.read_magic(file)[0]
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape = read(file)[0]
    return "x".join(map(str, shape[1:]))


def _file_hash(file):
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def _arrays(reference):
    radii = {f"radii_{k}": values for k, values in reference.neighbours.radii.items()}
    gaussian = reference.gaussian
    return {
        "count": np.asarray(gaussian.count),
        "mean": gaussian.mean,
        "scatter": gaussian.scatter,
        "noise_floor": np.asarray(np.nan if reference.noise_floor is None else reference.noise_floor),
        "features": reference.neighbours.features,
        **radii,
    }


def _content_hash(reference):
    digest = hashlib.sha256()
    for name in _TEXTS:
        digest.update(f"{name}={getattr(reference, name)}\n".encode())
    for name, values in _arrays(reference).items():
        digest.update(f"{name}:{values.dtype}:{values.shape}\n".encode())
        digest.update(np.ascontiguousarray(values))
    return digest.hexdigest()
