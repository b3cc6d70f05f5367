"""Artefacts loaded back in a fresh process and compared with the live students, on the CPU wherever they were trained.

There the two processes cannot compete for an accelerator, and the figures do not depend on whose machine it was.
"""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np

import guided_distill
from guided_distill import generate, samplers, sharding
from guided_distill.errors import UserError
from guided_distill.export import onnx, stablehlo

BATCHES = (2, 5)
_BOUNDS = {
    "bundle": {"float32": 0.0, "bfloat16": 0.0},
    "stablehlo": {"float32": 1e-5, "bfloat16": 0.1},
    "onnx": {"float32": 1e-4},
    "diffusers": {"float32": 1e-4, "bfloat16": 0.1},
}
_ROUNDED = 0.5  # of a pipeline that goes through other times than those trained at: only a different model is further
_LOGSNRS = (-20.0, -3.0, 0.0, 3.0, 20.0)

_OF_BUNDLE = """
import json, sys
import numpy as np
import guided_distill

directory, calls, out = sys.argv[1:]
model = guided_distill.load(directory)
np.savez(out, **{name: model.sample(**call) for name, call in json.load(open(calls)).items()})
"""

# The directory comes first on the path, so that this is the example as it was written; no code of ours is loaded.
_OF_EXAMPLE = """
import json, sys
import numpy as np

directory, inputs, out = sys.argv[1:]
sys.path.insert(0, directory)
import {example} as example

given = np.load(inputs)
made = {{}}
for name, about in example.FUNCTIONS.items():
    function = example.load(name)
    for batch in (2, 5):
        outputs = function(**{{key: given[f"{{name}}/{{key}}"][:batch] for key in about["inputs"]}})
        outputs = outputs if isinstance(outputs, dict) else {{"x": outputs}}
        made |= {{f"{{name}}/{{batch}}/{{key}}": value for key, value in outputs.items()}}
assert not {{{without}}} & sys.modules.keys()
np.savez(out, **made)
"""


# Noise and embedded captions go in, latents come out; every call of the network is counted.
_OF_DIFFUSERS = """
import pathlib, sys
import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline

directory, inputs, out = sys.argv[1:]
given, made = np.load(inputs), {}
names = sorted({key.split("/")[0] for key in given.files})
for name in names:
    folder = pathlib.Path(directory) / "diffusers" / name
    of_classes = f"{name}/label" in given
    if of_classes:
        pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    else:
        kind = StableDiffusionInpaintPipeline if f"{name}/masked" in given else StableDiffusionPipeline
        pipeline = kind.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    calls = []
    pipeline.unet.register_forward_hook(lambda module, args, result: calls.append(len(args[0])))
    steps, count = int(given[f"{name}/num_steps"]), len(given[f"{name}/w"])
    for i in range(count):
        calls.clear()

        def channels_first(key):
            return torch.tensor(np.moveaxis(given[f"{name}/{key}"][i : i + 1], -1, 1).copy())

        hole = {}
        if f"{name}/masked" in given:
            mask = channels_first("mask").repeat_interleave(pipeline.vae_scale_factor, 2)
            mask = mask.repeat_interleave(pipeline.vae_scale_factor, 3)
            hole = {"image": mask.repeat(1, 3, 1, 1), "mask_image": mask, "strength": 1.0}
            hole |= {"masked_image_latents": channels_first("masked"), "height": mask.shape[2], "width": mask.shape[3]}
        asked = {"class_labels": [int(given[f"{name}/label"][i])]} if of_classes else {
            "prompt_embeds": torch.tensor(given[f"{name}/text"][i : i + 1])
        }
        latents = pipeline(
            latents=channels_first("noise"),
            num_inference_steps=steps,
            guidance_scale=1.0 + float(given[f"{name}/w"][i]),
            output_type="latent",
            **asked,
            **hole,
        ).images
        assert calls == [1] * steps, f"{calls} calls of the network for {steps} steps"
        made[f"{name}/{i}"] = np.moveaxis(latents.numpy(), 1, -1)
    if of_classes:
        drawn = pipeline([0, 0], output_type="np").images
        assert drawn.shape[0] == 2 and np.isfinite(drawn).all() and np.ptp(drawn, axis=0).max() > 0.0, drawn.shape
np.savez(out, **made)
"""


