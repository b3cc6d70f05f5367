"""What the ways through stage two cost and what they reach: configs/rounds.py, each with several seeds.

    python -m guided_distill.main --config=configs/digits.py
    python -m benchmarks.rounds [--seeds 0 1 2] [--ways fixed tract ...] [--from runs/digits] [--out runs/rounds]

Cost is the forward passes of one image that stage two made, a backward pass counted as two, looks and probes included.
Runs that are there already are not repeated.
"""

import argparse
import json
import pathlib
import statistics

from benchmarks import plain_errors
from configs import rounds as ways_of_rounds
from guided_distill import metrics, pipeline, rounds
from guided_distill.workdir import open_run


def config_of(way, seed, source):
    """The config of a way, with the seed of everything random in stage two."""
    config = ways_of_rounds.get_config(way)
    config.seed = seed
    config.teacher.checkpoint = config.stage1.checkpoint = str(source)
    return config.to_dict()


def cost(run):
    """Forward passes of one image that the rounds of a finished run made."""
    settings, total = run.experiment.rounds, 0
    for stage in (stage for stage in run.stages if stage.series):
        directory = stage.directory(run.workdir)
        total += json.loads((directory / "STAGE_COMPLETE").read_text())["step"] * stage.work_per_update
        total += sum("gap" in line for line in metrics.read_metrics(directory)) * rounds.gap_work(run, stage)
        if settings.plan == "auto":
            total += rounds.plan_work(run, stage)
    return total


def figures(way, seed, source, out):
    """(cost, {w: metrics of the one-step student}) of a way with a seed, trained first if it is not there."""
    config, workdir = config_of(way, seed, source), out / f"{way}_{seed}"
    summary = pipeline.run(config, workdir)
    rows = [row for row in summary["rows"] if row["stage"].startswith("stage2") and row["num_steps"] == 1]
    return cost(open_run(config, workdir, create=False)), {row["w"]: row["metrics"] for row in rows}


def spread(values):
    """Mean and, in brackets, standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4g} ({deviation:.2g})"


def main():
    """Prints a row per way and w: cost, Fréchet distance and distance to the reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", default=list(ways_of_rounds.WAYS), choices=list(ways_of_rounds.WAYS))
    parser.add_argument("--from", dest="source", type=pathlib.Path, default=pathlib.Path("runs/digits"))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/rounds"))
    args = parser.parse_args()
    with plain_errors():
        found = {way: [figures(way, seed, args.source, args.out) for seed in args.seeds] for way in args.ways}
    whole = statistics.mean(cost for cost, _ in found[args.ways[0]])
    print(f"one step; mean (standard deviation) over the seeds {args.seeds}; cost as a share of {args.ways[0]}")
    print("| way | cost | w | frechet_classifier | distance to the reference |")
    print("|---|---|---|---|---|")
    for way, runs in found.items():
        share = statistics.mean(cost for cost, _ in runs) / whole
        for w in runs[0][1]:
            frechet, distance = (
                spread([rows[w][name] for _, rows in runs]) for name in ("frechet_classifier", "distance_to_reference")
            )
            print(f"| {way} | {share:.2f} | {w:g} | {frechet} | {distance} |")


if __name__ == "__main__":
    main()
