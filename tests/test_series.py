"""Every series of stage two in one run, and transfer with its encoder: the real thing, tiny."""

import json

import jax
import numpy as np
import pytest
from test_clipping import costs_of_overshooting
from tiny import quick_config

from guided_distill import pipeline, sample, transfer
from guided_distill.errors import UserError
from guided_distill.experiment import from_config
from guided_distill.samplers import DRAWS_NOISE
from guided_distill.stages import make_stages

ALL = {
    "stage2.series": ("det", "sto", "encode", "two", "tract", "consistency"),
    "stage1.single_w": (4.0,),
    "evaluate.num_steps": (1, 2),
    "evaluate.baselines": ("ancestral", "heun"),
    "to_v.updates": 2,
    "to_v.batch_size": 8,
    "parameterisation": "eps",
}


def test_stages_fork_from_stage_one_and_two_students_from_the_teacher():
    stages = {stage.name: stage for stage in make_stages(from_config(quick_config(**ALL)))}
    parents = {name: stage.parent for name, stage in stages.items()}
    assert parents == {
        "teacher": None,
        "to_v": "teacher",
        "stage1": "to_v",
        **{f"stage2_{series}_0002": "stage1" for series in ("det", "sto", "tract")},
        **{f"stage2_{series}_0001": f"stage2_{series}_0002" for series in ("det", "sto", "tract", "two", "det_w4")},
        "encode_0002": "stage1",
        "encode_0001": "encode_0002",
        "stage2_two_0002": "to_v",
        "stage2_consistency": "to_v",
        "stage1_w4": "to_v",
        "stage2_det_w4_0002": "stage1_w4",
    }
    assert [stages[name].position for name in ("teacher", "to_v", "stage1", "stage2_sto_0002", "stage2_two_0001")] == [
        0, 1, 2, 3, 3,
    ]  # fmt: skip
    assert {stages[name].model.parameterisation for name in stages if name != "teacher"} == {"v"}
    assert stages["encode_0001"].w_range == (0.0, 0.0) and stages["stage1_w4"].w_range == (4.0, 4.0)
    calls = {name: stage.model.calls_per_step for name, stage in stages.items()}
    assert (calls["to_v"], calls["stage1"], calls["stage2_two_0001"], calls["stage1_w4"]) == (2, 1, 2, 1)
    # Rounds of one series share the objective, hence the compiled step.
    assert stages["stage2_sto_0002"].objective is stages["stage2_sto_0001"].objective
    # So do their teachers, clipped ones among them; the encoder's is not clipped.
    assert stages["stage2_det_0002"].teacher == stages["stage2_det_0001"].teacher != stages["stage1"].model
    assert stages["encode_0002"].teacher == stages["stage1"].model
    assert stages["stage2_det_0002"].objective is stages["stage2_det_w4_0002"].objective
    # The consistency student is the stage-one network, taught by the same two calls and by its own average.
    one_for_all = stages["stage2_consistency"]
    assert one_for_all.model == stages["stage1"].model and one_for_all.teacher == stages["stage1"].teacher
    assert (one_for_all.teacher_calls, one_for_all.steps(4), one_for_all.training.ema) == (3, [1, 2, 4], 0.5)


def test_stage_one_is_not_trained_where_it_teaches_nothing():
    values = {"stage2.num_steps": (1,), "stage2.series": ("consistency",), "evaluate.num_steps": (1, 2)}
    stages = make_stages(from_config(quick_config(**values)))
    assert [(stage.name, stage.parent) for stage in stages] == [("teacher", None), ("stage2_consistency", "teacher")]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"stage2.series": ("dot",)}, "'dot'; there are det, sto, encode, two, tract, consistency"),
        ({"stage2.series": ("consistency",), "evaluate.num_steps": (3,)}, "holds 3; students are trained for 2, 1"),
        ({"stage2.series": ()}, "config.stage2.series is empty"),
        ({"stage2.num_steps": (3, 1)}, "config.stage2.num_steps: 4 -> 3 is no round"),
        ({"stage2.num_steps": (1,), "stage2.series": ("sto",)}, "4 -> 1: series 'sto' only halves"),
        ({"evaluate.baselines": ("euler",)}, "config.evaluate.baselines holds 'euler'; there are ancestral"),
        ({"stage1.single_w": (9.0,)}, "config.stage1.single_w holds 9.0, outside the trained range"),
    ],
)
def test_what_makes_no_rounds_is_named(values, says):
    with pytest.raises(UserError, match=says):
        from_config(quick_config(**{"evaluate.num_steps": (1,), **values}))


