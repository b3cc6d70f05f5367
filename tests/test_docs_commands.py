"""The commands of README.md that are of the digits are carried out, one after the other; see test_docs_tutorial.py.

Their configs are as shown, but for a network, numbers of updates and an evaluation that are done in seconds. What is
left out are commands for which something is missing here: another data set, a GPU, a TPU's compiler, weights of
ImageNet, PyTorch, or the time for a longer run.
"""

import shlex

import numpy as np
import pytest
from forked import run_main
from PIL import Image
from test_docs import ENV, REPO, commands, text_of, write_files

pytestmark = pytest.mark.slow
PROGRAMS = ["guided-distill"], ["python", "-m", "guided_distill.main"]
MISSING = ("--topology", "diffusers", "efficientnet_lite0", "runs/longer")
SMALLER = """
import runpy

from configs import common


def get_config():
    config = runpy.run_path({shown!r})["get_config"]()
    common.use_mlp(config, features=16, num_layers=1, emb_channels=16)
    for stage in (config.teacher, config.stage1, config.stage2):
        stage.update(updates=8, batch_size=8)
    config.teacher.warmup, config.stage2.final_updates = 2, 8
    config.evaluate.update(num_samples=32, batch_size=32, classifier_updates=5, w=(1.0,), num_steps=(1, 4))
    config.log.sample_every = 0
    return config
"""


def possible(several):
    return [words for words in several if not any(word in " ".join(words) for word in MISSING)]


def carried_out(command, cwd):
    program = next((words for words in PROGRAMS if command[: len(words)] == words), None)
    assert program, command
    done = run_main(command[len(program) :], env=ENV, cwd=cwd)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"


def test_what_the_readme_does_with_the_digits(tmp_path):
    text = text_of("README.md")
    write_files(text, tmp_path)
    (tmp_path / "configs").mkdir()
    shown = str(REPO / "configs" / "digits.py")
    (tmp_path / "configs" / "digits.py").write_text(SMALLER.format(shown=shown))
    rng = np.random.default_rng(0)
    for name in ("five.png", "mask.png"):
        Image.fromarray(rng.integers(0, 2, (8, 8), np.uint8) * 255).save(tmp_path / name)
    every = [words for words in commands(text) if "--config=configs/digits.py" in words]
    ours = possible(every)
    left = [word for words in every if words not in ours for word in MISSING if word in " ".join(words)]
    assert len(ours) == 15 and sorted(left) == sorted(MISSING)
    for command in ours:
        carried_out(command, tmp_path)
    made = "grid.png samples.npz others.png inpaint.png noise.png strength.png exported exported2"
    assert set(made.split()) <= {path.name for path in tmp_path.iterdir()}
