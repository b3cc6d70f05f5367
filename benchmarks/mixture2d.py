"""The two-dimensional experiment beside its exact answer: errors of every student, and three pictures.

    python -m guided_distill.main --config=configs/mixture2d.py
    python -m benchmarks.mixture2d runs/mixture2d

Prints, for each w and N, the largest error over the classes of the student's mean and standard deviation, relative to
its teacher's at the first N and to the guided ODE's (solved in float64), all from the same noise; exits with 1 when a
bound is missed. The teacher is a closed form, so nothing here is the fault of an imperfect teacher.
"""

import argparse
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import plain_errors
from guided_distill import analytic, diffusion, generate, pictures, plots, workdir
from guided_distill.errors import UserError
from guided_distill.files import read_json
from guided_distill.samplers import image_keys, initial_noise, predict

BOUNDS = {0.0: 0.05, 0.3: 0.05, 1.0: 0.05, 2.0: 0.05, 4.0: 0.10}  # of the one-step student, by w
_SEED = 7
_NUM = 6000  # samples a figure
_PATHS = 40


def samples_of(run, stage, w, num_steps):
    """(x [n, 2], label [n]) of a stage from the benchmark's noise, class after class."""
    labels = np.arange(_NUM) % stage.model.num_classes
    batches = generate.sample_images(
        stage.model,
        run.params_of(stage),
        run.grid,
        run.mesh,
        seed=_SEED,
        num=_NUM,
        w=w,
        num_steps=num_steps,
        batch_size=_NUM,
        labels=labels,
    )
    _, label, x = (np.concatenate(values) for values in zip(*batches, strict=True))
    return x, label


def exact_samples(run, w):
    """The same from the guided ODE."""
    noise = initial_noise(image_keys(_SEED, jnp.arange(_NUM)), (2,))
    label = np.arange(_NUM) % run.outside.num_classes
    return analytic.solve_guided_ode(run.outside, noise, {"label": label, "w": np.full(_NUM, w)}, 125)


def moment_errors(x, truth, label):
    """(error of the mean, of the std) of the worst class, relative to the truth's own."""
    errors = []
    for c in np.unique(label):
        ours, theirs = x[label == c], truth[label == c]
        mean = np.linalg.norm(ours.mean(0) - theirs.mean(0)) / np.linalg.norm(theirs.mean(0))
        std = np.abs(ours.std(0) / theirs.std(0) - 1.0).max()
        errors.append((mean, std))
    return np.max(errors, axis=0)


def measure(run):
    """{(w, N): {"teacher": errors, "ode": errors, "rms": rms distance to the ODE's end points}} of all students."""
    first = run.stages[0]
    found = {}
    for w in run.experiment.evaluate.w:
        reference, label = samples_of(run, first, w, first.num_steps)
        exact = exact_samples(run, w)
        gap = moment_errors(reference, exact, label)
        print(f"w {w:g}: teacher {first.num_steps}x2 to the ODE: mean {100 * gap[0]:.2f} %, std {100 * gap[1]:.2f} %")
        found[w, "exact"] = (exact, label)
        for stage in run.stages[1:]:
            num_steps = stage.num_steps
            x, _ = samples_of(run, stage, w, num_steps)
            found[w, num_steps if stage.series else 0] = row = {
                "teacher": moment_errors(x, reference, label),
                "ode": moment_errors(x, exact, label),
                "rms": float(np.sqrt(np.mean((x - exact) ** 2))),
                "samples": x,
            }
            print(
                f"  {stage.name:18s} mean {100 * row['teacher'][0]:6.2f} %  std {100 * row['teacher'][1]:6.2f} % "
                f" of the teacher's;  mean {100 * row['ode'][0]:6.2f} %  std {100 * row['ode'][1]:6.2f} % of the ODE's;"
                f"  rms distance {row['rms']:.4f}",
                flush=True,
            )
    return found


def teacher_curve(run, w, steps, exact):
    """RMS distance of the teacher's own DDIM to the ODE's end points `exact`, for each number of steps."""
    first = run.stages[0]
    return [float(np.sqrt(np.mean((samples_of(run, first, w, n)[0] - exact) ** 2))) for n in steps]


def draw(run, found, out):
    """Writes densities.png, errors.png and trajectories.png."""
    strengths, data = run.experiment.evaluate.w, run.dataset.train
    label = found[strengths[0], "exact"][1]
    panels = [(f"exact flow, w = {w:g}", found[w, "exact"][0], label) for w in strengths]
    panels += [(f"student, 1 call, w = {w:g}", found[w, 1]["samples"], label) for w in strengths]
    title = "What guidance makes of the data (grey), and what one network call makes of guidance"
    pictures.save_png(out / "densities.png", plots.guided_densities(panels, data.images[:3000], title=title))

    steps = [stage.num_steps for stage in run.stages if stage.series]
    curves = {}
    for w in strengths:
        curves[f"teacher, w = {w:g}"] = (steps, teacher_curve(run, w, steps, found[w, "exact"][0]))
        curves[f"student, w = {w:g}"] = (steps, [found[w, n]["rms"] for n in steps])
    title = "Distance to the exact guided flow from the same noise"
    picture = plots.error_against_steps(curves, title=title, ylabel="rms distance of samples")
    pictures.save_png(out / "errors.png", picture)
    pictures.save_png(out / "trajectories.png", _trajectories(run, strengths[-1]))


def _trajectories(run, w):
    model, params = run.stages[0].model, run.outside.params
    z = initial_noise(image_keys(_SEED, jnp.arange(_PATHS)), (2,))
    cond = {"label": jnp.arange(_PATHS) % model.num_classes, "w": jnp.full(_PATHS, w)}
    denoiser, steps = model.denoiser(params), run.grid.num_intervals

    def step(z, i):
        prediction = predict(denoiser, z, run.grid.at(i), cond)
        after = run.grid.at(i - 1)
        return diffusion.ddim_step(prediction, after.alpha, after.sigma), z

    last, path = jax.jit(lambda z: jax.lax.scan(step, z, jnp.arange(steps, 0, -1)))(z)
    paths = np.concatenate([np.asarray(path), np.asarray(last)[None]])
    title = f"The teacher's {steps} steps from noise (hollow) to sample, w = {w:g}"
    return plots.trajectories(paths, np.asarray(cond["label"]), title=title)


def run_of(directory):
    """The finished run of configs/mixture2d.py in a workdir. Raises UserError where there is none."""
    path = directory / "config.json"
    run = workdir.open_run(read_json(path), directory, create=False) if path.exists() else None
    if run is None or run.outside is None:
        raise UserError(f"{directory} is no run of configs/mixture2d.py; train it first")
    run.require_finished()
    return run


def main():
    """Prints every error and draws the pictures beside the run's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=pathlib.Path)
    args = parser.parse_args()
    with plain_errors():
        run = run_of(args.workdir)
        found = measure(run)
        draw(run, found, args.workdir)
    missed = 0
    for w, bound in BOUNDS.items():
        if (w, 1) in found:
            worst = max(found[w, 1]["teacher"])
            missed += worst > bound
            print(f"{'ok    ' if worst <= bound else 'MISSED'}  one step, w {w:g}: {worst:.3f} (bound {bound})")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
