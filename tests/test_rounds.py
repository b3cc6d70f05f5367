"""When a round of stage two ends, and what is planned for it, on gaps that are given."""

import dataclasses
import itertools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stopping import Stopped, stop_after
from tiny import quick_config

import configs.rounds
from guided_distill import errors, metrics, pipeline, preemption, rounds, sharding
from guided_distill.errors import UserError
from guided_distill.experiment import from_config
from guided_distill.stages import make_stages


def make_run(workdir, **values):
    experiment = from_config(quick_config(**values))
    return types.SimpleNamespace(
        experiment=experiment, stages=make_stages(experiment), workdir=workdir, mesh=sharding.make_mesh(), is_main=True
    )


def make_gate(run, monkeypatch, gaps, stage=-1):
    """A gate whose round has the gaps [of update 0, 1, ..]; the state stands for the number of updates."""
    monkeypatch.setattr(rounds, "gap_of", lambda *_: lambda state: gaps[int(np.ravel(state.step)[0])])
    return rounds.Gate(run, run.stages[stage], {}, {"w": jnp.zeros(1)})


def ends_at(gate, writer, steps):
    states = (types.SimpleNamespace(step=step) for step in steps)
    return next((state.step for state in states if gate.is_over(writer, state, state.step)), None)


GAPS = [8.0, 7.5, 4.0, 3.9, 2.0, 1.5, 1.98, 1.9, 0.1]


def test_a_round_ends_where_its_gap_stopped_falling_also_when_resumed(tmp_path, monkeypatch):
    run = make_run(tmp_path, **{"rounds.gate_every": 2, "rounds.gate_least_fall": 0.1})
    directory = run.stages[-1].directory(tmp_path)
    with metrics.MetricWriter(directory) as writer:
        assert ends_at(make_gate(run, monkeypatch, GAPS), writer, range(9)) == 6
    assert [(line["step"], line["gap"]) for line in metrics.read_metrics(directory)] == [
        (0, 8.0), (2, 4.0), (4, 2.0), (6, 1.98),
    ]  # fmt: skip
    for killed_at in (3, 4, 5, 6):
        # What it measured before is read, not measured again: another measure would say otherwise.
        wrong = [-1.0] * (killed_at + 1) + GAPS[killed_at + 1 :]
        with metrics.MetricWriter(directory, restored_step=killed_at) as writer:
            assert ends_at(make_gate(run, monkeypatch, wrong), writer, range(killed_at, 9)) == 6


@pytest.mark.parametrize(
    ("gaps", "end"), [([4.0, np.nan, 3.0, 2.9, 1.0], 3), ([1.0, 0.0, 0.0], 1), ([8e-15, 1e-15], 1)]
)
def test_a_gap_that_is_no_number_says_nothing_and_one_that_is_closed_ends_the_round(tmp_path, monkeypatch, gaps, end):
    run = make_run(tmp_path, **{"rounds.gate_every": 1, "rounds.gate_least_fall": 0.1})
    directory = run.stages[-1].directory(tmp_path)
    with metrics.MetricWriter(directory) as writer:
        assert ends_at(make_gate(run, monkeypatch, gaps), writer, range(len(gaps))) == end
    with metrics.MetricWriter(directory, restored_step=1) as writer:
        assert ends_at(make_gate(run, monkeypatch, gaps), writer, range(1, len(gaps))) == end


def test_without_a_gate_and_outside_stage_two_nothing_ends_early(tmp_path, monkeypatch):
    flat = [1.0] * 9
    gated = make_run(tmp_path, **{"rounds.gate_every": 1})
    for gate in (make_gate(make_run(tmp_path), monkeypatch, flat), make_gate(gated, monkeypatch, flat, stage=1)):
        assert ends_at(gate, None, range(9)) is None
        gate.check(types.SimpleNamespace(step=8))
    assert ends_at(make_gate(gated, monkeypatch, flat), metrics.MetricWriter(tmp_path, enabled=False), range(9)) == 1


def test_a_round_that_left_too_much_of_its_gap_stops_the_run_and_says_so(tmp_path, monkeypatch):
    run = make_run(tmp_path, **{"rounds.gate_most_left": 0.25})
    gate = make_gate(run, monkeypatch, [8.0, 2.1, 1.9], stage=-2)
    gate.check(types.SimpleNamespace(step=2))
    with pytest.raises(UserError, match="stage2_det_0002: 26% of the gap to its teacher is left, more than config.rou"):
        gate.check(types.SimpleNamespace(step=1))
    with pytest.raises(UserError, match="nan% of the gap"):
        make_gate(run, monkeypatch, [8.0, np.nan], stage=-2).check(types.SimpleNamespace(step=1))
    # Rounding is no gap, and after the last round there is nothing to refuse.
    make_gate(run, monkeypatch, [1e-15, 8e-15], stage=-2).check(types.SimpleNamespace(step=1))
    make_gate(run, monkeypatch, [8.0, 8.0]).check(types.SimpleNamespace(step=1))


def test_shares_spend_the_work_and_leave_least_of_the_gaps_together():
    base = make_stages(from_config(quick_config()))[-1]
    stages = [dataclasses.replace(base, teacher_calls=calls) for calls in (2, 8, 2)]
    gaps, work = np.array([1.0, 4.0, 16.0]), 1e5
    updates = np.array(rounds.shares(stages, gaps, work))
    costs = np.array([stage.work_per_update for stage in stages])
    assert work * 0.99 < (updates * costs).sum() <= work
    assert updates[2] == pytest.approx(4 * updates[0], rel=0.05)

    def left(updates):
        return (gaps / updates).sum()

    for i, j in itertools.permutations(range(3), 2):
        moved = updates.astype(float)
        moved[i] -= 0.1 * work / costs[i] / 3
        moved[j] += 0.1 * work / costs[j] / 3
        assert left(moved) > left(updates)


