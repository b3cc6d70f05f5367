"""Inception Score: how sure predictions are, and how even over classes (arXiv:1606.03498)."""

import numpy as np

_SPLITS, _SPLIT_SIZE = 10, 500


def num_splits(count: int) -> int:
    """The literature's 10 from 5,000 images on; of fewer, as many as can hold 500 images each, at least one.

    A split of few images cannot score high: exp(I) is at most its number of images.
    """
    return min(max(count // _SPLIT_SIZE, 1), _SPLITS)


def inception_score(logits: np.ndarray, splits: int) -> tuple[float, float]:
    """Mean and standard deviation over splits of exp(E KL(p(y|x) || p(y))) of logits [n,K].

    The splits are contiguous, image i of n in the one with the number i·splits // n, so the logits must be in the order
    of the images. The deviation is the population's (ddof 0), and 0 of one split. Raises ValueError where a split would
    be empty.
    """
    count = len(logits)
    if count < splits:
        raise ValueError(f"{count} samples cannot be split in {splits}")
    ends = [count * i // splits for i in range(splits + 1)]
    scores = [_score(logits[start:end]) for start, end in zip(ends, ends[1:], strict=False)]
    return float(np.mean(scores)), float(np.std(scores))


def _score(logits):
    log_p = _log_softmax(logits)
    p = np.exp(log_p)
    marginal = p.mean(0)
    seen = marginal > 0
    return np.exp((p * log_p).sum(1).mean() - np.sum(marginal[seen] * np.log(marginal[seen])))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.asarray(logits, np.float64)
    shifted = shifted - shifted.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
