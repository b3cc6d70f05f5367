"""All figures of a row: samples against a reference, by one feature network."""

from guided_distill.evaluation import kernel, neighbours, scores
from guided_distill.evaluation.bootstrap import FEWEST_SAMPLES, MOST_SAMPLES, frechet_interval
from guided_distill.evaluation.gaussians import frechet_distance, gaussian_stats, too_few
from guided_distill.evaluation.labels import diversity, label_agreement
from guided_distill.evaluation.reference import Reference
from guided_distill.evaluation.samples import Samples

# The field has names for these with Inception features alone.
_INCEPTION = {"frechet": "fid", "score": "inception_score", "kid": "kid"}


def name_of(figure: str, network: str) -> str:
    """How a figure by a feature network is called: `fid`, `inception_score`, `kid` by Inception, else with the name of
    the network behind, as in `frechet_classifier`."""
    known = _INCEPTION.get(figure) if network == "inception_v3" else None
    return known or f"{figure}_{network}"


def measure(samples: Samples, reference: Reference, *, labels_are_the_datas: bool, seed: int) -> dict:
    """The figures of samples that `in_order` made, by the network of the reference.

    Returns {"metrics": {name: value}, "intervals": {name: [low, high]}, "settings": {what a figure depends on beside
    samples and reference}, "notes": [one line each]}. What cannot be had is left out: kernel distance, precision, … to
    a published reference, of moments alone; precision, … of fewer than 4 samples; an interval of fewer than 10 or more
    than 5,000; the deviation of a score in one split. `labels_are_the_datas`: logit k is class k of the data, so that
    label agreement means something. `seed` draws the interval's subsets. Raises ValueError of fewer than 2 samples, or
    of another number of features than the reference's.
    """
    network, (count, dim) = reference.network, samples.features.shape
    if dim != len(reference.gaussian.mean):
        raise ValueError(f"samples have {dim} features, and {reference.source} has {len(reference.gaussian.mean)}")
    metrics, settings, notes = {}, {}, []
    if warning := too_few(count, dim):
        notes.append(warning)
    metrics[name_of("frechet", network)] = frechet_distance(gaussian_stats(samples.features), reference.gaussian)
    intervals = _intervals(samples, reference, seed, settings)
    metrics |= _score(samples, network, settings)
    if reference.neighbours is None:
        notes.append(f"{reference.source} holds mean and covariance alone: it gives a Fréchet distance, nothing else")
    else:
        metrics |= _against_features(samples, reference, settings)
    metrics |= _of_labels(samples, labels_are_the_datas)
    metrics |= {name: float(values.mean()) for name, values in samples.figures.items()}
    return {"metrics": metrics, "intervals": intervals, "settings": settings, "notes": notes}


def _intervals(samples, reference, seed, settings):
    if not FEWEST_SAMPLES <= len(samples) <= MOST_SAMPLES:
        return {}
    found = frechet_interval(samples.features, reference.gaussian, seed=seed)
    settings["interval_resamples"] = found.resamples
    return {name_of("frechet", reference.network): [found.low, found.high]}


def _score(samples, network, settings):
    splits = settings["score_splits"] = scores.num_splits(len(samples))
    name = name_of("score", network)
    mean, std = scores.inception_score(samples.logits, splits)
    return {name: mean} | ({f"{name}_std": std} if splits > 1 else {})


def _against_features(samples, reference, settings):
    name, network = name_of("kid", reference.network), reference.network
    real = reference.neighbours.features
    found = kernel.kernel_distance(samples.features, real)
    settings |= {"kid_subsets": found.subsets, "neighbours": len(real)}
    metrics = {name: found.mean, f"{name}_se": found.standard_error}
    if found.subsets > 1:
        metrics[f"{name}_std"] = found.std
    if len(samples) > neighbours.PRECISION_K:
        near = neighbours.compare(samples.features, reference.neighbours)
        metrics |= {f"{figure}_{network}": value for figure, value in near.items()}
    return metrics


def _of_labels(samples, labels_are_the_datas):
    if samples.label is None:
        return {}
    agreement = {"label_agreement": label_agreement(samples.logits, samples.label)} if labels_are_the_datas else {}
    return agreement | {"diversity": diversity(samples.features, samples.label)}
