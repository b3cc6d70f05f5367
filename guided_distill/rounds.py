"""How long and how fast a round of stage two trains: as the config says, or by what short looks at its gap say.

The gap of a round is the mean loss of its student over the same training examples and the same draws whenever it is
asked for, so that two values differ by the weights alone.
"""

import dataclasses
import itertools
import math

import jax
import numpy as np

from guided_distill import distributed, preemption, sharding, train
from guided_distill.data import make_batches, read_records
from guided_distill.errors import UserError
from guided_distill.files import read_json, write_json
from guided_distill.metrics import read_metrics
from guided_distill.stages import make_knobs
from guided_distill.state import as_teacher, make_state

_CLOSED = 1e-9  # a gap so small is rounding: the stochastic student's at N = 1 is 0 from the start
_LOOK = 0x6A9  # folded into the seed, so that a look draws nothing that training draws


def batches_of(run, stage):
    """The training batches of a stage, from its first."""
    return make_batches(
        run.dataset.train,
        batch_size=stage.training.batch_size,
        seed=run.experiment.seed + 1000 * stage.position,
        flip=run.experiment.data.flip,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def knobs_of(run, stage):
    """The stage's traced numbers on all devices."""
    return sharding.place(run.mesh, make_knobs(stage, run.grid, run.experiment.stage1.w_margin))


def step_of(run, stage):
    """The compiled train step of a stage."""
    training = stage.training
    return train.make_train_step(
        stage.objective, stage.model, stage.teacher, training.optimiser, run.mesh, training.accumulate
    )


def gap_of(run, stage, frozen):
    """A function of the stage's TrainState: its gap, a float; `frozen` as for the train step."""
    share = _gap_samples(run) // jax.process_count()
    indices = np.arange(share) + share * jax.process_index()
    batch = sharding.shard_batch(run.mesh, read_records(run.dataset.train, indices % len(run.dataset.train)))
    measure = train.make_gap(stage.objective, stage.model, stage.teacher, run.mesh)
    knobs, key = knobs_of(run, stage), jax.random.fold_in(jax.random.key(run.experiment.seed), _LOOK)
    return lambda state: float(measure(state, frozen, batch, knobs, key))


def _gap_samples(run):
    return -(-run.experiment.rounds.gap_samples // run.mesh.size) * run.mesh.size


def gap_work(run, stage):
    """What one look at the gap costs, in forward passes of one image."""
    return _gap_samples(run) * (stage.model.calls_per_step + stage.teacher_calls)


# The gate


class Gate:
    """Ends a round when its gap has stopped falling, and refuses to go on to the next where too much of it is left.

    `params` are the weights the round starts from. What it measured is in the stage's metrics, so that a run that is
    killed decides as the undisturbed one.
    """

    def __init__(self, run, stage, frozen, params):
        self._run, self._stage, self._config = run, stage, run.experiment.rounds
        self._gap, self._opening, self._history = None, None, None
        holds = self._config.gate_most_left is not None and any(other.parent == stage.name for other in run.stages)
        if stage.series and (self._config.gate_every or holds):
            self._gap = gap_of(run, stage, frozen)
            if holds:
                self._opening = self._gap(sharding.place(run.mesh, make_state(params, stage.training.optimiser)))

    def is_over(self, writer, state, step):
        """Whether the round ends after `step` updates."""
        every = self._config.gate_every
        if self._gap is None or not every:
            return False
        if self._history is None:
            lines = distributed.agreed(lambda: read_metrics(self._stage.directory(self._run.workdir)))
            self._history = {line["step"]: line["gap"] for line in lines if "gap" in line and line["step"] <= step}
        if step % every:
            return False
        if step not in self._history:
            gap = self._gap(state)
            self._history[step] = gap if math.isfinite(gap) else None  # as the metrics keep it
            writer.scalars(step, {"gap": gap})
        now, before = self._history[step], self._history.get(step - every)
        if now is None or before is None:
            return False
        return now <= _CLOSED or now >= (1.0 - self._config.gate_least_fall) * before

    def check(self, state):
        """Raises UserError where more of the gap is left than config.rounds.gate_most_left, and a round follows."""
        if self._opening is None:
            return
        gap, most = self._gap(state), self._config.gate_most_left
        if not gap <= max(most * self._opening, _CLOSED):
            left = f"{gap / self._opening:.0%}" if self._opening > _CLOSED else f"{gap:.2g}"
            raise UserError(
                f"{self._stage.name}: {left} of the gap to its teacher is left, more than "
                f"config.rounds.gate_most_left = {most:g}, so the next round does not begin. Its weights are kept: "
                "raise that key to go on with them, or train longer in another --workdir (config.stage2.updates)"
            )


# The plan


def check_plans(run):
    """Raises UserError where planning a round would cost more than the round itself."""
    if run.experiment.rounds.plan == "auto":
        for stage in (stage for stage in run.stages if stage.series):
            planning, training = plan_work(run, stage), stage.training.updates * stage.work_per_update
            if planning >= training:
                raise UserError(
                    f"{stage.name}: its plan would cost {planning / training:.1f} times its {stage.training.updates} "
                    "updates; lower config.rounds.probe_updates or gap_samples, name fewer probe_rates, or raise "
                    "config.stage2.updates"
                )


def settle(run, stage, frozen, params):
    """The stage with the updates and the learning rate that its plan gives it; itself where the config gives them.

    A round's share of all updates goes by the gap that the series has to close there before it is trained; of the
    learning rates that are probed for a few updates, the one that leaves the least gap is taken. The plan is noted in
    the stage's directory.
    """
    if run.experiment.rounds.plan == "fixed" or not stage.series:
        return stage
    path = _plan_path(run, stage)
    plan = distributed.agreed(lambda: read_json(path) if path.exists() else None)
    if plan is None:
        plan = _make_plan(run, stage, frozen, params)
        if run.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, plan)
    chosen = {key: plan[key] for key in ("updates", "learning_rate")}
    return dataclasses.replace(stage, training=dataclasses.replace(stage.training, **chosen))


def _plan_path(run, stage):
    return stage.directory(run.workdir) / "plan.json"


def _make_plan(run, stage, frozen, params):
    rounds = _rounds_of(run, stage)
    first = _plan_path(run, rounds[0])
    opening = None
    if stage is not rounds[0]:
        opening = distributed.agreed(lambda: read_json(first)["opening_gaps"] if first.exists() else None)
    opening = opening or _opening_gaps(run, rounds)
    probes = _probe(run, stage, frozen, params)
    if not any(map(math.isfinite, probes.values())):
        raise UserError(
            f"{stage.name}: no learning rate of {', '.join(f'{rate:g}' for rate in probes)} left a finite gap"
        )
    work = sum(other.training.updates * other.work_per_update - plan_work(run, other) for other in rounds)
    updates = shares(rounds, [opening[other.name] for other in rounds], work)
    return {
        "updates": updates[rounds.index(stage)],
        "learning_rate": min(probes, key=lambda rate: (not math.isfinite(probes[rate]), probes[rate])),
        "opening_gaps": opening,
        "probes": {f"{rate:g}": gap for rate, gap in probes.items()},
    }


def _rounds_of(run, stage):
    """All rounds of the stage's series, itself among them: their names differ in the number of steps alone."""
    series = stage.name.rpartition("_")[0]
    return [other for other in run.stages if other.series and other.name.rpartition("_")[0] == series]


def plan_work(run, stage):
    """What making the plan of a round costs, in forward passes of one image."""
    config, rounds = run.experiment.rounds, _rounds_of(run, stage)
    probes = len(config.probe_rates) * (config.probe_updates * stage.work_per_update + gap_work(run, stage))
    return probes + sum(gap_work(run, other) for other in rounds if stage.name == rounds[0].name)


def shares(rounds, gaps, work):
    """Updates of each round, at least 1, that cost `work` together.

    Where u updates leave c / u of a gap, the sum of what is left is least at u proportional to sqrt(gap / cost).
    """
    costs = np.array([stage.work_per_update for stage in rounds], np.float64)
    wanted = np.sqrt(np.maximum(gaps, _CLOSED) / costs)
    return [max(1, int(updates)) for updates in work * wanted / (costs * wanted).sum()]


def _opening_gaps(run, rounds):
    """{round: the gap there of the weights that the series starts from, as their own teacher}."""
    params = run.params_of(run.stage(rounds[0].parent))
    state = sharding.place(run.mesh, make_state(params, rounds[0].training.optimiser))
    frozen = {"teacher": as_teacher(params, run.experiment.teacher_dtype)}
    gaps = {}
    for stage in rounds:
        gaps[stage.name] = gap_of(run, stage, frozen)(state)
        preemption.stop_if_asked()
    if not all(map(math.isfinite, gaps.values())):
        raise UserError(f"{rounds[0].parent}: its output is not finite, so no rounds can be planned from it ({gaps})")
    return gaps


def _probe(run, stage, frozen, params):
    """{learning rate: the gap that a few updates with it leave}, each from the same weights on the same batches."""
    config, training = run.experiment.rounds, stage.training
    step_fn, gap = step_of(run, stage), gap_of(run, stage, frozen)
    key, found = jax.random.key(run.experiment.seed), {}
    for rate in (training.learning_rate * factor for factor in config.probe_rates):
        probe = dataclasses.replace(training, updates=config.probe_updates, learning_rate=rate)
        knobs = knobs_of(run, dataclasses.replace(stage, training=probe))
        # A copy: the step donates its state, and the round itself starts from these weights.
        start = make_state(jax.tree.map(lambda p: p.copy(), params), training.optimiser)
        state = sharding.place(run.mesh, start)
        for batch in itertools.islice(batches_of(run, stage), config.probe_updates):
            state, _ = step_fn(state, frozen, sharding.shard_batch(run.mesh, batch), knobs, key)
            preemption.stop_if_asked()
        found[rate] = gap(state)
    return found
