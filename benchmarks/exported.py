"""Milliseconds of a batch of 16 through each form a student was exported in, beside live jax, in one run.

    python -m benchmarks.exported --export=DIR

DIR is what --mode=export --formats=bundle,stablehlo,onnx,diffusers --with_teacher left; all but the bundle may be
missing. Calls take turns, and the median of each is printed, after warm-up, with the most by which an image differs
from live jax. The teacher, guided with w = 1 by two calls a step as one batch, is beside a loop in PyTorch around
diffusers' DDIMScheduler.
"""

import argparse
import functools
import importlib.util
import pathlib
import statistics
import time
import types

import jax
import numpy as np

import guided_distill
from benchmarks import plain_errors
from guided_distill import generate, samplers
from guided_distill.errors import UserError

BATCH, WARM, TURNS = 16, 3, 30
TEACHER_STEPS = (32, 4)
EXAMPLES = {"stablehlo": "run_stablehlo", "onnx": "run_onnx"}


def example(directory, form):
    """The example of a form in a directory as a module, or None where it is not there."""
    path = directory / f"{EXAMPLES[form]}.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location(EXAMPLES[form], path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def live(model, student, num_steps):
    """The sampler of a student of a bundle, called with noise, label and w on the device it is on."""
    run = generate.compiled(student.model.static(), samplers.SAMPLERS[student.sampler], model.mesh)
    num_steps = np.int32(num_steps)

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
        scale = 1.0 + float(w[0])
        images = pipeline(label.tolist(), guidance_scale=scale, latents=latents, output_type="latent").images
        return images.movedim(1, -1)

    return sample


def teacher_in_diffusers(model, teacher, num_steps):
    """The guided teacher's sampler as diffusers' users write it, called in the same way, or None for what is not known.

    Known is the U-Net of pixels in [-1, 1] that predicts v in float32, by two calls a step, on the CPU.
    """
    made, of = teacher.network, teacher.model
    known = (made["name"], made["dtype"], of.parameterisation, of.data_range, of.calls_per_step)
    if known != ("unet", "float32", "v", 1.0, 2) or jax.devices()[0].platform != "cpu":
        return None
    import torch

    from benchmarks import unet_torch

    side, _, channels = teacher.model.sample_shape
    network = unet_torch.make_unet(types.SimpleNamespace(**made), side, channels)
    unet_torch.load_flax(network.eval(), jax.device_get(teacher.model.params))
    scheduler, logsnr = ddim_scheduler(model.grid), torch.tensor(np.asarray(model.grid.logsnr)[1:])
    scheduler.set_timesteps(num_steps)

    @torch.inference_mode()
    def sample(noise, label, w):
        z, label, w = torch.tensor(noise).movedim(-1, 1), torch.tensor(label).long(), torch.tensor(w)
        labels = torch.cat([label, torch.full_like(label, teacher.model.num_classes)])
        w = w[:, None, None, None]
        for time_index in scheduler.timesteps.tolist():
            both = network(z.repeat(2, 1, 1, 1), logsnr[time_index].expand(len(labels)), labels)
            with_label, without = both.chunk(2)
            v = (1 + w) * with_label - w * without
            z = scheduler.step(v, time_index, z, use_clipped_model_output=True).prev_sample
        return z.movedim(1, -1)

    return sample


def ddim_scheduler(grid):
    """diffusers' scheduler on the points of a grid: its time k is t = (k + 1) / num_intervals, and before 0 is x_hat.

    Told to use_clipped_model_output, it makes eps_hat agree with the clipped x_hat, as our samplers do.
    """
    from diffusers import DDIMScheduler

    alpha_bar = np.square(np.asarray(grid.alpha, np.float64))
    alpha_bar[0] = 1.0
    return DDIMScheduler(
        num_train_timesteps=grid.num_intervals,
        trained_betas=1.0 - alpha_bar[1:] / alpha_bar[:-1],
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=True,
        set_alpha_to_one=True,
    )


def choose_threads(call):
    """Lets PyTorch have as many threads as suit the call best, one or all, and returns how many they are."""
    import torch

    from benchmarks import unet_torch

    seconds = {}
    for threads in unet_torch.thread_counts():
        torch.set_num_threads(threads)
        call()
        seconds[threads] = min(timed(call) for _ in range(WARM))
    best = min(seconds, key=seconds.get)
    torch.set_num_threads(best)
    return best


def image_of(output):
    """x [B, *S] on the host of what a form gives; onnxruntime's outputs have names."""
    return np.asarray(output["x"] if isinstance(output, dict) else output)


def timed(call):
    """Seconds of a call."""
    start = time.perf_counter()
    jax.block_until_ready(call())  # what is not of jax is ready
    return time.perf_counter() - start


def interleaved(calls):
    """{name: median milliseconds} of calls that take turns."""
    taken = {name: [] for name in calls}
    for turn in range(WARM + TURNS):
        for name, call in calls.items():
            milliseconds = 1000 * timed(call)
            if turn >= WARM:
                taken[name].append(milliseconds)
    return {name: statistics.median(values) for name, values in taken.items()}


def print_row(name, student, functions):
    """Times {form: function}, "live" among them, on the same noise and labels at w = 1."""
    given = {
        "noise": np.random.default_rng(0).normal(size=(BATCH, *student.model.sample_shape)).astype(np.float32),
        "label": np.arange(BATCH, dtype=np.int32) % student.model.num_classes,
        "w": np.full(BATCH, np.clip(1.0, *student.w_range), np.float32),
    }
    calls = {form: functools.partial(f, **given) for form, f in functions.items()}
    if "diffusers" in calls:
        call = calls.pop("diffusers")
        calls[f"diffusers on {choose_threads(call)} thread(s)"] = call
    images = {form: image_of(call()) for form, call in calls.items()}
    differs = max(np.abs(x - images["live"]).max() for x in images.values())
    medians = interleaved(calls)
    row = [f"{form} {ms:.2f} ({ms / medians['live']:.2f})" for form, ms in medians.items()]
    print(f"{name}: {', '.join(row)}; images differ by at most {differs:.1e}", flush=True)


def main():
    """Prints a row per student, and per number of steps of the teacher: live, and each form with its ratio to it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", required=True, type=pathlib.Path)
    args = parser.parse_args()
    model = guided_distill.load(args.export)
    forms = {form: module for form in EXAMPLES if (module := example(args.export, form))}
    students = [s for s in model.students if s.num_steps is not None and s.sampler == "deterministic"]
    if not students:
        raise UserError(f"{args.export}: holds no student of a number of deterministic steps")
    print(f"batch {BATCH}, {jax.device_count()} x {jax.devices()[0].platform}; ms, and the ratio to live jax")
    for student in students:
        functions = {"live": live(model, student, student.num_steps)}
        functions |= {form: module.load(f"{student.name}_sampler") for form, module in forms.items()}
        if there := in_diffusers(args.export, student):
            functions["diffusers"] = there
        print_row(student.name, student, functions)
    for teacher in (s for s in model.students if s.series == "teacher"):
        for num_steps in (n for n in TEACHER_STEPS if model.grid.num_intervals % n == 0):
            if there := teacher_in_diffusers(model, teacher, num_steps):
                functions = {"live": live(model, teacher, num_steps), "diffusers": there}
                print_row(f"teacher, {num_steps}x2", teacher, functions)


if __name__ == "__main__":
    with plain_errors():
        main()
