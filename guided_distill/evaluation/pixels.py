"""Figures of each image by its values alone."""

import numpy as np


def saturation(images: np.ndarray, data_range: float) -> np.ndarray:
    """f64[n]: the share of the values of images [n,*S] at an end of [-data_range, data_range], from .98 of it on."""
    return (np.abs(np.asarray(images, np.float64)) >= 0.98 * data_range).reshape(len(images), -1).mean(1)


def distance(images: np.ndarray, reference_images: np.ndarray) -> np.ndarray:
    """f64[n]: mean square per value of the difference of images [n,*S] and those of the same index [n,*S]."""
    difference = np.asarray(images, np.float64) - np.asarray(reference_images, np.float64)
    return np.square(difference).reshape(len(images), -1).mean(1)
