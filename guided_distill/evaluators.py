"""The figures of a row of `summary.json` by the small classifier alone, in one call for each batch."""

import numpy as np

from guided_distill.evaluation import pixels, scores
from guided_distill.evaluation.gaussians import GaussianStats, frechet_distance, gaussian_stats
from guided_distill.evaluation.gaussians import noise_floor as noise_floor
from guided_distill.evaluation.labels import diversity, label_agreement
from guided_distill.evaluation.samples import Samples, in_order
from guided_distill.evaluation.samples import merge as merge_samples


def collect(features, logits, labels, images, reference_images=None, data_range=None) -> Samples:
    """The statistics of a batch: features [n,D], logits [n,num_classes], requested labels [n], images [n,*S].

    Values from .98 `data_range` on count as saturated. `reference_images` [n,*S] are the images that those of the same
    index are compared to; None where there are none. Raises ValueError when a feature or logit is not finite.
    """
    figures = {}
    if data_range is not None:
        figures["saturation"] = pixels.saturation(images, data_range)
    if reference_images is not None:
        figures["distance_to_reference"] = pixels.distance(images, reference_images)
    index = np.arange(len(features))
    return in_order(Samples(index, np.asarray(features), np.asarray(logits), np.asarray(labels), figures))


def merge(a: Samples, b: Samples) -> Samples:
    """The statistics of the union of two sets of samples."""
    union = merge_samples([a, b])
    return Samples(np.arange(len(union)), union.features, union.logits, union.label, union.figures)


def finish(samples: Samples, reference: GaussianStats) -> dict[str, float]:
    """The values of a row: `frechet_classifier` to the reference features, `score_classifier` in one split,
    `label_agreement` in [0, 1], `diversity`, and the means of the images' own figures, where there are such."""
    return {
        "frechet_classifier": frechet_distance(gaussian_stats(samples.features), reference),
        "score_classifier": scores.inception_score(samples.logits, splits=1)[0],
        "label_agreement": label_agreement(samples.logits, samples.label),
        "diversity": diversity(samples.features, samples.label),
        **{name: float(values.mean()) for name, values in samples.figures.items()},
    }
