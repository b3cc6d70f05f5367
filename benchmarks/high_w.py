"""Where few-step students fall behind their teacher as guidance grows: by w and N, on the figures of a finished run.

    python -m guided_distill.main --config=configs/digits.py --mode=evaluate --config.evaluate.w="(0.0,1.0,2.0,3.0,4.0)"
    python -m benchmarks.high_w runs/digits [--series det]

Prints, for each w and N, the student's Fréchet distance, saturation and diversity beside the reference teacher's, and
its distance to the reference's images; draws them as high_w.png in the workdir.
"""

import argparse
import pathlib

from benchmarks import plain_errors
from benchmarks.claims import summary_of
from guided_distill import pictures, plots

_SHOWN = {
    "frechet_classifier": "Fréchet distance",
    "distance_to_reference": "distance to the reference's images",
    "saturation": "saturation: share of values at an end",
    "diversity": "diversity within a label",
}


def figures(summary, series):
    """{(N, w): metrics} of the students of a series, the reference teacher's under N = 0."""
    teachers = [row for row in summary["rows"] if row["model"] == "teacher" and row["sampler"] == "deterministic"]
    most = max(row["num_steps"] for row in teachers)
    found = {(0, row["w"]): row["metrics"] for row in teachers if row["num_steps"] == most}
    students = [row for row in summary["rows"] if row["stage"].rpartition("_")[0] == f"stage2_{series}"]
    return found | {(row["num_steps"], row["w"]): row["metrics"] for row in students}


def main():
    """Prints the table, draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--series", default="det")
    args = parser.parse_args()
    with plain_errors():
        found = figures(summary_of(args.workdir), args.series)
    steps, strengths = (sorted({key[k] for key in found}) for k in (0, 1))

    def value(n, w, name):
        return found.get((n, w), {}).get(name, float("nan"))  # rows need not be a full rectangle

    print("| calls | w | " + " | ".join(_SHOWN) + " |\n" + "|---" * (2 + len(_SHOWN)) + "|")
    for w in strengths:
        for n in steps:
            values = (f"{value(n, w, name):.3g}" for name in _SHOWN)
            print(f"| {n or 'reference'} | {w:g} | {' | '.join(values)} |")
    names = {n: f"student, {n}" if n else "reference teacher" for n in steps}
    panels = {
        title: {names[n]: (strengths, [value(n, w, name) for w in strengths]) for n in steps}
        for name, title in _SHOWN.items()
    }
    picture = plots.values_against_w(panels, title="Few-step students as guidance grows")
    pictures.save_png(args.workdir / "high_w.png", picture)
    print(f"{args.workdir / 'high_w.png'}")


if __name__ == "__main__":
    main()