PLANNED = {
    "rounds.plan": "auto",
    "rounds.probe_updates": 2,
    "rounds.probe_rates": (0.5, 1.0),
    "rounds.gap_samples": 16,
    "stage2.updates": 20,
    "stage2.final_updates": 20,
}


@pytest.mark.parametrize("looks", range(2 + 2 * 2))  # two gaps, then two updates with each of two rates
def test_planning_ends_where_it_is_told_to(tmp_path, monkeypatch, looks):
    run, params, told = make_run(tmp_path, **PLANNED), {"w": jnp.zeros(1)}, iter([*[False] * looks, True])
    run.stage, run.params_of = (lambda name: None), (lambda stage: params)
    monkeypatch.setattr(preemption, "asked", lambda: next(told))
    monkeypatch.setattr(sharding, "shard_batch", lambda mesh, batch: batch)
    for name, value in {
        "gap_of": lambda *_: lambda state: 1.0,
        "step_of": lambda *_: lambda state, *_: (state, {}),
        "batches_of": lambda *_: itertools.repeat({}),
        "knobs_of": lambda *_: {},
    }.items():
        monkeypatch.setattr(rounds, name, value)
    with pytest.raises(errors.Stopped):
        rounds.settle(run, run.stages[-2], {}, params)
    assert next(told, None) is None and not list(tmp_path.rglob("plan.json"))


@pytest.mark.slow
def test_a_planned_run_trains_what_its_plans_say_and_the_gate_holds_it_up(tmp_path):
    with pytest.raises(UserError, match="stage2_det_0002: .* of the gap to its teacher is left"):
        pipeline.run(quick_config(**PLANNED, **{"rounds.gate_most_left": 1e-6}), tmp_path)
    pipeline.run(quick_config(**PLANNED), tmp_path)
    run = pipeline.open_run(quick_config(**PLANNED), tmp_path)
    for stage in run.stages[2:]:
        directory = stage.directory(tmp_path)
        plan = json.loads((directory / "plan.json").read_text())
        lines = metrics.read_metrics(directory)
        assert plan["updates"] == lines[-1]["step"] == json.loads((directory / "STAGE_COMPLETE").read_text())["step"]
        assert lines[0]["learning_rate"] == pytest.approx(plan["learning_rate"])
        assert plan["opening_gaps"].keys() == {"stage2_det_0002", "stage2_det_0001"}
        assert set(map(float, plan["probes"])) == {5e-4, 1e-3}


@pytest.mark.slow
def test_a_planned_and_gated_run_that_is_interrupted_ends_with_the_same_weights(tmp_path, monkeypatch):
    config = quick_config(**PLANNED, **{"rounds.gate_every": 4, "rounds.gate_least_fall": 0.5})

    for stop in (11, 1, 5, 9, 3):  # in stage one, in the probes of a round, in its training, and so on
        stop_after(monkeypatch, stop)
        with pytest.raises(Stopped):
            pipeline.run(config, tmp_path / "killed")
    monkeypatch.undo()
    pipeline.run(config, tmp_path / "killed")
    pipeline.run(config, tmp_path / "whole")
    ends = []
    for name in ("killed", "whole"):
        run = pipeline.open_run(config, tmp_path / name)
        ends.append({stage.name: jax.device_get(run.params_of(stage)) for stage in run.stages})
        steps = [
            json.loads((stage.directory(run.workdir) / "STAGE_COMPLETE").read_text())["step"] for stage in run.stages
        ]
        assert steps[-1] % 4 == 0  # the gate ended it
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), *ends))


@pytest.mark.parametrize("way", ["short", "quarters", "tract"])
def test_a_cheaper_way_costs_at_most_half(way):
    stages = {w: make_stages(from_config(configs.rounds.get_config(w).to_dict())) for w in (way, "fixed")}
    costs = {w: sum(s.work_per_update * s.training.updates for s in stages[w] if s.series) for w in stages}
    assert stages[way][-1].num_steps == 1
    assert 0.45 < costs[way] / costs["fixed"] <= 0.5


def test_the_work_of_an_update_is_what_its_objective_calls():
    made = make_stages(from_config(quick_config(**{"stage2.series": ("det", "tract")})))
    stages = {s.series: s for s in made}
    assert made[0].work_per_update == 8 * 3  # guidance makes two calls where it samples, not where it learns
    # A student's forward and backward count three; "det" asks two teachers' steps, tract one and its own average.
    assert stages["det"].work_per_update == stages["tract"].work_per_update == 8 * (3 + 2)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"rounds.plan": "none"}, "config.rounds.plan is 'none'; it must be one of fixed, auto"),
        ({"rounds.probe_rates": ()}, "config.rounds.probe_rates is"),
        ({"rounds.gate_most_left": 0.0}, "config.rounds.gate_most_left is 0.0; it must be above 0"),
        ({"rounds.gate_every": 5, "stage2.series": ("tract",)}, "series 'tract' learns from its own average"),
        ({"clip_targets": True, "data.data_range": None}, "config.clip_targets is True, but"),
    ],
)
def test_what_makes_no_plan_is_named(values, says):
    config = quick_config()
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        (config[group] if group else config)[name] = value
    with pytest.raises(UserError, match=says):
        from_config(config)


def test_a_plan_that_costs_more_than_its_round_is_refused(tmp_path):
    run = make_run(tmp_path, **{"rounds.plan": "auto"})
    with pytest.raises(
        UserError, match="stage2_det_0002: its plan would cost .* times its 4 updates; lower config.rou"
    ):
        rounds.check_plans(run)
    rounds.check_plans(make_run(tmp_path))
