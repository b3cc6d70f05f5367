"""The command line, as a user types it, in processes of their own: mistakes in forks, which are fast."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from forked import run_main
from PIL import Image
from quickly import COMPILED_QUICKLY

REPO = pathlib.Path(__file__).parents[1]
TINY = [
    "--config=tests/quick_digits.py",
    *("--config.teacher.updates=8 --config.teacher.batch_size=8 --config.stage1.updates=8".split()),
    *("--config.stage1.batch_size=8 --config.stage2.batch_size=8 --config.stage2.teacher_steps=4".split()),
    *("--config.stage2.updates=8 --config.stage2.final_updates=8 --config.evaluate.num_samples=16".split()),
    *("--config.evaluate.batch_size=16 --config.evaluate.num_steps=(1,2) --config.evaluate.w=(0.,4.)".split()),
    *("--config.evaluate.classifier_updates=5 --config.log.every=1 --config.checkpoint.every=4".split()),
]


def command(*arguments):
    # One device, as on a user's machine; compiled in a hurry, as in conftest.
    environment = {**os.environ, "XLA_FLAGS": COMPILED_QUICKLY}
    return [sys.executable, "-m", "guided_distill.main", *arguments], {"cwd": REPO, "env": environment, "text": True}


def call(*arguments):
    line, options = command(*arguments)
    return subprocess.run(line, capture_output=True, **options)


def call_fork(*arguments):
    return run_main(arguments, env=command()[1]["env"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    done = call(*TINY, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    # On a busy machine Orbax warns that a save took long; of ours there is none.
    warnings = [line for line in done.stderr.splitlines() if "WARNING" in line and "previous save" not in line]
    assert "Traceback" not in done.stderr and not warnings, done.stderr
    return workdir


def test_sample_writes_a_grid_or_arrays(finished, tmp_path):
    flags = [*TINY, f"--workdir={finished}", "--mode=sample", "--num_steps=2", "--w=2", "--labels=3,7", "--num=6"]
    for name in ("grid.png", "samples.npz"):
        done = call_fork(*flags, f"--out={tmp_path / name}")
        assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size[0] > 40
    samples = np.load(tmp_path / "samples.npz", allow_pickle=False)
    assert samples["x"].shape == (6, 8, 8, 1) and list(samples["label"]) == [3, 7, 3, 7, 3, 7]


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A picture of the model's size, and a mask whose right half is white."""
    directory = tmp_path_factory.mktemp("pictures")
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(directory / "image.png")
    Image.fromarray(np.tile(np.repeat([0, 255], 4).astype(np.uint8), (8, 1))).save(directory / "mask.png")
    Image.new("L", (9, 8)).save(directory / "wide.png")
    Image.new("L", (8, 8)).save(directory / "black.png")
    return directory


def test_sample_makes_others_of_a_picture_and_keeps_what_is_masked(finished, picture, tmp_path):
    flags = [*TINY, f"--workdir={finished}", "--mode=sample", "--num_steps=2", f"--image={picture / 'image.png'}"]
    for name in ("grid.png", "samples.npz"):
        done = call_fork(*flags, f"--mask={picture / 'mask.png'}", "--start=1", "--num=3", f"--out={tmp_path / name}")
        assert done.returncode == 0 and "1 network evaluations each" in done.stderr, done.stderr
    x = np.load(tmp_path / "samples.npz")["x"]
    image = np.arange(64, dtype=np.float32).reshape(8, 8, 1) / 127.5 - 1.0
    assert (x[:, :, :4] == image[:, :4]).all() and (x[:, :, 4:] != image[:, 4:]).any()
    with Image.open(tmp_path / "grid.png") as grid:  # the picture, what is kept of it, and three others
        assert grid.size == (3 * 44 + 4, 2 * 44 + 4)


