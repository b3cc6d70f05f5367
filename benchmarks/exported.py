"""Milliseconds of a batch of 16 through each form a student was exported in, beside live jax, in one run.

    python -m benchmarks.exported --export=DIR

DIR is what --mode=export --formats=bundle,stablehlo,onnx,diffusers left; all but the bundle may be missing.
Calls take turns, and the median of each is printed, after warm-up.
"""

import argparse
import functools
import importlib.util
import pathlib
import statistics
import sys
import time

import jax
import numpy as np

import guided_distill
from guided_distill import generate, samplers

BATCH, WARM, TURNS = 16, 3, 30
EXAMPLES = {"stablehlo": "run_stablehlo", "onnx": "run_onnx"}


def example(directory, form):
    """The example of a form in a directory as a module, or None where it is not there."""
    path = directory / f"{EXAMPLES[form]}.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location(EXAMPLES[form], path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def live(model, student):
    """The sampler of a student of a bundle, called with noise, label and w on the device it is on."""
    run = generate.compiled(student.model.static(), samplers.SAMPLERS[student.sampler], model.mesh)
    num_steps = np.int32(student.num_steps)

    def sample(noise, label, w):
        return run(student.model.params, model.grid, None, {"label": label, "w": w}, num_steps, noise)

    return sample


def in_diffusers(directory, student):
    """The student in its pipeline of diffusers, called in the same way, or None where it is not there."""
    folder = directory / "diffusers" / student.name
    if not folder.exists():
        return None
    import torch
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)

    def sample(noise, label, w):
        latents = torch.tensor(noise).movedim(-1, 1)
        return pipeline(label.tolist(), guidance_scale=1.0 + float(w[0]), latents=latents, output_type="latent").images

    return sample


def interleaved(calls):
    """{name: median milliseconds} of calls that take turns."""
    taken = {name: [] for name in calls}
    for turn in range(WARM + TURNS):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())  # what is not of jax is ready
            if turn >= WARM:
                taken[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in taken.items()}


def main():
    """Prints a row per student: live, and each form with its ratio to it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", required=True, type=pathlib.Path)
    args = parser.parse_args()
    model = guided_distill.load(args.export)
    forms = {form: module for form in EXAMPLES if (module := example(args.export, form))}
    students = [s for s in model.students if s.num_steps is not None and s.sampler == "deterministic"]
    if not students:
        sys.exit(f"{args.export}: holds no student of a number of deterministic steps")
    print(f"batch {BATCH}, {jax.device_count()} x {jax.devices()[0].platform}; ms, and the ratio to live jax")
    for student in students:
        shape = (BATCH, *student.model.sample_shape)
        given = {
            "noise": np.random.default_rng(0).normal(size=shape).astype(np.float32),
            "label": np.arange(BATCH, dtype=np.int32) % student.model.num_classes,
            "w": np.full(BATCH, np.clip(1.0, *student.w_range), np.float32),
        }
        functions = {"live": live(model, student)}
        functions |= {form: module.load(f"{student.name}_sampler") for form, module in forms.items()}
        if there := in_diffusers(args.export, student):
            functions["diffusers"] = there
        medians = interleaved({form: functools.partial(f, **given) for form, f in functions.items()})
        row = [f"{form} {ms:.2f} ({ms / medians['live']:.2f})" for form, ms in medians.items()]
        print(f"{student.name}: {', '.join(row)}", flush=True)


if __name__ == "__main__":
    main()
