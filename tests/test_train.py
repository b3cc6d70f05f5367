import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from guided_distill import diffusion, metrics, sharding, train
from guided_distill.checkpoint import Checkpoints
from guided_distill.data import load_dataset, make_batches
from guided_distill.errors import UserError
from guided_distill.experiment import from_config
from guided_distill.stages import make_knobs, make_stages
from guided_distill.state import make_state, student_params
from guided_distill.teachers import initial_params

EXPERIMENT = from_config(tiny_config(clip_targets=False))  # what a student starts as is the unclipped teacher
STAGES = {stage.name: stage for stage in make_stages(EXPERIMENT)}


@functools.cache
def params_of(w_conditioned):
    params = initial_params(EXPERIMENT, w_conditioned, jax.random.key(1))
    # Away from the zeros of the initialisation, behind which a wrong gradient would not show.
    return jax.tree.map(lambda p: p + 0.05 * jnp.sin(jnp.arange(p.size, dtype=p.dtype).reshape(p.shape)), params)


def prepared(name, mesh, accumulate=1):
    stage = STAGES[name]
    params = jax.tree.map(jnp.copy, params_of(stage.model.w_conditioned))  # the step donates them
    state = sharding.place(mesh, make_state(params, stage.training.optimiser))
    frozen = {} if stage.teacher is None else {"teacher": params_of(stage.teacher.w_conditioned)}
    grid = diffusion.make_grid(EXPERIMENT.schedule, EXPERIMENT.stage2.teacher_steps)
    knobs = make_knobs(stage, grid)
    of = stage.objective, stage.model, stage.teacher, stage.training.optimiser
    step = train.make_train_step(*of, mesh, accumulate)
    key = jax.random.key(0)
    return step, state, *(sharding.place(mesh, value) for value in (frozen, knobs, key))


def batch_of(size=8):
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (size, 8, 8, 1)).astype(np.float32)
    return {"x": x, "label": rng.integers(0, 10, size, dtype=np.int32)}


def test_one_and_four_devices_give_the_same_losses_and_gradients():
    results = []
    for count in (1, 4):
        mesh = sharding.make_mesh(jax.devices()[:count])
        step, state, frozen, knobs, key = prepared("stage2_det_0002", mesh)
        batch = sharding.shard_batch(mesh, batch_of())
        losses = []
        for _ in range(3):
            state, values = step(state, frozen, batch, knobs, key)
            losses.append([float(values["loss"]), float(values["grad_norm"])])
        results.append((losses, jax.device_get(state.params)))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)
    for one, four in zip(*(jax.tree.leaves(params) for _, params in results), strict=True):
        np.testing.assert_allclose(one, four, atol=2e-5)


def test_all_halvings_share_one_compiled_step():
    mesh = sharding.make_mesh(jax.devices()[:1])
    step, state, frozen, knobs, key = prepared("stage2_det_0002", mesh)
    batch = sharding.shard_batch(mesh, batch_of())
    before = step._cache_size()
    for num_steps in (2, 1):
        again, _, _, knobs, _ = prepared(f"stage2_det_{num_steps:04d}", mesh)
        assert again is step
        state, _ = step(state, frozen, batch, knobs, key)
    assert step._cache_size() - before <= 1


def test_the_program_of_a_step_does_not_contain_its_teacher():
    mesh = sharding.make_mesh(jax.devices()[:1])
    step, state, frozen, knobs, key = prepared("stage1", mesh)
    text = step.lower(state, frozen, sharding.shard_batch(mesh, batch_of()), knobs, key).as_text()
    literals = [line for line in text.splitlines() if "stablehlo.constant" in line]
    smallest_kernel = min(leaf.size for leaf in jax.tree.leaves(frozen) if leaf.ndim > 1)
    # A weight in the program would be written out in hexadecimal, eight digits a number.
    assert literals and max(map(len, literals)) < 8 * smallest_kernel


def test_keys_depend_on_the_step_and_the_index_alone():
    key = jax.random.key(3)
    few, many = (jax.random.key_data(train.example_keys(key, 5, size)) for size in (2, 6))
    assert (few == many[:2]).all()
    assert len(np.unique(np.asarray(many), axis=0)) == 6
    assert not (jax.random.key_data(train.example_keys(key, 6, 2)) == few).any(axis=1).all()


class Stopped(Exception):
    pass