def test_a_round_may_skip_halvings():
    stages = make_stages(from_config(quick_config(**{"stage2.num_steps": (1,), "evaluate.num_steps": (1,)})))
    assert [(stage.name, stage.num_steps, stage.teacher_calls) for stage in stages[2:]] == [("stage2_det_0001", 1, 4)]


def test_stage_two_weighs_errors_in_its_own_way_or_as_all_stages_do():
    series = ("det", "two", "tract", "consistency")
    own, all_so, default = (
        costs_of_overshooting(False, series, **values)
        for values in ({"stage2.weighting": "constant"}, {"weighting": "constant"}, {})
    )
    for name, cost in own.items():
        same, other = (all_so, default) if name.startswith("stage2") else (default, all_so)
        assert cost == same[name] != other[name], name
    landing = costs_of_overshooting(False, ("det",), **{"stage2.weighting": "landing"})["stage2_det_0001"]
    assert landing not in (own["stage2_det_0001"], default["stage2_det_0001"])


@pytest.mark.slow
def test_every_series_is_trained_and_measured_and_the_encoder_transfers(tmp_path):
    config = quick_config(**ALL)
    summary = pipeline.run(config, tmp_path)
    rows = {(row["stage"], row["sampler"], row["num_steps"], row["w"]): row for row in summary["rows"]}
    assert rows["stage2_two_0001", "deterministic", 1, 4.0]["nfe"] == 2
    assert rows["stage2_sto_0002", "stochastic", 2, 0.0]["nfe"] == 2
    assert rows["to_v", "heun", 2, 0.0]["nfe"] == 6
    assert [rows["stage2_consistency", "renoising", n, 4.0]["nfe"] for n in (1, 2)] == [1, 2]
    assert {w for stage, _, _, w in rows if stage == "stage2_det_w4_0001"} == {4.0}
    for (stage, sampler, *_), row in rows.items():
        assert ("distance_to_reference" in row["metrics"]) == (sampler not in DRAWS_NOISE), stage
    assert not any(stage.startswith("encode") for stage, *_ in rows)

    run = pipeline.open_run(config, tmp_path)
    leaves = [jax.tree.leaves(run.params_of(run.stage(name))) for name in ("stage2_det_0001", "stage2_sto_0001")]
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(*leaves, strict=True))

    asked = {"series": "consistency", "w": 1.0, "labels": None, "num": 3, "seed": 0, "out": str(tmp_path / "x.npz")}
    for num_steps in (1, 2, 4):
        sample.sample(config, tmp_path, num_steps=num_steps, **asked)
        assert np.isfinite(np.load(asked["out"])["x"]).all()
    with pytest.raises(UserError, match=r"in series consistency; .*: 1 \(consistency\), 2"):
        sample.sample(config, tmp_path, num_steps=3, **asked)

    transfer.transfer(config, tmp_path, target=tmp_path, w=0.0)
    rows = json.loads((tmp_path / "transfer.json").read_text())["rows"]
    assert [(row["way"], row["num_steps"]) for row in rows] == [
        ("distilled", 2), ("distilled", 1), ("DDIM", 16), ("DDIM", 2), ("DDIM", 1),
    ]  # fmt: skip
    assert (tmp_path / "transfer.png").stat().st_size > 1000
    with pytest.raises(UserError, match="--w=9 is outside the range"):
        transfer.transfer(config, tmp_path, target=tmp_path, w=9.0)
