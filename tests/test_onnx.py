"""What is exported as ONNX does what the student does, by onnxruntime alone, at any batch size."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from students import experiments, make_student

from guided_distill import samplers
from guided_distill.errors import UserError
from guided_distill.export import onnx, verify

HERE = all(importlib.util.find_spec(name) for name in ("jax2onnx", "onnxruntime"))
needs = pytest.mark.skipif(not HERE, reason="no converter: pip install -e '.[onnx]'")


@pytest.mark.parametrize("series", ["det", "teacher"])
def test_the_loop_for_the_converter_is_the_sampler(series):
    student, grid, _ = make_student(experiments()["mlp"], series)
    keys = samplers.image_keys(7, jnp.arange(3))
    noise, cond = samplers.initial_noise(keys, (64, 1)), {"label": jnp.arange(3), "w": jnp.linspace(0.0, 4.0, 3)}
    params, tables = jax.device_get((student.model.params, grid))
    live = samplers.deterministic(student.model.denoiser(params), jax.tree.map(jnp.asarray, tables), noise, cond,
                                  student.steps(None, grid), clip=1.0)  # fmt: skip
    np.testing.assert_allclose(onnx.sampler(student, grid)(noise, **cond)["x"], live, atol=1e-6)


def test_what_cannot_be_converted_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    student, *_ = make_student(experiments()["mlp"], "sto")
    with pytest.raises(UserError, match="--formats=onnx: sto_0002 draws noise at every step"):
        onnx.check([student])
    half = dataclasses.replace(student, sampler="deterministic", network={**student.network, "dtype": "bfloat16"})
    with pytest.raises(UserError, match="sto_0002 computes in bfloat16"):
        onnx.check([half])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="jax2onnx and onnxruntime missing; pip install 'guided_distill.onnx.'"):
        onnx.check([])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("onnx") / "out"
    student, grid, _ = make_student(experiments()["unet"])
    with jax.numpy_rank_promotion("allow"):  # which the converter's own layers take for granted
        onnx.write(directory, [student], grid)
    return directory, student, grid


@needs
@pytest.mark.slow
def test_the_functions_do_what_the_student_does(written):
    directory, student, grid = written
    functions = json.loads((directory / "onnx" / "onnx.json").read_text())["functions"]
    assert functions["det_0002_sampler"]["inputs"] == {
        "noise": {"shape": ["batch", 8, 8, 1], "dtype": "float32"},
        "label": {"shape": ["batch"], "dtype": "int32"},
        "w": {"shape": ["batch"], "dtype": "float32"},
    }
    assert set(functions["det_0002_denoiser"]["outputs"]) == {"x", "eps"}
    deviations = verify.onnxs(directory, [student], grid)
    assert set(deviations) == {"det_0002_sampler", "det_0002_denoiser"} and max(deviations.values()) <= 1e-4
    other, *_ = make_student(experiments()["unet"], seed=1)
    assert min(verify.onnxs(directory, [other], grid).values()) > 1e-3


@needs
@pytest.mark.slow
def test_the_example_runs_as_it_is_written(written, tmp_path):
    directory, student, _ = written
    command = [sys.executable, str(directory / onnx.EXAMPLE), "det_0002_sampler", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "samples.npz")["x"].shape == (16, *student.model.sample_shape)


@needs
@pytest.mark.slow
def test_what_the_converter_stumbles_over_is_one_line(monkeypatch):
    def sort(z):
        return {"x": jnp.linalg.eigh(z)[1]}

    given = {"z": jax.ShapeDtypeStruct((3, 3), jnp.float32)}
    with pytest.raises(UserError, match="jax2onnx cannot convert det_0002_sampler .*leave its student out") as error:
        onnx._convert("det_0002_sampler", sort, given, {"x": None})
    assert "\n" not in str(error.value)
