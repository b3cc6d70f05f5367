"""What rounds are said to have lost, against students whose losses are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from guided_distill import diagnostics, diffusion, sharding
from guided_distill.experiment import from_config
from guided_distill.stages import make_stages


class FakeRun:
    """A tiny run on arrays in memory, whose networks are replaced by closed forms."""

    conditions = None

    def __init__(self, models, **values):
        self.experiment = from_config(tiny_config(**values))
        self.mesh = sharding.make_mesh()
        stages = make_stages(self.experiment)
        self.stages = [self._with(stage, models, stages) for stage in stages]
        self.grid = sharding.place(self.mesh, diffusion.make_grid(diffusion.Cosine(), 4))
        images = np.random.default_rng(0).integers(0, 256, (80, 8, 8, 1)).astype(np.uint8)
        self.dataset = dataclasses.make_dataclass("Data", ["train"])(_Source(images))

    def _with(self, stage, models, stages):
        model = dataclasses.replace(stage.model, model_fn=models(stage))
        parent = next((other for other in stages if other.name == stage.parent), None)
        if parent is None:
            return dataclasses.replace(stage, model=model)
        teacher = dataclasses.replace(parent.model, model_fn=models(parent))
        return dataclasses.replace(stage, model=model, teacher=teacher)

    def stage(self, name):
        return next(stage for stage in self.stages if stage.name == name)

    def params_of(self, stage):
        return {"loss": jnp.float32(stage.position)}


class _Source:
    def __init__(self, images):
        self._images = images

    def __len__(self):
        return len(self._images)

    def __getitem__(self, i):
        return {"image": self._images[i], "label": i % 10}


def shifted(of_stage):
    """Networks in v whose x_hat is 0.3 everywhere, and `of_stage` x its parameter beyond that for w = 1."""

    def models(stage):
        def model_fn(params, z, logsnr, cond, *, dropout_key=None):
            alpha, sigma = (c[:, None, None, None] for c in diffusion.Cosine().alpha_sigma(logsnr))
            w = cond.get("w", jnp.zeros(z.shape[0]))[:, None, None, None]
            x = 0.3 + of_stage * params["loss"] * w * jnp.ones_like(z)
            return alpha * (z - alpha * x) / sigma - sigma * x

        return model_fn

    return models


def test_a_student_like_its_teacher_has_lost_nothing():
    run = FakeRun(shifted(0.0))
    for stage in diagnostics.looked_at(run.stages):
        told = diagnostics.diagnose(run, stage)
        for name in ("gap_by_t", "gap_by_w", "clipped", "colour_drift"):
            assert np.allclose([value for _, value in told[name]], 0.0, atol=1e-5), name
        assert [w for w, _ in told["gap_by_w"]] == [0.0, 4.0]
        assert told["smoothness_over_w"] < 1e-3
        assert [t for t, _ in told["gap_by_t"]] == [i / stage.num_steps for i in range(1, stage.num_steps + 1)]


@pytest.mark.parametrize(("clip", "off"), [(False, 0.4), (True, 0.3)])  # 1.1 for 0.7, or the 1.0 that is sampled
def test_gap_clipping_and_drift_of_a_student_that_is_off_by_a_known_amount(clip, off):
    run = FakeRun(shifted(0.1), clip_targets=clip)  # of stage k by 0.1 k w
    told = diagnostics.diagnose(run, run.stage("stage2_det_0002"))
    np.testing.assert_allclose(told["gap_by_w"], [[0.0, 0.0], [4.0, off**2]], atol=1e-4)
    np.testing.assert_allclose(told["colour_drift"], [[0.0, 0.0], [4.0, off]], atol=1e-4)
    np.testing.assert_allclose(told["clipped"], [[0.0, 0.0], [4.0, 1.0]])
    np.testing.assert_allclose([gap for _, gap in told["gap_by_t"]], off**2 / 2, atol=1e-3)


def test_a_round_that_left_most_of_its_gap_is_warned_of():
    run = FakeRun(shifted(0.0), clip_targets=False)
    stage = run.stage("stage2_det_0001")
    # The teacher says 0.3 and the student, trained or not, its parameter times a tenth of w more.
    stage = dataclasses.replace(stage, model=dataclasses.replace(stage.model, model_fn=shifted(0.1)(stage)))
    run.params_of = lambda of: {"loss": jnp.float32(2.0 if of is stage else 2.0)}
    told = diagnostics.diagnose(run, stage)
    assert told["left"] == pytest.approx(1.0)
    assert "stage2_det_0001: 100% of the gap" in told["warning"]
    run.params_of = lambda of: {"loss": jnp.float32(0.2 if of is stage else 2.0)}
    told = diagnostics.diagnose(run, stage)
    assert told["left"] == pytest.approx(0.01, rel=1e-2)
    assert "warning" not in told


def test_a_round_that_opens_with_its_gap_closed_is_not_warned_of():
    run = FakeRun(shifted(0.0), clip_targets=False)
    stage = run.stage("stage2_det_0001")
    stage = dataclasses.replace(stage, model=dataclasses.replace(stage.model, model_fn=shifted(0.1)(stage)))
    run.params_of = lambda of: {"loss": jnp.float32(0.2 if of is stage else 0.0)}  # training alone moved it away
    told = diagnostics.diagnose(run, stage)
    assert told["gap_by_w"][1][1] > 1e-3 and not {"left", "warning"} & set(told)


def test_only_students_that_follow_their_teachers_steps_are_looked_at():
    experiment = from_config(tiny_config(**{"stage2.series": ("det", "sto", "encode", "two")}))
    names = [stage.name for stage in diagnostics.looked_at(make_stages(experiment))]
    assert names == ["stage1", "stage2_det_0002", "stage2_det_0001", "stage2_sto_0002", "stage2_sto_0001"]
    assert diagnostics.work(experiment, make_stages(experiment)) > 0


def test_the_devices_do_not_change_what_is_told():
    run = FakeRun(shifted(0.1))
    told = diagnostics.diagnose(run, run.stages[-1])
    run.mesh = sharding.make_mesh(jax.devices()[:1])
    run.grid = sharding.place(run.mesh, diffusion.make_grid(diffusion.Cosine(), 4))
    alone = diagnostics.diagnose(run, run.stages[-1])
    np.testing.assert_allclose(alone["gap_by_t"], told["gap_by_t"], rtol=1e-5)
