"""configs/pieces.py: every piece makes a chain, and the made-up teachers are what they are called."""

import jax
import numpy as np
import pytest
from tiny import quick_config

from configs import pieces
from guided_distill import pipeline
from guided_distill.experiment import from_config
from guided_distill.stages import make_stages
from guided_distill.teachers import shapes_of

OWN = [piece for piece in pieces.PIECES if "teacher.factory" not in pieces.PIECES[piece]]


@pytest.mark.parametrize("piece", OWN)
def test_a_piece_makes_a_chain_whose_students_predict_v(piece):
    experiment = from_config(pieces.get_config(piece).to_dict())
    stages = make_stages(experiment)
    assert [stage.name for stage in stages[-6:]] == ["stage1"] + [f"stage2_det_{n:04d}" for n in (16, 8, 4, 2, 1)]
    assert ("to_v" in {stage.name for stage in stages}) == (experiment.parameterisation != "v")
    assert stages[-1].model.parameterisation == "v"
    shapes_of(stages[-1].init)


@pytest.mark.slow
def test_teachers_made_of_others_call_and_say_what_they_should(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("digits", 0), ("digits_seed1", 1), ("digits_weak", 2)):
        pipeline.run(quick_config(seed=seed), f"runs/{name}")
    made = {name: getattr(pieces, f"make_{name}")() for name in ("ensemble", "autoguidance", "interval")}
    assert {name: teacher.calls_per_step for name, teacher in made.items()} == {
        "ensemble": 4, "autoguidance": 2, "interval": 2,
    }  # fmt: skip
    z = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    cond = {"label": np.arange(4), "w": np.full(4, 2.0, np.float32)}

    def output(teacher, logsnr, **changed):
        return np.asarray(teacher.denoiser(teacher.params)(z, np.full(4, logsnr, np.float32), {**cond, **changed}).x)

    none = {"w": np.zeros(4, np.float32)}
    for logsnr, guided in ((0.0, True), (6.0, False), (-6.0, False)):
        same = np.allclose(output(made["interval"], logsnr), output(made["interval"], logsnr, **none), atol=1e-6)
        assert same != guided
    for teacher in made.values():
        assert not np.allclose(output(teacher, 0.0), output(teacher, 0.0, **none), atol=1e-6)