def bound(form, student):
    """The largest deviation that an artefact of this form may have from the live student."""
    if form == "diffusers" and student.model.cond_fields and student.model.schedule.num_betas % student.num_steps:
        return _ROUNDED
    dtype = (student.network or {}).get("dtype", "float32")
    return _BOUNDS[form][dtype]


def bundle(directory, students, grid, batch_size):
    """{name: deviation} of the bundle in a directory, loaded in a fresh process, from the live students.

    Several w, two numbers of images, noise of one seed, labels drawn and given.
    """
    mesh = sharding.make_mesh(_cpus())
    grid, calls, deviations = sharding.place(mesh, jax.device_get(grid)), {}, {}
    for student in students:
        for num, w in zip((*BATCHES, BATCHES[0]), _strengths(student), strict=True):
            labels = None if num == BATCHES[0] else [k % student.model.num_classes for k in range(num)]
            call = {"num_steps": student.steps(None, grid), "w": w, "num": num, "labels": labels, "seed": 1}
            calls[f"{student.name}/{w:g}/{num}"] = call | {"series": student.series}
    made = _in_a_fresh_process(_OF_BUNDLE, directory, json.dumps(calls).encode(), {"PYTHONPATH": _where_we_are()})
    for student in students:
        live = _on(mesh, student)
        for name, call in calls.items():
            if name.startswith(f"{student.name}/"):
                options = {key: value for key, value in call.items() if key != "series"}
                x = live.sample(grid, mesh, batch_size=batch_size, **options)
                deviations[student.name] = max(deviations.get(student.name, 0.0), deviation(made[name], x))
    return deviations


def stablehlos(directory, students, grid):
    """{function: deviation} of the StableHLO in a directory, run by jax alone, from the live samplers and denoisers.

    Two batch sizes, several w in each batch, the same noise.
    """
    program = _OF_EXAMPLE.format(example=stablehlo.EXAMPLE.removesuffix(".py"), without="'guided_distill'")
    return _functions(program, directory, students, grid)


def onnxs(directory, students, grid):
    """As `stablehlos`, of the ONNX in a directory, run by onnxruntime alone."""
    program = _OF_EXAMPLE.format(example=onnx.EXAMPLE.removesuffix(".py"), without="'guided_distill', 'jax'")
    return _functions(program, directory, students, grid)


def _functions(program, directory, students, grid):
    mesh = sharding.make_mesh(_cpus()[:1])
    grid, inputs, expected = sharding.place(mesh, jax.device_get(grid)), {}, {}
    for student in students:
        live = _on(mesh, student)
        given = _inputs(live)
        for kind, function in (("sampler", _live_sampler(live, grid, mesh)), ("denoiser", _live_denoiser(live))):
            named = getattr(stablehlo, f"{kind}_inputs")(live)
            inputs |= {f"{student.name}_{kind}/{key}": given[key] for key in named}
            for batch in BATCHES:
                outputs = function(**{key: given[key][:batch] for key in named})
                expected |= {f"{student.name}_{kind}/{batch}/{key}": value for key, value in outputs.items()}
    made, deviations = _in_a_fresh_process(program, directory, inputs, {}), {}
    for name, value in expected.items():
        function = name.partition("/")[0]
        deviations[function] = max(deviations.get(function, 0.0), deviation(made[name], value))
    return deviations


def pipelines(directory, students, grid):
    """{name: deviation} of what pipelines end with, latents or pixels, from that of the live samplers.

    The same noise, text embedded at random or classes, several w, one picture at a time. Pipelines of classes also
    draw two pictures by themselves. Raises UserError where a pipeline calls its network more than once a step.
    """
    mesh = sharding.make_mesh(_cpus()[:1])
    grid, inputs, expected = sharding.place(mesh, jax.device_get(grid)), {}, {}
    for student in students:
        live, strengths = _on(mesh, student), np.asarray(_strengths(student), np.float32)
        num, rng = len(strengths), np.random.default_rng(0)
        fields = [(name, shape) for name, shape, _ in student.model.cond_fields if name != "null_text"]
        fields.append(("noise", student.model.sample_shape))
        given = {name: rng.normal(size=(num, *shape)).astype(np.float32) for name, shape in fields} | {"w": strengths}
        if not student.model.cond_fields:
            given["label"] = np.arange(num, dtype=np.int32) % student.model.num_classes
        if "mask" in given:
            given["mask"] = (given["mask"] > 0.0).astype(np.float32)
        run = generate.compiled(live.model.static(), samplers.SAMPLERS[student.sampler], mesh)
        cond = {name: values for name, values in given.items() if name != "noise"}
        expected[student.name] = run(live.model.params, grid, None, cond, np.int32(student.num_steps), given["noise"])
        inputs |= {f"{student.name}/{name}": values for name, values in given.items()}
        inputs[f"{student.name}/num_steps"] = np.int32(student.num_steps)
    made = _in_a_fresh_process(_OF_DIFFUSERS, directory, inputs, {})
    return {
        name: max(deviation(made[f"{name}/{i}"], x[i : i + 1]) for i in range(len(x))) for name, x in expected.items()
    }