def test_sample_goes_from_one_strength_and_noise_to_another(finished, tmp_path):
    flags = [*TINY, f"--workdir={finished}", "--mode=sample", "--num_steps=2", f"--out={tmp_path / 'x.npz'}"]
    done = call_fork(*flags, "--num=5", "--w=0", "--to_w=4", "--to_seed=1")
    assert done.returncode == 0 and "w = 0 ... 4" in done.stderr, done.stderr
    way = np.load(tmp_path / "x.npz")
    assert set(way["label"]) == {0}
    for seed, w, place in ((0, 0, 0), (1, 4, 4)):
        done = call_fork(*flags, "--num=1", f"--seed={seed}", f"--w={w}", "--labels=0")
        assert done.returncode == 0, done.stderr
        np.testing.assert_allclose(np.load(tmp_path / "x.npz")["x"][0], way["x"][place], atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--image={}/nothing.png"], "nothing.png: no such file"),
        (["--image={}/wide.png"], "wide.png is 8x9x1, the model's pictures are 8x8x1"),
        (["--image={}/image.png", "--mask={}/wide.png"], "wide.png is 8x9, the picture 8x8"),
        (["--image={}/image.png", "--start=3"], "--start=3: the student takes 2 steps"),
        (["--image={}/image.png", "--to_seed=3"], "--image goes with --start and --mask"),
        (["--image={}/image.png", "--mask={}/black.png"], "holds nothing white"),
        (["--mask={}/mask.png"], "name it by --image"),
        (["--to_w=9"], "--to_w=9 is outside the trained range"),
        (["--caption=a cat"], "--caption is for a model of captions"),
    ],
)
def test_a_mistake_in_editing_gets_one_line(finished, picture, flags, says):
    flags = [flag.format(picture) for flag in flags]
    done = call_fork(*TINY, f"--workdir={finished}", "--mode=sample", "--num_steps=2", *flags)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_default_workdir_is_runs_and_the_stem_of_the_config(finished, tmp_path):
    import shutil

    # As typed in a directory of one's own, with a relative workdir: here a finished one, so that nothing is trained.
    (tmp_path / "tests").mkdir()
    shutil.copy(REPO / "tests" / "quick_digits.py", tmp_path / "tests")
    shutil.copytree(finished, tmp_path / "runs" / "quick_digits")
    line, options = command(*TINY)
    options.update(cwd=tmp_path, env={**options["env"], "PYTHONPATH": str(REPO)})
    done = subprocess.run(line, capture_output=True, **options)
    assert done.returncode == 0, done.stderr
    assert "stage2_det_0001: already trained" in done.stderr


