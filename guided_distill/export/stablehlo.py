"""Students as serialised StableHLO with their weights inside, to be run by jax without this package."""

import dataclasses
import functools
import pathlib

import jax
import jax.export
import jax.numpy as jnp

from guided_distill import samplers, sharding
from guided_distill.errors import UserError
from guided_distill.files import write_json, write_whole

VERSION = 1
PLATFORMS = ("cpu", "cuda", "tpu")
EXAMPLE = "run_stablehlo.py"


def check(students):
    """Raises UserError for a student without a number of steps of its own to write down."""
    for student in students:
        if student.sampler == "renoising":
            raise UserError(f"--formats=stablehlo: {student.name} takes any number of steps, a program takes one; "
                            "leave it to --formats=bundle")  # fmt: skip


def write(directory, students, grid):
    """Writes stablehlo/<function>.stablehlo, stablehlo/stablehlo.json, which names inputs and outputs, and an example.

    Of each student <name>_sampler, its N steps, and <name>_denoiser, one evaluation; the batch is symbolic.
    """
    folder = pathlib.Path(directory) / "stablehlo"
    folder.mkdir(parents=True)
    host_grid, functions = jax.device_get(grid), {}
    for student in students:
        for kind, function, inputs in (
            ("sampler", sampler(student, host_grid), sampler_inputs(student)),
            ("denoiser", denoiser(student), denoiser_inputs(student)),
        ):
            name = f"{student.name}_{kind}"
            with sharding.imagined("cpu"):  # else a GPU that is here puts its kernels into it
                exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(**inputs)
            write_whole(folder / f"{name}.stablehlo", bytes(exported.serialize()))
            outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
            about = describe(student, kind, inputs, outputs, host_grid)
            functions[name] = about | {"file": f"{name}.stablehlo"}
    content = {"version": VERSION, "jax": jax.__version__, "platforms": PLATFORMS, "functions": functions}
    write_json(folder / "stablehlo.json", content)
    write_whole(folder.parent / EXAMPLE, (pathlib.Path(__file__).parent / EXAMPLE).read_text())


def sampler(student, grid):
    """(noise [B, *S], label i32 [B], w [B][, keys u32 [B, 2]]) -> x [B, *S]: all steps of a student from t = 1."""
    model, num_steps = _on_host(student.model), student.steps(None, grid)
    run = functools.partial(samplers.SAMPLERS[student.sampler], clip=model.data_range)

    def sample(noise, label, w, keys=None):
        keys = None if keys is None else jax.random.wrap_key_data(keys, impl="threefry2x32")
        tables = jax.tree.map(jnp.asarray, grid)
        return run(model.denoiser(model.params), tables, noise, {"label": label, "w": w}, num_steps, keys)

    return sample


def denoiser(student):
    """(z [B, *S], logsnr [B], label i32 [B], w [B]) -> {"x", "eps"}, both [B, *S], nothing clipped.

    A sampler clips x to the model's data_range at every step, and makes eps agree: `diffusion.clip_prediction`.
    """
    model = _on_host(student.model)

    def denoise(z, logsnr, label, w):
        return model.denoiser(model.params)(z, logsnr, {"label": label, "w": w})._asdict()

    return denoise


def _on_host(model):
    # Weights on several devices would make a program for as many.
    return dataclasses.replace(model, params=jax.device_get(model.params))


def sampler_inputs(student):
    """Shapes of what the sampler takes, by name, with a symbolic batch."""
    inputs = _inputs(student, noise=student.model.sample_shape, label=(), w=())
    if student.sampler in samplers.DRAWS_NOISE:
        inputs["keys"] = jax.ShapeDtypeStruct((*inputs["w"].shape, 2), jnp.uint32)
    return inputs


def denoiser_inputs(student):
    """Shapes of what the denoiser takes, by name, with a symbolic batch."""
    return _inputs(student, z=student.model.sample_shape, logsnr=(), label=(), w=())


def _inputs(student, **shapes):
    batch = jax.export.symbolic_shape("batch")
    dtypes = {"label": jnp.int32}
    return {name: jax.ShapeDtypeStruct((*batch, *s), dtypes.get(name, jnp.float32)) for name, s in shapes.items()}


def describe(student, kind, inputs, outputs, grid):
    """What a user has to know of an exported function, as JSON; `inputs` and `outputs` are its shapes."""
    outputs = outputs if isinstance(outputs, dict) else {"x": outputs}
    return {
        "kind": kind,
        "num_steps": student.steps(None, grid) if kind == "sampler" else None,
        "w_range": student.w_range,
        "num_classes": student.model.num_classes,
        "sample_shape": student.model.sample_shape,
        "data_range": student.model.data_range,
        "noise_std": student.model.schedule.prior_std,
        "inputs": {name: _describe_array(array) for name, array in inputs.items()},
        "outputs": {name: _describe_array(array) for name, array in outputs.items()},
    }


def _describe_array(array):
    shape = [side if isinstance(side, int) else str(side) for side in array.shape]
    return {"shape": shape, "dtype": jnp.dtype(array.dtype).name}
