"""Students as ONNX with their weights inside, to be run by onnxruntime without jax and without this package."""

import contextlib
import importlib.util
import io
import logging
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from guided_distill import diffusion, samplers
from guided_distill.errors import UserError
from guided_distill.export import stablehlo
from guided_distill.files import write_json, write_whole

VERSION = 1
OPSET = 23
EXAMPLE = "run_onnx.py"
_NEEDS = ("jax2onnx", "onnxruntime")
_ONE = "guided_distill_one"  # a name that no converter gives


def check(students):
    """Raises UserError where the converter or the runtime is missing, and for students that cannot be converted."""
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--formats=onnx: {' and '.join(missing)} missing; pip install 'guided_distill[onnx]'")
    for student in students:
        if student.sampler in samplers.DRAWS_NOISE:
            raise UserError(f"--formats=onnx: {student.name} draws noise at every step, and ONNX has not JAX's random "
                            "numbers; leave it out, or export --formats=stablehlo")  # fmt: skip
        if (student.network or {}).get("dtype", "float32") != "float32":
            raise UserError(f"--formats=onnx: {student.name} computes in {student.network['dtype']}, which onnxruntime "
                            "cannot on a CPU; leave it out, or export --formats=stablehlo")  # fmt: skip


def write(directory, students, grid):
    """Writes onnx/<function>.onnx, onnx/onnx.json, which names inputs and outputs, and an example that runs them.

    Of each student <name>_sampler, its N steps, and <name>_denoiser, one evaluation; the batch is symbolic. Raises
    UserError, naming the function, for what the converter cannot do.
    """
    folder = pathlib.Path(directory) / "onnx"
    folder.mkdir(parents=True)
    functions = {}
    for student in students:
        for kind, function, inputs in (
            ("sampler", sampler(student, grid), stablehlo.sampler_inputs(student)),
            ("denoiser", _denoiser(student), stablehlo.denoiser_inputs(student)),
        ):
            name = f"{student.name}_{kind}"
            outputs = jax.eval_shape(function, **inputs)
            write_whole(folder / f"{name}.onnx", _convert(name, function, inputs, outputs))
            about = stablehlo.describe(student, kind, inputs, outputs, grid)
            functions[name] = about | {"file": f"{name}.onnx"}
    content = {"version": VERSION, "opset": OPSET, "functions": functions}
    write_json(folder / "onnx.json", content)
    write_whole(folder.parent / EXAMPLE, (pathlib.Path(__file__).parent / EXAMPLE).read_text())


def sampler(student, grid):
    """(noise [B, *S], label i32 [B], w [B]) -> {"x": [B, *S]}: `samplers.deterministic` of a student from t = 1.

    The converter knows no closures over what is traced: in its loop, label and w go round with the noise, and weights
    and tables are arrays that were there before.
    """
    denoiser, clip, num_steps = _known(student), student.model.data_range, student.steps(None, grid)
    tables = jax.tree.map(jnp.asarray, jax.device_get(grid))
    stride = tables.num_intervals // num_steps

    def step(n, carry):
        z, _, label, w = carry
        i = num_steps - n
        at_t, at_s = tables.at(i * stride), tables.at((i - 1) * stride)
        prediction = samplers.predict(denoiser, z, at_t, {"label": label, "w": w}, clip)
        return diffusion.ddim_step(prediction, at_s.alpha, at_s.sigma), prediction.x, label, w

    def sample(noise, label, w):
        return {"x": jax.lax.fori_loop(0, num_steps, step, (noise, jnp.zeros_like(noise), label, w))[1]}

    return sample


def _denoiser(student):
    denoiser = _known(student)
    return lambda z, logsnr, label, w: denoiser(z, logsnr, {"label": label, "w": w})._asdict()


def _known(student):
    return student.model.denoiser(jax.tree.map(jnp.asarray, jax.device_get(student.model.params)))


def _convert(name, function, inputs, outputs):
    import jax2onnx

    def positional(*arrays):
        made = function(**dict(zip(inputs, arrays, strict=True)))
        return tuple(made[key] for key in outputs)

    # Symbolic sides as their names, by which the converter makes its own.
    shapes = [(tuple(s if isinstance(s, int) else str(s) for s in a.shape), a.dtype) for a in inputs.values()]
    given = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    try:
        with _quiet():
            model = jax2onnx.to_onnx(positional, given, model_name=name, opset=OPSET, input_names=list(inputs),
                                     output_names=list(outputs))  # fmt: skip
            _spell_out_sigmoids(model.graph)
            return model.SerializeToString()
    except Exception as error:  # whatever it stumbles over, it is what it cannot convert
        reason = (str(error).strip().splitlines() or [""])[0][:160]
        raise UserError(f"--formats=onnx: jax2onnx cannot convert {name} ({type(error).__name__}: {reason}); leave its "
                        "student out, or export --formats=stablehlo") from error  # fmt: skip


def _spell_out_sigmoids(graph):
    """Sigmoid as 1 / (1 + exp(-x)), within loops too: onnxruntime's own is rough: 1e-4 after 35 of them."""
    from onnx.numpy_helper import from_array

    nodes = []
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _spell_out_sigmoids(attribute.g)
        nodes += _sigmoid(node.input[0], node.output[0]) if node.op_type == "Sigmoid" else [node]
    del graph.node[:]
    graph.node.extend(nodes)
    if any(_ONE in node.input for node in nodes):
        graph.initializer.append(from_array(np.float32(1.0), _ONE))


def _sigmoid(x, y):
    from onnx.helper import make_node

    return [
        make_node("Neg", [x], [f"{y}_neg"]),
        make_node("Exp", [f"{y}_neg"], [f"{y}_exp"]),
        make_node("Add", [f"{y}_exp", _ONE], [f"{y}_sum"]),
        make_node("Reciprocal", [f"{y}_sum"], [y]),
    ]


@contextlib.contextmanager
def _quiet():
    """The converter prints every layer, and logs what it lacks for networks that are none of ours."""
    loggers = [logging.getLogger(name) for name in ("jax2onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
