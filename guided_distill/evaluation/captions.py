"""Whether pictures show what their captions say, told by the captions of the real pictures they are nearest to."""

import numpy as np

from guided_distill.evaluation.neighbours import nearest

NEAREST = 5


def retrieval(features, tokens, real_features, real_tokens, *, end) -> float:
    """Share in [0, 1] of pictures among whose 5 nearest real ones is one of those captioned most like them.

    features [n,D] of the pictures, tokens i32 [n,L] of what they were made of; the same of real pictures. Captions are
    alike by the share of the words of both that they have in common, `end` being no word; of several that are equally
    like it any will do. A caption that has no word in common with any real one is left out; 0 where all are.
    """
    alike = _likeness(tokens, real_tokens, end)
    best = alike.max(1)
    near = np.take_along_axis(alike, nearest(features, real_features, NEAREST), 1)
    hit = (near == best[:, None]).any(1)
    return float(hit[best > 0].mean()) if (best > 0).any() else 0.0


def _likeness(ours, theirs, end):
    """The words that two captions share over those of either, [n, m] for captions [n,L] and [m,L]."""
    ours, theirs = ([set(row.tolist()) - {end} for row in tokens] for tokens in (ours, theirs))
    return np.array([[len(a & b) / max(len(a | b), 1) for b in theirs] for a in ours])
