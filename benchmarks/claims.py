"""Holds a finished run against the paper's claim on its own data: what was reached beside each bound.

    python -m benchmarks.claims runs/digits [--bounds=mnist|emoji_text|cifar10]

Exits with 1 when a bound is missed. "floor" is the noise floor of summary.json.
"""

import argparse
import pathlib
import sys

from benchmarks import plain_errors
from guided_distill.errors import UserError
from guided_distill.files import read_json

# Fréchet distance of the N-step student, at most this many times the reference teacher's, plus the floor.
REFERENCE_BOUNDS = {"digits": {4: 1.15, 2: 1.3}, "mnist": {4: 1.3, 2: 2.0}}
TEACHER_BOUNDS = {2: 0.8, 1: 0.5}  # ... and this many times the teacher's own at the same N x 2
DISTANCE_BOUND = 0.5  # of the distance to the reference images, against the teacher's own at the same N x 2
AGREEMENT_MARGIN = 0.02
# Of the KID of the student of captions over the reference teacher's, besides what other samples of it would change.
KID_MARGIN = 1e-3
RETRIEVAL_MARGIN = 0.03


def checks(summary, bounds):
    """[(what, reached, bound, held)] for every claim."""
    rows = {(row["model"], row["stage"], row["num_steps"], row["w"]): row["metrics"] for row in summary["rows"]}
    reference_steps = max(row["num_steps"] for row in summary["rows"])
    floor = summary["noise_floor"]

    def student(n, w):
        return rows["student", f"stage2_det_{n:04d}", n, w]

    def teacher(n, w):
        return rows["teacher", "teacher", n, w]

    def at_most(what, value, bound):
        return what, value, bound, value <= bound

    found = [
        ("classifier, held-out accuracy", summary["classifier_test_accuracy"], 0.97,
         summary["classifier_test_accuracy"] >= 0.97),
        ("label agreement, reference, w 1", teacher(reference_steps, 1.0)["label_agreement"], 0.97,
         teacher(reference_steps, 1.0)["label_agreement"] >= 0.97),
    ]  # fmt: skip
    for w in sorted({row["w"] for row in summary["rows"]}):
        reference = teacher(reference_steps, w)
        for n, factor in REFERENCE_BOUNDS[bounds].items():
            bound = factor * reference["frechet_classifier"] + floor
            name = f"frechet, {n} steps, w {w:g}: {factor} x reference + floor"
            found.append(at_most(name, student(n, w)["frechet_classifier"], bound))
        for n, factor in TEACHER_BOUNDS.items():
            bound = factor * teacher(n, w)["frechet_classifier"]
            name = f"frechet, {n} steps, w {w:g}: {factor} x teacher {n}x2"
            found.append(at_most(name, student(n, w)["frechet_classifier"], bound))
        for n in (4, 2):
            bound = DISTANCE_BOUND * teacher(n, w)["distance_to_reference"]
            name = f"distance, {n} steps, w {w:g}: {DISTANCE_BOUND} x teacher {n}x2"
            found.append(at_most(name, student(n, w)["distance_to_reference"], bound))
        for n in (4, 2, 1):
            agreement, asked = student(n, w)["label_agreement"], reference["label_agreement"]
            low = asked - AGREEMENT_MARGIN
            found.append((f"label agreement, {n} steps, w {w:g}: at least", agreement, low, agreement >= low))
            if w == 0.0:
                high = asked + AGREEMENT_MARGIN
                found.append(at_most(f"label agreement, {n} steps, w 0: at most", agreement, high))
    return found


def caption_checks(summary, num_steps=4):
    """The same of a run on captioned pictures: its student of `num_steps` steps, by EfficientNet-Lite0."""
    rows = {(row["model"], row["num_steps"], row["w"]): row["metrics"] for row in summary["rows"]
            if row["stage"] != "stage1"}  # fmt: skip
    reference_steps, found = max(row["num_steps"] for row in summary["rows"]), []
    kid, retrieval = "kid_efficientnet_lite0", "retrieval_efficientnet_lite0"
    for w in sorted({row["w"] for row in summary["rows"]}):
        student, teacher = rows["student", num_steps, w], rows["teacher", reference_steps, w]
        for what, value, bound in (
            ("kid: reference + error + 1e-3", student[kid], teacher[kid] + student[f"{kid}_se"] + KID_MARGIN),
            (f"distance: {DISTANCE_BOUND} x teacher {num_steps}x2", student["distance_to_reference"],
             DISTANCE_BOUND * rows["teacher", num_steps, w]["distance_to_reference"]),
            ("retrieval, off the reference's", abs(student[retrieval] - teacher[retrieval]), RETRIEVAL_MARGIN),
        ):  # fmt: skip
            name, _, rest = what.partition(":")
            found.append((f"{name}, {num_steps} steps, w {w:g}:{rest}", value, bound, value <= bound))
    return found


def natural_checks(summary):
    """The same of a run on CIFAR-10: its deterministic students of 4 and 8 steps, by EfficientNet-Lite0."""
    name = "frechet_efficientnet_lite0"
    rows = {(row["stage"], row["num_steps"], row["w"]): row["metrics"][name] for row in summary["rows"]}
    reference_steps, found = max(row["num_steps"] for row in summary["rows"]), []
    for w in sorted({w for stage, steps, w in rows if (stage, steps) == ("teacher", reference_steps)}):
        of_reference = ((4, 1.2 if w else 1.4, reference_steps), (8, 1.1, reference_steps))
        for n, factor, of in (*of_reference, (4, 0.7, 4)):
            reached, bound = rows[f"stage2_det_{n:04d}", n, w], factor * rows["teacher", of, w]
            found.append((f"frechet, {n} steps, w {w:g}: {factor} x teacher {of}x2", reached, bound, reached <= bound))
    return found


OTHERS = {"emoji_text": caption_checks, "cifar10": natural_checks}


def summary_of(workdir):
    """What summary.json of an evaluated run holds. Raises UserError where there is none."""
    path = workdir / "summary.json"
    if not path.exists():
        raise UserError(
            f"{path} is not there: {workdir} is no run, or one that is not evaluated; its training command goes on"
        )
    return read_json(path)


def of_run(workdir, bounds):
    """[(what, reached, bound, held)] of an evaluated run. Raises UserError where its evaluation lacks what they ask."""
    summary = summary_of(workdir)
    try:
        found = OTHERS[bounds](summary) if bounds in OTHERS else checks(summary, bounds)
    except KeyError as missing:
        raise UserError(
            f"{workdir}/summary.json has no {missing}, which --bounds={bounds} asks for: the run is of another config, "
            "or its evaluation is not finished"
        ) from missing
    if not found:
        raise UserError(f"{workdir}/summary.json has no row that --bounds={bounds} asks for")
    return found


def main():
    """Prints every claim with what was reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--bounds", choices=[*REFERENCE_BOUNDS, *OTHERS], default="digits")
    args = parser.parse_args()
    with plain_errors():
        found = of_run(args.workdir, args.bounds)
    for what, reached, bound, held in found:
        print(f"{'ok    ' if held else 'MISSED'}  {what:55s}  {reached:9.4f}  bound {bound:9.4f}")
    missed = sum(not held for *_, held in found)
    print(f"{len(found) - missed} of {len(found)} hold")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