def test_dry_run_lists_the_stages_and_writes_nothing(tmp_path):
    # As the command that it tries, with what only that mode takes.
    done = call_fork("--config=configs/digits.py", "--dry_run", "--profile=3", f"--workdir={tmp_path / 'new'}")
    assert done.returncode == 0, done.stderr
    assert "stage2_det_0001" in done.stdout and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--config is missing"),
        (["--config=configs/nothing.py"], "configs/nothing.py"),
        (["--config=configs/digits.py", "--config.stage1.updatess=3"], "updatess"),
        (["--config=configs/digits.py", "--config.stage1.updates=three"], "three"),
        (["--config=configs/digits.py", "--mode=dance"], "dance"),
        (["--config=configs/digits.py", "--nosuchflag=1"], "nosuchflag"),
        (["--config=configs/digits.py", "extra"], "extra"),
        (["--config=digits:large"], "--config=digits:large: it comes in no variants; leave out :large"),
        (
            ["--config=digits", "-config", "digits:large"],
            "--config=digits:large: it comes in no variants; leave out :large",
        ),
        (["--mode=import", "--network=sd1", "--dry_run"], "--dry_run plans what a config trains"),
        (["--config=cifar10_small:large"], "error: configs/cifar10_small.py:large: the sizes are gpu, cores"),
        (["--config=configs/digits.py", "--num_steps=2"], "--num_steps is for --mode=sample; give that mode"),
        (["--config=digits", "--mode=sample", "--target=x"], "--target is for --mode=transfer;"),
        (["--config=digits", "--mode=sample", "--nocompile"], "--compile is for --mode=plan;"),
        (["--config=digits", "--mode=evaluate", "--w=2"], "--w is for --mode=sample and --mode=transfer;"),
        (["--mode=import", "--network=sd1", "--samples=x.npz"], "--samples is for --mode=evaluate;"),
        (["--config=configs/cifar10.py", "--config.data.data_dir=nowhere"], "nowhere"),
        (["--config=configs/digits.py", "--workdir=/proc/none"], "/proc/none"),
        (["--config=configs/digits.py", "--config.teacher.checkpoint=nowhere", "--workdir={new}"], "nowhere"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(arguments, says, tmp_path):
    done = call_fork(*(argument.format(new=tmp_path / "new") for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert says in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--num_steps=3"], "--num_steps=3: no student was trained for it in series det; .*: 1 .det., 2 .det."),
        (["--num_steps=2", "--w=9"], r"--w=9 is outside the trained range \[0, 4\]"),
        (["--num_steps=2", "--labels=10"], "--labels: 10 is outside the classes 0 ... 9"),
        (["--num_steps=2", "--labels=cat"], "--labels"),
        (["--num_steps=2", "--num=0"], "--num=0"),
        (["--num_steps=2", "--out=grid.gif"], "must end in .png"),
        (["--num_steps=2", "--out=nowhere/grid.png"], "there is no directory nowhere"),
    ],
)
def test_a_mistake_in_sampling_gets_one_line(finished, flags, says):
    import re

    done = call_fork(*TINY, f"--workdir={finished}", "--mode=sample", *flags)
    assert done.returncode == 2, done.stderr
    assert re.search(says, done.stderr) and done.stderr.count("\n") == 1, done.stderr


def test_a_batch_that_does_not_divide_over_the_devices(tmp_path):
    env = command()[1]["env"] | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = run_main([*TINY, f"--workdir={tmp_path}", "--config.stage1.batch_size=9"], env=env)
    assert done.returncode == 2 and "config.stage1.batch_size is 9" in done.stderr and done.stderr.count("\n") == 1


def test_summary_is_json_all_tools_can_read(finished):
    assert json.loads((finished / "summary.json").read_text())["rows"]


@pytest.mark.slow
def test_a_second_start_finds_its_programs_compiled(tmp_path):
    """Of the whole chain with its evaluation: training, samplers and what measures."""
    ours = {"XDG_CACHE_HOME": str(tmp_path), "JAX_DEBUG_LOG_MODULES": "jax._src.compiler"}
    ours["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # an MLP's programs are made at once
    missed = []
    for start in ("first", "second"):
        line, options = command(*TINY, f"--workdir={tmp_path / start}")
        others = {key: value for key, value in options["env"].items() if key != "JAX_COMPILATION_CACHE_DIR"}
        options["env"] = others | ours
        done = subprocess.run(line, capture_output=True, **options)
        assert done.returncode == 0, done.stderr
        missed.append(done.stderr.count("seconds to compile") - done.stderr.count("because it took <"))
    assert missed[0] > 0 == missed[1]
    assert len(list((tmp_path / "guided_distill" / "programs").iterdir())) >= missed[0]


def test_each_flag_is_of_the_modes_that_its_help_begins_with():
    from absl import flags

    from guided_distill import command_line

    found = {}
    for flag in flags.FLAGS.flags_by_module_dict()["guided_distill.command_line"]:
        found.setdefault(", ".join(command_line.modes_of(flag.help)), set()).add(flag.name)
    of_sample = "num_steps series labels caption image start mask to_seed to_w num seed"
    assert found == {
        "": {"config", "workdir", "mode", "dry_run", "coordinator", "num_processes", "process_id"},
        "plan": {"topology", "compile"},
        "run": {"profile"},
        "sample": set(of_sample.split()),
        "sample, transfer": {"w"},
        "transfer": {"target"},
        "evaluate": {"samples"},
        "import": {"network", "unet"},
        "import, encode": {"source"},
        "sample, export, import": {"out"},
        "export": {"formats", "stages", "with_teacher", "licence"},
    }
