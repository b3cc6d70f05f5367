"""Whether pictures show what their captions say, told by the captions of the real pictures they are nearest to."""

import numpy as np

from guided_distill.evaluation.neighbours import nearest

NEAREST = 5


def retrieval(features, alike, real_features) -> float:
    """Share in [0, 1] of pictures among whose 5 nearest real ones is one of those captioned most like them.

    features [n,D] of the pictures, alike [n,m] the `likeness` of their captions to those of the real ones, [m,D]. Of
    several that are equally like it any will do. A caption that has no word in common with any real one is left out; 0
    where all are.
    """
    best = alike.max(1)
    near = np.take_along_axis(alike, nearest(features, real_features, NEAREST), 1)
    hit = (near == best[:, None]).any(1)
    return float(hit[best > 0].mean()) if (best > 0).any() else 0.0


def likeness(ours, theirs, end):
    """The words that two captions share over those of either, [n,m] of tokens [n,L] and [m,L]; `end` is no word."""
    ours, theirs = ([set(row.tolist()) - {end} for row in tokens] for tokens in (ours, theirs))
    return np.array([[len(a & b) / max(len(a | b), 1) for b in theirs] for a in ours])
