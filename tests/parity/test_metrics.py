"""Metrics beside torch-fidelity's, on the same features: an implementation that shares no line with ours.

Theirs are computed in the precision of the features, ours in float64; so they are given the features as float64.
"""

import numpy as np
import pytest
import torch

from benchmarks import fidelity
from guided_distill.evaluation.gaussians import frechet_distance, gaussian_stats
from guided_distill.evaluation.kernel import kernel_distance
from guided_distill.evaluation.neighbours import compare, neighbourhood
from guided_distill.evaluation.scores import inception_score

RNG = np.random.default_rng(0)


def features(count, dim, shift=0.0):
    """Rectified and correlated, as a network's are, in float32."""
    mixing = np.random.default_rng(1).normal(size=(dim, dim)) / np.sqrt(dim)
    return np.maximum(RNG.normal(size=(count, dim)) @ mixing + shift, 0).astype(np.float32)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("count, dim", [(3000, 16), (700, 300), (150, 300)])
def test_fid(count, dim):
    x, y = features(count, dim), features(1000, dim, shift=0.1)
    fid = fidelity.metric("fid")
    theirs = fid.fid_statistics_to_metric(
        fid.fid_features_to_statistics(tensor(x)), fid.fid_features_to_statistics(tensor(y)), verbose=False
    )
    expected = theirs["frechet_inception_distance"]
    assert frechet_distance(gaussian_stats(x), gaussian_stats(y)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("count, splits", [(1000, 10), (1003, 10), (50, 1), (57, 4)])
def test_isc(count, splits):
    logits = (3 * RNG.normal(size=(count, 1008))).astype(np.float32)
    theirs = fidelity.metric("isc").isc_features_to_metric(torch.tensor(logits), splits=splits, shuffle=False)
    mean, std = inception_score(logits, splits)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert std == pytest.approx(theirs["inception_score_std"], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("count, options", [(1500, {}), (300, {"kid_subsets": 20, "kid_subset_size": 100})])
def test_kid(count, options):
    x, y = features(count, 64), features(count + 200, 64, shift=0.1)
    theirs = fidelity.metric("kid").kid_features_to_metric(tensor(x), tensor(y), verbose=False, **options)
    ours = kernel_distance(x, y, **{name.removeprefix("kid_"): value for name, value in options.items()})
    assert ours.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    assert ours.std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-6)


@pytest.mark.parametrize("save_cpu_ram", [False, True])
def test_prc(save_cpu_ram):
    x, y = features(1200, 64), features(1500, 64, shift=0.1)
    theirs = fidelity.metric("prc").prc_features_to_metric(
        tensor(x), tensor(y), verbose=False, save_cpu_ram=save_cpu_ram, prc_batch_size=400
    )
    ours = compare(x, neighbourhood(y))
    for name in ("precision", "recall"):
        assert 0.05 < ours[name] < 0.95
        assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name
