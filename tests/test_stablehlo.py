"""What is exported for jax alone does what the student does, at any batch size and on any platform."""

import json
import runpy
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from students import experiments, make_student

from guided_distill import samplers
from guided_distill.errors import UserError
from guided_distill.export import stablehlo, verify
from guided_distill.models import attention

WHAT = [
    pytest.param("unet", "det", marks=pytest.mark.slow),
    ("mlp", "det"),
    ("mlp", "sto"),
    ("mlp", "teacher"),
]


def inputs(student, batch, w=2.5):
    keys = samplers.image_keys(7, jnp.arange(batch))
    given = {
        "noise": samplers.initial_noise(keys, student.model.sample_shape),
        "label": jnp.arange(batch, dtype=jnp.int32) % 4,
        "w": jnp.linspace(0.0, w, batch),
    }
    return given, keys


@pytest.mark.parametrize(("kind", "series"), WHAT)
def test_the_functions_do_what_the_student_does(kind, series, tmp_path):
    student, grid, _ = make_student(experiments()[kind], series)
    stablehlo.write(tmp_path, [student], grid)
    functions = json.loads((tmp_path / "stablehlo" / "stablehlo.json").read_text())["functions"]
    assert set(functions) == {f"{student.name}_sampler", f"{student.name}_denoiser"}
    host = jax.device_get((student.model.params, grid))
    denoiser = student.model.denoiser(host[0])
    load = runpy.run_path(str(tmp_path / stablehlo.EXAMPLE))["load"]
    sample, denoise = load(f"{student.name}_sampler"), load(f"{student.name}_denoiser")
    live = jax.jit(samplers.SAMPLERS[student.sampler], static_argnums=(0, 4), static_argnames="clip")
    for batch in (1, 3):
        given, keys = inputs(student, batch)
        cond = {key: given[key] for key in ("label", "w")}
        drawn = {"keys": jax.random.key_data(keys)} if series == "sto" else {}
        steps = 4 if series == "teacher" else 2
        expected = live(denoiser, jax.tree.map(jnp.asarray, host[1]), given["noise"], cond, steps, keys, clip=1.0)
        np.testing.assert_allclose(sample(**given, **drawn), expected, atol=1e-5)
        logsnr = jnp.linspace(-19.0, 19.0, batch)
        outputs = denoise(z=given["noise"], logsnr=logsnr, **cond)
        prediction = denoiser(given["noise"], logsnr, cond)
        np.testing.assert_allclose(outputs["x"], prediction.x, atol=1e-5)
        np.testing.assert_allclose(outputs["eps"], prediction.eps, atol=1e-5)


def test_kernels_of_the_gpu_that_is_here_do_not_get_into_the_program(tmp_path, monkeypatch):
    student, grid, _ = make_student(experiments()["dit"], "det")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention, "implementation", lambda *what: "cudnn" if what[-1] == "gpu" else None)
    with pytest.raises(RuntimeError, match="cuDNN"):  # which it would be made of
        given, _ = inputs(student, 2)
        student.model.denoiser(student.model.params)(
            given["noise"], given["w"], {key: given[key] for key in ("label", "w")}
        )
    stablehlo.write(tmp_path, [student], grid)


def test_a_student_of_any_number_of_steps_is_refused():
    student, _, _ = make_student(experiments()["mlp"], "consistency")
    with pytest.raises(UserError, match="--formats=stablehlo: consistency takes any number of steps"):
        stablehlo.check([student])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("stablehlo") / "out"
    directory.mkdir()
    student, grid, _ = make_student(experiments()["mlp"], "sto")
    stablehlo.write(directory, [student], grid)
    return directory, student, grid


def test_the_description_names_what_goes_in_and_out(written):
    directory, student, _ = written
    about = json.loads((directory / "stablehlo" / "stablehlo.json").read_text())
    sampler, denoiser = (about["functions"][f"sto_0002_{kind}"] for kind in ("sampler", "denoiser"))
    shape = {"shape": ["batch", 64, 1], "dtype": "float32"}
    one = {"shape": ["batch"], "dtype": "float32"}
    label = {"shape": ["batch"], "dtype": "int32"}
    keys = {"shape": ["batch", 2], "dtype": "uint32"}
    assert sampler["inputs"] == {"noise": shape, "label": label, "w": one, "keys": keys}
    assert sampler["outputs"] == {"x": shape} and sampler["num_steps"] == 2
    assert denoiser["inputs"] == {"z": shape, "logsnr": one, "label": label, "w": one}
    assert denoiser["outputs"] == {"x": shape, "eps": shape} and denoiser["num_steps"] is None
    for function in about["functions"].values():
        content = (directory / "stablehlo" / function["file"]).read_bytes()
        exported = jax.export.deserialize(bytearray(content))
        assert exported.platforms == tuple(about["platforms"]) == ("cpu", "cuda", "tpu")
        assert (exported.nr_devices, set(exported.in_tree.unflatten(exported.in_avals)[1])) == (
            1,
            set(function["inputs"]),
        )


def test_the_example_runs_as_it_is_written(written, tmp_path):
    directory, student, _ = written
    done = subprocess.run(
        [sys.executable, str(directory / stablehlo.EXAMPLE), "sto_0002_sampler", "2"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = np.load(tmp_path / "samples.npz")
    given, keys = inputs(student, 16)
    keys = samplers.image_keys(0, jnp.arange(16))
    load = runpy.run_path(str(directory / stablehlo.EXAMPLE))["load"]
    x = load("sto_0002_sampler")(
        noise=samplers.initial_noise(keys, (64, 1)),
        label=given["label"],
        w=jnp.full(16, 2.0),
        keys=jax.random.key_data(keys),
    )
    np.testing.assert_allclose(made["x"], x, atol=1e-5)


def test_another_student_deviates(written):
    """What is verified is what was written: the functions of one student are held against another."""
    directory, student, grid = written
    assert max(verify.stablehlos(directory, [student], grid).values()) <= 1e-6
    other, *_ = make_student(experiments()["mlp"], "sto", seed=1)
    assert min(verify.stablehlos(directory, [other], grid).values()) > 1e-3


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.2),
        ([0.1], [0.2], 0.1),
        ([np.nan], [0.0], np.inf),
        ([np.nan], [np.nan], np.inf),
        ([0.0, 0.0], [0.0], np.inf),
    ],
)
def test_deviation(ours, theirs, expected):
    assert verify.deviation(ours, theirs) == pytest.approx(expected)
