"""Figures of samples with the classes that were asked for."""

import numpy as np


def label_agreement(logits: np.ndarray, label: np.ndarray) -> float:
    """Share in [0, 1] of logits [n,K] that are largest at the label i32[n] asked for."""
    return float((np.argmax(logits, axis=1) == label).mean())


def diversity(features: np.ndarray, label: np.ndarray) -> float:
    """Unbiased variance of features [n,D] about the mean of their own label, summed over features; 0 where no label has
    two samples."""
    features = np.asarray(features, np.float64)
    classes = np.unique(label)
    about = sum(np.square(features[label == c] - features[label == c].mean(0)).sum() for c in classes)
    degrees = len(features) - len(classes)
    return float(about / degrees) if degrees else 0.0
