"""Progressive against consistency distillation on the digits: what each reaches for as many network evaluations.

    python -m guided_distill.main --config=configs/digits.py
    python -m benchmarks.consistency [--shares .25 .5 1] [--seeds 0] [--from runs/digits] [--out runs/consistency]

Both start from one teacher, have the same network, data and batches, and learn the same 32 steps of the same guided
teacher. Cost is the forward passes of one image, a backward pass counted as two, as a share of what stages one and two
of configs/digits.py cost: progressive distillation pays for stage one and for all rounds down to the number of steps,
consistency distillation once for all of them. Runs that are there already are not repeated.
"""

import argparse
import pathlib
import statistics

from benchmarks import plain_errors
from benchmarks.rounds import spread
from configs import digits
from guided_distill import pipeline
from guided_distill.experiment import from_config
from guided_distill.stages import make_stages
from guided_distill.workdir import open_run

STEPS = (4, 2, 1)
WAYS = ("progressive", "consistency")


def config_of(way, share, seed, source):
    """The config of a way at a share of the cost of configs/digits.py after its teacher."""
    config = digits.get_config()
    config.seed = seed
    config.teacher.checkpoint = str(source)
    config.evaluate.update(num_samples=500, num_steps=STEPS)
    config.log.sample_every = 0
    if way == "progressive":
        for stage, key in (("stage1", "updates"), ("stage2", "updates"), ("stage2", "final_updates")):
            config[stage][key] = round(share * config[stage][key])
    else:
        whole = cost_of(make_stages(from_config(config.to_dict())), 1)
        # LCM's decay, where TRACT's .5 is the default.
        config.stage2.update(series=("consistency",), self_ema=0.95)
        per_update = make_stages(from_config(config.to_dict()))[-1].work_per_update
        config.stage2.final_updates = round(share * whole / per_update)
    return config.to_dict()


def cost_of(stages, num_steps):
    """Forward passes of one image that all stages after the teacher make to have a student of so many steps."""
    needed = (stage for stage in stages[1:] if stage.any_steps or stage.num_steps >= num_steps)
    return sum(stage.work_per_update * stage.training.updates for stage in needed)


def measured(way, share, seed, source, out):
    """({N: cost}, rows of the summary) of a way at a share of the cost, trained first if it is not there."""
    config, workdir = config_of(way, share, seed, source), out / f"{way}_{share:g}_{seed}"
    summary = pipeline.run(config, workdir)
    stages = open_run(config, workdir, create=False).stages
    return {n: cost_of(stages, n) for n in STEPS}, summary["rows"]


def frechet(rows, model, num_steps, w):
    """The Fréchet distance of the teacher's, or of the distilled student's, row."""
    (value,) = (
        row["metrics"]["frechet_classifier"]
        for row in rows
        if (row["model"], row["num_steps"], row["w"]) == (model, num_steps, w) and row["stage"] != "stage1"
    )
    return value


def print_row(*cells):
    """A row of a Markdown table."""
    print(f"| {' | '.join(cells)} |")


def main():
    """Prints a row per number of steps, way and share: cost, and the Fréchet distance at each w."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--from", dest="source", type=pathlib.Path, default=pathlib.Path("runs/digits"))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/consistency"))
    args = parser.parse_args()
    with plain_errors():
        found = {
            (way, share): [measured(way, share, seed, args.source, args.out) for seed in args.seeds]
            for share in args.shares
            for way in WAYS
        }
    config = digits.get_config()
    whole = cost_of(make_stages(from_config(config.to_dict())), 1)
    print(f"frechet_classifier, mean (standard deviation) over the seeds {args.seeds}; cost of 1: {whole:.3g} passes")
    strengths = config.evaluate.w
    print_row("steps", "way", "share", "cost", *(f"w = {w:g}" for w in strengths))
    print_row(*["---"] * (4 + len(strengths)))
    runs = next(iter(found.values()))
    for steps in (config.stage2.teacher_steps, *STEPS):
        values = [spread([frechet(rows, "teacher", steps, w) for _, rows in runs]) for w in strengths]
        print_row(f"{steps}x2", "teacher", "-", "-", *values)
    for steps in STEPS:
        for (way, share), runs in found.items():
            cost = statistics.mean(costs[steps] for costs, _ in runs) / whole
            values = [spread([frechet(rows, "student", steps, w) for _, rows in runs]) for w in strengths]
            print_row(str(steps), way, f"{share:g}", f"{cost:.2f}", *values)


if __name__ == "__main__":
    main()