def deviation(ours, theirs):
    """max |ours - theirs|, relative to the largest of theirs where that is above 1; inf where one is not finite."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return float("inf")
    return float(np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max()))


def _cpus():
    try:
        return jax.devices("cpu")
    except RuntimeError as error:
        raise UserError("exports are verified on the CPU, which JAX_PLATFORMS leaves out; add cpu to it") from error


def _where_we_are():
    ours = str(pathlib.Path(guided_distill.__file__).parents[1])
    return os.pathsep.join(filter(None, [ours, os.environ.get("PYTHONPATH")]))


def _on(mesh, student):
    params = sharding.place(mesh, jax.device_get(student.model.params))
    return dataclasses.replace(student, model=dataclasses.replace(student.model, params=params))


def _strengths(student):
    low, high = student.w_range
    return [low, low + 0.3 * (high - low), high]


def _inputs(student):
    """What the functions are given, for the largest batch, on the host."""
    model, num = student.model, max(BATCHES)
    keys = samplers.image_keys(1, np.arange(num))
    noise = np.asarray(samplers.initial_noise(keys, model.sample_shape, model.schedule.prior_std))
    return {
        "noise": noise,
        "z": noise,
        "logsnr": np.asarray(_LOGSNRS, np.float32),
        "label": np.arange(num, dtype=np.int32) % model.num_classes,
        "w": np.resize(np.asarray(_strengths(student), np.float32), num),
        "keys": np.asarray(jax.random.key_data(keys)),
    }


def _live_sampler(student, grid, mesh):
    model = student.model
    run = generate.compiled(model.static(), samplers.SAMPLERS[student.sampler], mesh)
    num_steps = np.int32(student.steps(None, grid))

    def sample(noise, label, w, keys=None):
        keys = None if keys is None else jax.random.wrap_key_data(keys)
        arguments = jax.device_put(({"label": label, "w": w}, noise), sharding.batched(mesh))
        return {"x": run(model.params, grid, keys, arguments[0], num_steps, arguments[1])}

    return sample


@functools.cache  # students of one network share the compiled program
def _denoise(model):
    return jax.jit(lambda params, z, logsnr, cond: model.denoiser(params)(z, logsnr, cond))


def _live_denoiser(student):
    run = _denoise(student.model.static())

    def denoise(z, logsnr, label, w):
        return run(student.model.params, z, logsnr, {"label": label, "w": w})._asdict()

    return denoise


def _in_a_fresh_process(program, directory, given, environment):
    """The arrays that a program, called with (directory, file of `given`, file to write), leaves."""
    with tempfile.TemporaryDirectory() as scratch:
        source, out = pathlib.Path(scratch) / "given", pathlib.Path(scratch) / "out.npz"
        if isinstance(given, bytes):
            source.write_bytes(given)
        else:
            with source.open("wb") as file:
                np.savez(file, **given)
        done = subprocess.run(
            [sys.executable, "-c", program, str(directory), str(source), str(out)],
            # HF_MODULES_CACHE: where diffusers copies the code that a folder brings along.
            env={**os.environ, "JAX_PLATFORMS": "cpu", "HF_MODULES_CACHE": scratch, **environment},
            cwd=scratch,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"--mode=export: what was written cannot be run in a fresh process ({last[:200]})")
        with np.load(out, allow_pickle=False) as arrays:
            return dict(arrays)
