"""How long and how fast a round of stage two trains: as the config says, or by what short looks at its gap say.

The gap of a round is the mean loss of its student over the same training examples and the same draws whenever it is
asked for, so that two values differ by the weights alone.
"""

import dataclasses
import itertools
import json

import jax
import numpy as np

from guided_distill import sharding, train
from guided_distill.data import make_batches, read_records
from guided_distill.errors import UserError
from guided_distill.files import read_json, write_whole
from guided_distill.metrics import read_metrics
from guided_distill.stages import make_knobs
from guided_distill.state import make_state

_PLAN = "plan.json"


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
    return sharding.replicate(run.mesh, make_knobs(stage, run.grid, run.experiment.stage1.w_margin))


def gap_of(run, stage, frozen):
    """A function of the stage's TrainState: its gap, a float; `frozen` as for the train step."""
    share = _gap_samples(run) // jax.process_count()
    indices = np.arange(share) + share * jax.process_index()
    batch = sharding.shard_batch(run.mesh, read_records(run.dataset.train, indices % len(run.dataset.train)))
    measure = train.make_gap(stage.objective, stage.model, stage.teacher, run.mesh)
    knobs, key = knobs_of(run, stage), jax.random.key(run.experiment.seed)
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
        if stage.series and (self._config.gate_every or self._config.gate_most_left is not None):
            self._gap = gap_of(run, stage, frozen)
            if self._config.gate_most_left is not None:
                self._opening = self._gap(sharding.replicate(run.mesh, make_state(params, stage.training.optimiser)))

    def is_over(self, writer, state, step):
        """Whether the round ends after `step` updates."""
        every = self._config.gate_every
        if self._gap is None or not every:
            return False
        if self._history is None:
            lines = read_metrics(self._stage.directory(self._run.workdir))
            self._history = {line["step"]: line["gap"] for line in lines if "gap" in line and line["step"] <= step}
        if step % every:
            return False
        if step not in self._history:
            self._history[step] = self._gap(state)
            writer.scalars(step, {"gap": self._history[step]})
        before = self._history.get(step - every)
        return before is not None and self._history[step] > (1.0 - self._config.gate_least_fall) * before

    def check(self, state):
        """Raises UserError where more of the gap is left than config.rounds.gate_most_left."""
        most = self._config.gate_most_left
        if self._opening is None:
            return
        left = self._gap(state) / self._opening
        if not left <= most:
            raise UserError(
                f"{self._stage.name}: {left:.0%} of the gap to its teacher is left, more than "
                f"config.rounds.gate_most_left = {most:g}, so the next round does not begin. Its weights are kept: "
                "raise that key to go on with them, or train longer in another --workdir (config.stage2.updates)"
            )


# The plan


def settle(run, stage, frozen, params):
    """The stage with the updates and the learning rate that its plan gives it; itself where the config gives them.

    A round's share of all updates goes by the gap that the series has to close there before it is trained; of the
    learning rates that are probed for a few updates, the one that leaves the least gap is taken. The plan is noted in
    the stage's directory.
    """
    if run.experiment.rounds.plan == "fixed" or not stage.series:
        return stage
    path = stage.directory(run.workdir) / _PLAN
    plan = read_json(path) if path.exists() else _make_plan(run, stage, frozen, params)
    if run.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(plan, indent=1) + "\n")
    chosen = {key: plan[key] for key in ("updates", "learning_rate")}
    return dataclasses.replace(stage, training=dataclasses.replace(stage.training, **chosen))


def _make_plan(run, stage, frozen, params):
    rounds = _rounds_of(run, stage)
    gaps = _opening_gaps(run, rounds)
    probes = _probe(run, stage, frozen, params)
    return {
        "updates": shares(rounds, gaps, sum(_fixed_work(run, other) for other in rounds))[rounds.index(stage)],
        "learning_rate": min(probes, key=probes.get),
        "opening_gaps": {other.name: gap for other, gap in zip(rounds, gaps, strict=True)},
        "probes": {f"{rate:g}": gap for rate, gap in probes.items()},
    }


def _rounds_of(run, stage):
    """All rounds of the stage's series, itself among them."""
    return [other for other in run.stages if other.name[:-5] == stage.name[:-5]]  # stage2_det_0004 less its last five


def plan_work(run, stage):
    """What making the plan of a round costs, in forward passes of one image."""
    config = run.experiment.rounds
    probes = len(config.probe_rates) * (config.probe_updates * stage.work_per_update + gap_work(run, stage))
    return probes + sum(gap_work(run, other) for other in _rounds_of(run, stage))


def _fixed_work(run, stage):
    """What the config's own recipe spends on a round, less what planning it costs."""
    return max(stage.training.updates * stage.work_per_update - plan_work(run, stage), stage.work_per_update)


def shares(rounds, gaps, work):
    """Updates of each round, at least 1, that cost `work` together.

    Where u updates leave c / u of a gap, the sum of what is left is least at u proportional to sqrt(gap / cost).
    """
    costs = np.array([stage.work_per_update for stage in rounds], np.float64)
    wanted = np.sqrt(np.asarray(gaps) / costs)
    return [max(1, int(updates)) for updates in work * wanted / (costs * wanted).sum()]


def _opening_gaps(run, rounds):
    """The gap at every round of the weights that the series starts from, as their own teacher."""
    params = run.params_of(run.stage(rounds[0].parent))
    state = sharding.replicate(run.mesh, make_state(params, rounds[0].training.optimiser))
    return [gap_of(run, stage, {"teacher": params})(state) for stage in rounds]


def _probe(run, stage, frozen, params):
    """{learning rate: the gap that a few updates with it leave}, each from the same weights on the same batches."""
    config, training = run.experiment.rounds, stage.training
    step_fn = train.make_train_step(stage.objective, stage.model, stage.teacher, training.optimiser, run.mesh)
    gap, key, found = gap_of(run, stage, frozen), jax.random.key(run.experiment.seed), {}
    for rate in (training.learning_rate * factor for factor in config.probe_rates):
        probe = dataclasses.replace(training, updates=config.probe_updates, learning_rate=rate)
        knobs = knobs_of(run, dataclasses.replace(stage, training=probe))
        # A copy: the step donates its state, and the round itself starts from these weights.
        start = make_state(jax.tree.map(lambda p: p.copy(), params), training.optimiser)
        state = sharding.replicate(run.mesh, start)
        for batch in itertools.islice(batches_of(run, stage), config.probe_updates):
            state, _ = step_fn(state, frozen, sharding.shard_batch(run.mesh, batch), knobs, key)
        found[rate] = gap(state)
    return found
