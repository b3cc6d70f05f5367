"""`import guided_distill as gd`: names that stay, loaded when they are asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked import run_script
from quickly import COMPILED_QUICKLY

import guided_distill as gd

REPO = Path(__file__).parents[1]
SURFACE = """
    Cosine DiscreteBetas Grid Knobs OptimiserConfig Prediction RectifiedFlow Teacher TrainState UserError diffusion
    edit editing guidance image_keys initial_noise load load_teacher make_denoise make_denoiser make_encode make_grid
    make_mesh make_model_fn make_stage1 make_stage2 make_state make_tract make_train_step make_two_student models
    null_label objectives place sample_images samplers shard_batch student_params within_range
""".split()


def test_the_names_are_those_that_were_promised():
    assert gd.__all__ == sorted(SURFACE)
    assert set(SURFACE) <= set(dir(gd))


def test_every_name_is_there_and_documented():
    assert [name for name in SURFACE if not getattr(gd, name).__doc__] == []


def test_a_name_that_is_a_file_is_that_file():
    files = {path.stem for path in (REPO / "guided_distill").iterdir()}
    assert {name for name in SURFACE if name in files} == {
        "diffusion", "editing", "guidance", "models", "objectives", "samplers",
    }  # fmt: skip
    assert gd.samplers.__name__ == "guided_distill.samplers"


def test_what_is_not_there_is_named():
    with pytest.raises(AttributeError, match="'guided_distill' has no attribute 'make_stage3'"):
        gd.make_stage3  # noqa: B018


def test_importing_loads_neither_jax_nor_numpy():
    program = "import sys, guided_distill; sys.exit(bool({'jax', 'flax', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPO).returncode == 0


def test_the_example_distils_a_denoiser_of_ones_own(tmp_path):
    source = (REPO / "examples" / "own_denoiser.py").read_text()
    assert source.count("\n") < 60
    short = source.replace("OMEGA = 1000,", "OMEGA = 100,")
    assert short != source
    (tmp_path / "own_denoiser.py").write_text(short)
    env = {**os.environ, "XLA_FLAGS": COMPILED_QUICKLY}  # one device; compiled in a hurry
    done = run_script(tmp_path / "own_denoiser.py", env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    errors = {line.split(":")[0]: float(line.split()[3]) for line in done.stdout.splitlines()}
    assert errors.keys() == {f"{who}, {n} steps" for who in ("student", "teacher") for n in (4, 2, 1)}
    # Hardly trained, and yet a student of one step is nearer to the teacher of 8 than that is in one.
    assert errors["student, 1 steps"] < errors["teacher, 1 steps"]