def fit(
    directory, step_fn, pieces, *, updates=7, stop_before=None, over_at=None, log_every=1, save_every=2, batches=None
):
    """Trains in `directory`; raises Stopped when update `stop_before` would be made, as a kill would."""
    mesh, state, frozen, knobs, key = pieces
    calls = {"from": None}

    def step(state, *rest):
        if int(state.step) == stop_before:
            raise Stopped
        calls["from"] = int(state.step) if calls["from"] is None else calls["from"]
        return step_fn(state, *rest)

    loop = train.Loop(
        name="teacher",
        updates=updates,
        batch_size=8,
        checkpoint_every=save_every,
        log_every=log_every,
        sample_every=0,
        sample=None,
        is_over=lambda writer, state, step: step == over_at,
        flops=0.0,
        peak_flops=None,
        trace=lambda done, state, ends: None,
        on_start=lambda step: None,
        on_step=lambda step, steps, note: None,
    )
    batches = batches or make_batches(load_dataset(EXPERIMENT.data).train, batch_size=8, seed=1, flip=False)
    with Checkpoints(directory) as checkpoints:
        state = train.fit(
            loop,
            step,
            state,
            frozen,
            batches,
            knobs,
            key,
            mesh=mesh,
            checkpoints=checkpoints,
            make_writer=lambda restored: metrics.MetricWriter(directory, restored_step=restored),
        )
    return state, calls["from"]


def test_a_resumed_run_is_the_undisturbed_run_to_the_bit(tmp_path):
    mesh = sharding.make_mesh(jax.devices()[:1])

    def pieces():
        step_fn, *rest = prepared("teacher", mesh)
        return step_fn, (mesh, *rest)

    undisturbed, _ = fit(tmp_path / "whole", *pieces())
    for stop in (3, 6):
        with pytest.raises(Stopped):
            fit(tmp_path / "killed", *pieces(), stop_before=stop)
    resumed, began = fit(tmp_path / "killed", *pieces())
    assert began == 6
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), undisturbed, resumed))
    lines = [metrics.read_metrics(tmp_path / name) for name in ("whole", "killed")]
    assert [[line["step"] for line in each] for each in lines] == [list(range(1, 8))] * 2
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]


class Watched:
    """A metric that tells when the host asks for it."""

    def __init__(self, value, ask):
        self._value, self._ask = value, ask

    def __array__(self, *_, **__):
        self._ask()
        return np.asarray(self._value)


@pytest.mark.parametrize("log_every", [1, 3])
def test_metrics_are_asked_for_when_the_next_update_is_under_way_and_only_where_they_are_logged(tmp_path, log_every):
    mesh, events = sharding.make_mesh(jax.devices()[:1]), []
    step_fn, *rest = prepared("teacher", mesh)

    def step(state, *others):
        k = sum(event[0] == "begun" for event in events) + 1
        events.append(("begun", k))
        state, values = step_fn(state, *others)
        return state, {**values, "loss": Watched(values["loss"], lambda: events.append(("asked", k)))}

    fit(tmp_path, step, (mesh, *rest), log_every=log_every, save_every=100)
    expected = []
    for k in range(1, 8):
        expected += [("begun", k)] + [("asked", k - 1)] * (k > 1 and (k - 1) % log_every == 0)
    assert events == [*expected, ("asked", 7)]


def test_a_loop_that_is_over_early_is_saved_and_logged_there_and_stays_over(tmp_path):
    mesh = sharding.make_mesh(jax.devices()[:1])
    for _ in range(2):
        step_fn, *rest = prepared("teacher", mesh)
        state, _ = fit(tmp_path, step_fn, (mesh, *rest), over_at=3, log_every=2)
        assert int(state.step) == 3
        assert [line["step"] for line in metrics.read_metrics(tmp_path)] == [2, 3]
        with Checkpoints(tmp_path) as checkpoints:
            assert checkpoints.latest_step() == 3


def test_a_run_of_gradients_that_are_not_finite_is_given_up_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_MAX_SKIPPED", 3)
    mesh = sharding.make_mesh(jax.devices()[:1])
    step_fn, *rest = prepared("teacher", mesh)

    def poisoned(state, frozen, batch, *others):
        return step_fn(state, frozen, {**batch, "x": batch["x"] * np.nan}, *others)

    with pytest.raises(UserError, match="stage teacher, update 3: the last 3 updates were skipped"):
        fit(tmp_path, poisoned, (mesh, *rest))


def test_a_student_starts_as_its_teacher_in_the_first_update():
    mesh = sharding.make_mesh(jax.devices()[:1])
    teacher = params_of(False)
    student = student_params(teacher, initial_params(EXPERIMENT, True, jax.random.key(2)))
    step, _, frozen, knobs, key = prepared("stage1", mesh)
    # With w = 0 throughout, the guided teacher is the conditional one, which is what the student starts as.
    knobs = dataclasses.replace(knobs, w_max=jnp.float32(0.0))
    losses = []
    for params in (student, params_of(True)):
        params = jax.tree.map(jnp.copy, params)
        state = sharding.place(mesh, make_state(params, STAGES["stage1"].training.optimiser))
        _, values = step(state, frozen, sharding.shard_batch(mesh, batch_of()), knobs, key)
        losses.append(float(values["loss"]))
    assert losses[0] < 1e-10 and losses[1] > 1e-7
