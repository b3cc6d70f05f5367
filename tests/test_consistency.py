"""benchmarks.consistency compares equals."""

import pytest

from benchmarks import consistency
from guided_distill.experiment import from_config
from guided_distill.stages import make_stages


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_at_one_step_both_ways_cost_the_same_and_differ_in_nothing_else(share):
    configs = {way: consistency.config_of(way, share, 0, "runs/digits") for way in consistency.WAYS}
    stages = {way: make_stages(from_config(config)) for way, config in configs.items()}
    costs = {way: consistency.cost_of(each, 1) for way, each in stages.items()}
    assert costs["consistency"] == pytest.approx(costs["progressive"], rel=2e-3)
    # Halving may end earlier, and then costs less.
    assert consistency.cost_of(stages["progressive"], 4) < costs["progressive"]
    assert consistency.cost_of(stages["consistency"], 4) == costs["consistency"]
    for key in configs["consistency"].keys() - {"stage1", "stage2"}:
        assert configs["consistency"][key] == configs["progressive"][key], key


def test_a_distilled_row_is_told_from_stage_one():
    rows = [
        {"model": model, "stage": stage, "num_steps": 4, "w": 1.0, "metrics": {"frechet_classifier": value}}
        for model, stage, value in (("teacher", "teacher", 1.0), ("student", "stage1", 2.0), ("student", "x", 3.0))
    ]
    assert [consistency.frechet(rows, model, 4, 1.0) for model in ("teacher", "student")] == [1.0, 3.0]
