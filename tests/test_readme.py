"""What the README shows is what works."""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tiny import tiny_config

from guided_distill import samplers
from guided_distill.diffusion import make_grid
from guided_distill.experiment import from_config
from guided_distill.teachers import outside_teacher

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_of_a_teacher_of_ones_own_works_as_printed(tmp_path, monkeypatch):
    (source,) = re.findall(r"```python\n(# my_teacher.py.*?)```", README, re.DOTALL)
    assert source.count("\n") < 40
    (tmp_path / "my_teacher.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("my_teacher")
    teacher = outside_teacher("my_teacher:make_teacher", from_config(tiny_config()))
    cond = {"label": jnp.array([0, 9]), "w": jnp.zeros(2)}
    grid = jax.tree.map(jnp.asarray, make_grid(teacher.schedule, 16))
    # Of noise that is nowhere, each class makes its own mean.
    x = samplers.deterministic(teacher.denoiser(teacher.params), grid, jnp.zeros((2, 8, 8, 1)), cond, 16)
    np.testing.assert_allclose(np.asarray(x).mean((1, 2, 3)), [-0.8, 0.8], atol=0.02)


def test_every_config_is_listed():
    names = {path.name for path in (Path(__file__).parents[1] / "configs").glob("*.py")} - {"common.py", "__init__.py"}
    assert not {name for name in names if f"configs/{name}" not in README}
