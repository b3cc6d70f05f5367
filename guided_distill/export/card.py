"""README.md of an export: what it is, how to use it, how good it is, and how far it is from what was trained."""

import guided_distill
from guided_distill.export import verify

_BUNDLE = """## With guided_distill

```python
import guided_distill

model = guided_distill.load("{directory}")
x = model.sample(num_steps={num_steps}, w={w:g}, labels=[{labels}], seed=0)
```

`x` is float32 [{num}, {shape}]{bounds}. The images are those that `--mode=sample` makes of the same seed, to
the bit on as many devices and CPU cores.
"""
_STABLEHLO = """## With jax alone

`python run_stablehlo.py {name}_sampler {w:g}` writes 16 samples to samples.npz; jax, and flatbuffers to read
files with, is all that is needed. `stablehlo/stablehlo.json` lists the functions, of each student all its steps
(`..._sampler`) and one evaluation (`..._denoiser`), with their named inputs and outputs. The batch is free, and the
platform cpu, cuda or tpu.
"""
_DIFFUSERS = """## With diffusers

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("{directory}/diffusers/{name}")
image = pipeline("a caption", num_inference_steps={num_steps}, guidance_scale={scale:g}).images[0]
```

`guidance_scale` is 1 + w: stay within 1 + the range of w below, which the pipeline does not check. Every step is one
call of the network, and the negative prompt has no effect. There is no safety checker in these folders: pictures are
shown as the model makes them.
"""
_DIFFUSERS_OF_CLASSES = """## With diffusers

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{directory}/diffusers/{name}", trust_remote_code=True)
images = pipeline([{labels}], guidance_scale={scale:g}).images
```

The folder brings its own pipeline, scheduler and networks as a few hundred lines of PyTorch, which is what
`trust_remote_code` stands for. `guidance_scale` is 1 + w, and one outside the trained range is refused. Every step is
one call of the network. The teacher, if it is here, is in the other formats.
"""
_ONNX = """## With onnxruntime alone

`python run_onnx.py {name}_sampler {w:g}` writes 16 samples to samples.npz; onnxruntime and NumPy are all it needs.
`onnx/onnx.json` lists the functions, of each student all its steps (`..._sampler`) and one evaluation
(`..._denoiser`), with their named inputs and outputs. The batch is free.
"""
_USAGE = {"bundle": _BUNDLE, "stablehlo": _STABLEHLO, "onnx": _ONNX, "diffusers": _DIFFUSERS}


def make_card(experiment, students, formats, verified, licence):
    """The text. `verified` is {format: {name: deviation}}."""
    parts = [_head(experiment, formats, licence), "![Samples, one row a student](samples.png)\n"]
    first = students[0]
    num = min(3, first.model.num_classes)
    low, high = first.w_range
    words = {
        "name": first.name,
        "directory": "DIR",
        "num_steps": first.num_steps,
        "w": min(max(1.0, low), high),
        "scale": 1.0 + min(max(1.0, low), high),
        "labels": ", ".join(map(str, range(num))),
        "num": num,
        "shape": ", ".join(map(str, first.model.sample_shape)),
        "bounds": "" if first.model.data_range is None else f" in ±{first.model.data_range:g}",
    }
    usage = _USAGE if first.model.cond_fields else _USAGE | {"diffusers": _DIFFUSERS_OF_CLASSES}
    parts += [usage[form].format(**words) for form in formats]
    parts += [_table_of_students(students), _table_of_figures(students), _verification(students, verified)]
    return "\n".join(part for part in parts if part)


def title(name):
    """The name of a data set without where it lies on somebody's disk."""
    return name.rpartition("/")[2]


def _head(experiment, formats, licence):
    shape = "×".join(map(str, experiment.data.sample_shape))
    latent = " Samples\nare latents, which the autoencoder they were encoded with turns into pictures"
    there = "; diffusers folders hold it." if "diffusers" in formats else "; it is not here."
    latent = latent + there if experiment.latent_model else ""
    return (
        f"# Few-step diffusion students of {title(experiment.data.name)}\n\n"
        f"Distilled with guidance (arXiv 2210.03142): a few network calls, for every guidance strength w of the\n"
        f"range below, where w = 0 is no guidance. Samples {shape}, {experiment.data.num_classes} classes.{latent}\n\n"
        f"Licence of weights and data: {licence or 'not stated by who exported this'}. Written by guided_distill "
        f"{guided_distill.__version__}.\n"
    )


def _table_of_students(students):
    lines = ["## What is here\n", "| name | steps | network calls a step | sampler | w |", "|---|---|---|---|---|"]
    for student in students:
        low, high = student.w_range
        steps, calls = student.num_steps or "any divisor of the grid", student.model.calls_per_step
        lines.append(f"| {student.name} | {steps} | {calls} | {student.sampler} | {low:g} to {high:g} |")
    return "\n".join(lines) + "\n"


def _table_of_figures(students):
    rows = [(student.name, row) for student in students for row in student.figures]
    metrics = sorted({name for _, row in rows for name in row["metrics"]})
    if not metrics:
        return "## Figures\n\nNone: the run was not evaluated.\n"
    measured = {(row.get("feature_network"), row.get("reference"), row.get("num_samples")) for _, row in rows}
    by = "; ".join(f"{network}, against {reference}, {num} samples" for network, reference, num in sorted(measured))
    head = ["name", "sampler", "steps", "calls", "w", *metrics]
    lines = ["## Figures\n", f"Measured by {by}.\n", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, row in rows:
        values = [row["metrics"].get(metric) for metric in metrics]
        cells = [name, row["sampler"], row["num_steps"], row["nfe"], f"{row['w']:g}"]
        cells += ["" if value is None else f"{value:.4g}" for value in values]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _verification(students, verified):
    lines = [
        "## Deviation from what was trained\n",
        "Each artefact was loaded in a fresh process and compared with the live student on the CPU: several w, batches",
        f"of {' and '.join(map(str, verify.BATCHES))} (of 1 in diffusers), the same noise; the largest difference, "
        "relative to the largest value where that is above 1.\n",
        "| format | name | deviation | at most |",
        "|---|---|---|---|",
    ]
    for form, deviations in verified.items():
        for name, deviation in deviations.items():
            student = next(s for s in students if name in (s.name, f"{s.name}_sampler", f"{s.name}_denoiser"))
            lines.append(f"| {form} | {name} | {deviation:.1e} | {verify.bound(form, student):g} |")
    return "\n".join(lines) + "\n"
