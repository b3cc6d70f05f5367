"""The metrics of evaluation on features of Inception's size: time beside torch-fidelity's, memory, and intervals.

python -m benchmarks.metrics              Fréchet distance of 50,000 x 2048, precision and recall of 10,000 x 2048
python -m benchmarks.metrics --intervals  how wide intervals of few samples are beside the spread over new samples

Features are random, rectified and correlated, in float32. Seconds are those of all cores added up.
"""

import argparse
import resource
import threading
import time
from pathlib import Path

import numpy as np

from guided_distill.evaluation import bootstrap, kernel, neighbours
from guided_distill.evaluation.gaussians import GaussianStats, frechet_distance, gaussian_stats

_DIM = 2048
_MOST_TIME, _MOST_GB = 1.2, 4.0


def random_features(count, seed, shift=0.0, dim=_DIM, block=5000):
    """[count,dim] like a network's: of a decaying spectrum, and none below zero."""
    mixing = np.random.default_rng(0).normal(size=(dim, dim)).astype(np.float32)
    mixing *= (np.arange(1, dim + 1, dtype=np.float32) ** -0.7)[:, None]
    rng, features = np.random.default_rng(seed), np.empty((count, dim), np.float32)
    for start in range(0, count, block):
        rows = features[start : start + block]
        rows[:] = np.maximum(rng.normal(size=rows.shape).astype(np.float32) @ mixing + shift, 0)
    return features


def timed(call, *arguments, **keywords):
    """(what `call` returns, seconds of all cores): on a busy machine they are less wrong than the clock's."""
    start = time.process_time()
    return call(*arguments, **keywords), time.process_time() - start


def our_distance(x, y):
    """Statistics of both sets and their distance."""
    return frechet_distance(gaussian_stats(x), gaussian_stats(y))


def their_distance(x, y):
    """The same by torch-fidelity."""
    import torch

    from benchmarks import fidelity

    fid = fidelity.metric("fid")
    statistics = [fid.fid_features_to_statistics(torch.from_numpy(features)) for features in (x, y)]
    return fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


def print_distance(count, rounds):
    """Our time beside torch-fidelity's in alternating turns, of the same float32 features and of float64 ones once."""
    x, y = random_features(count, seed=1), random_features(count, seed=2, shift=0.05)
    turns = [(timed(our_distance, x, y), timed(their_distance, x, y)) for _ in range(rounds)]
    ours, theirs = (min(turn[who][1] for turn in turns) for who in (0, 1))
    distance, rounded = turns[0][0][0], turns[0][1][0]
    exact = their_distance(x.astype(np.float64), y.astype(np.float64))
    print(
        f"Fréchet distance of 2 x {count:,} x {_DIM}, the faster of {rounds} turns: ours {ours:.1f} s, torch-fidelity "
        f"{theirs:.1f} s; ratio {ours / theirs:.2f} (at most {_MOST_TIME})\n"
        f"  ours {distance:.10g}; torch-fidelity on float64 {exact:.10g}, {abs(distance / exact - 1):.1e} off; "
        f"on float32 {rounded:.10g}, {abs(distance / rounded - 1):.1e} off",
        flush=True,
    )


def print_neighbours(count):
    """Seconds and memory of precision, recall, density and coverage, the reference's radii apart."""
    x, y = random_features(count, seed=1), random_features(count, seed=2, shift=0.05)
    with Peak() as peak:
        reference, once = timed(neighbours.neighbourhood, y)
        found, each = timed(neighbours.compare, x, reference)
    figures = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
    print(
        f"neighbours of {count:,} x {count:,} x {_DIM}: radii of the reference {once:.1f} s, each row {each:.1f} s; "
        f"the process at most {peak.gigabytes:.2f} GB (at most {_MOST_GB} for 10,000)\n  {figures}",
        flush=True,
    )
    found, seconds = timed(kernel.kernel_distance, x, y)
    print(f"kernel distance, {found.subsets} subsets of 1,000 x {_DIM}: {seconds:.1f} s", flush=True)


class Peak:
    """The most memory the process held within a `with`, looked at every 10 ms, where Linux tells; else ever."""

    def __enter__(self):
        self.gigabytes, self._done = 0.0, threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._watcher.join()

    def _watch(self):
        while not self._done.wait(0.01):
            self.gigabytes = max(self.gigabytes, _resident())


def _resident():
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return int(statm.read_text().split()[1]) * resource.getpagesize() / 1e9


def with_repeats(features, reference, seed, resamples=200):
    """Width of the plain bootstrap's interval, and whether it holds the figure itself."""
    rng, count = np.random.default_rng(seed), len(features)
    of_rows = bootstrap.frechet_of_rows(features, reference)
    low, high = np.percentile([of_rows(rng.integers(0, count, count)) for _ in range(resamples)], (2.5, 97.5))
    return high - low, low <= of_rows(np.arange(count)) <= high


def print_intervals(trials=40):
    """Widths as times the spread of the figure over new sets of samples, 3.92 standard deviations."""
    print("samples  features  ours: width, holds the mean figure  plain bootstrap: width, holds its own figure")
    for count, dim in ((50, 64), (200, 64), (1000, 64), (100, 400)):
        rng = np.random.default_rng(0)
        reference = GaussianStats(10**6, np.zeros(dim), np.eye(dim) * (10**6 - 1))
        draws = [1.1 * rng.normal(size=(count, dim)) + 0.2 for _ in range(trials)]
        figures = [frechet_distance(gaussian_stats(draw), reference) for draw in draws]
        ours = [bootstrap.frechet_interval(draw, reference, seed=seed) for seed, draw in enumerate(draws)]
        plain = [with_repeats(draw, reference, seed) for seed, draw in enumerate(draws)]
        spread, mean = 3.92 * np.std(figures), np.mean(figures)
        print(
            f"{count:7d}  {dim:8d}  {np.mean([each.high - each.low for each in ours]) / spread:11.2f},"
            f" {np.mean([each.low <= mean <= each.high for each in ours]):.2f}"
            f"  {np.mean([width for width, _ in plain]) / spread:33.2f}, {np.mean([holds for _, holds in plain]):.2f}",
            flush=True,
        )
    for count, dim in ((1000, 1280), (1000, 2048), (5000, 1280), (5000, 2048)):
        features = random_features(count, seed=1, dim=dim)
        reference = gaussian_stats(random_features(2 * dim, seed=2, dim=dim))
        found, seconds = timed(bootstrap.frechet_interval, features, reference, seed=0)
        print(f"interval of {count} x {dim}: {seconds:.0f} s for {found.resamples} subsets", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--intervals", action="store_true")
    parser.add_argument("--count", type=int, default=50_000, help="rows of a set for the Fréchet distance")
    parser.add_argument("--neighbours", type=int, default=10_000, help="rows of a set for precision, recall, …")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    if args.intervals:
        print_intervals()
        return
    if args.neighbours:
        print_neighbours(args.neighbours)
    if args.count:
        print_distance(args.count, args.rounds)


if __name__ == "__main__":
    main()
