"""A check of the yardstick itself: real images against real images, and labels that are right against shuffled ones.

    python -m benchmarks.real_data --config=configs/cifar10.py --config.data.data_dir=data \\
        --config.evaluate.features="('efficientnet_lite0',)" [--num_real=10000]

Of the first `num_real` images of the training and of the test split, by each of config.evaluate.features: the Fréchet
distance between the splits, and the mean over classes of the distance between a class of one and the same class of the
other, once with the labels as they are and once with those of the test split shuffled, when a class is any images.
"""

import sys

import numpy as np
from absl import flags

from benchmarks import plain_errors
from guided_distill import command_line, sharding
from guided_distill.data import load_dataset, read_range
from guided_distill.evaluation.features import load_feature_network
from guided_distill.evaluation.gaussians import frechet_distance, gaussian_stats
from guided_distill.evaluation.labels import diversity
from guided_distill.evaluation.yardstick import features_of
from guided_distill.experiment import from_config

_CHUNK = 1000


def read(source, network, mesh, num):
    """(features, labels) of the first images of a split."""
    features, labels = [], []
    for start in range(0, min(num, len(source)), _CHUNK):
        records = read_range(source, start, min(start + _CHUNK, num, len(source)))
        features.append(features_of(network, records["x"], mesh)[0])
        labels.append(records["label"])
        print(f"{start + len(labels[-1])} images", file=sys.stderr, flush=True)
    return np.concatenate(features), np.concatenate(labels)


def mean_over_classes(ours, our_labels, theirs, their_labels):
    """Mean over the classes of the Fréchet distance between the two splits' images of it."""
    stats = [
        [gaussian_stats(features[labels == c]) for features, labels in ((ours, our_labels), (theirs, their_labels))]
        for c in np.unique(our_labels)
    ]
    return float(np.mean([frechet_distance(a, b) for a, b in stats]))


def main():
    """Prints a line for each figure and network."""
    flags.DEFINE_integer("num_real", 10_000, "images of each split")
    command_line.parse(sys.argv)
    experiment, num = from_config(command_line.CONFIG.value.to_dict()), flags.FLAGS.num_real
    dataset, mesh = load_dataset(experiment.data), sharding.make_mesh()
    for name in experiment.evaluate.features:
        network = load_feature_network(name)
        train, train_labels = read(dataset.train, network, mesh, num)
        test, test_labels = read(dataset.test, network, mesh, num)
        shuffled = np.random.default_rng(0).permutation(test_labels)
        print(f"{name}: {len(train)} training against {len(test)} test images of {experiment.data.name}")
        print(f"frechet_{name:30s} {frechet_distance(gaussian_stats(train), gaussian_stats(test)):.4g}")
        for which, labels in (("labels as they are", test_labels), ("labels shuffled", shuffled)):
            distance = mean_over_classes(train, train_labels, test, labels)
            print(f"{which}: mean over classes {distance:.4g}, diversity within a label {diversity(test, labels):.4g}")


if __name__ == "__main__":
    with plain_errors():
        main()
