"""The training step and the only training loop in the house: init -> restore -> loop."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from guided_distill import compilation, guidance, metrics, optim, preemption, sharding
from guided_distill.errors import Fault, Stopped, UserError

# Before a run is given up: more than a spike, and far from an epoch.
_MAX_SKIPPED = 20  # updates in a row that were skipped
_MAX_EXPLODED = 5  # looks in a row, one per line of the log, at a loss so many times above
_EXPLODED = 1000.0  # the typical one, and above
_SCALE = 10.0  # which is more than the mean square of data in [-1, 1], and less than nothing-learnt costs elsewhere


def example_keys(key, step, batch_size):
    """Keys [B], functions of (stage key, step, index in the global batch) and of nothing else."""
    return jax.vmap(lambda index: jax.random.fold_in(jax.random.fold_in(key, step), index))(jnp.arange(batch_size))


def _named_losses(objective, student, teacher, mesh):
    """(params, ema, frozen, batch, knobs, keys) -> (loss [B], {name: [B]}): an objective with its networks bound."""

    def network(params):
        params = sharding.gathered(mesh, params)
        return guidance.make_denoiser(student.model_fn, params, student.schedule, student.parameterisation)

    def named_losses(params, ema, frozen, batch, knobs, keys):
        apply = {"student": network(params)}
        if teacher is not None:
            apply["teacher"] = teacher.denoiser(sharding.gathered(mesh, frozen["teacher"]))
        if ema is not None:
            apply["target_ema"] = network(ema)
        with sharding.visible(mesh):
            return objective(apply, student.schedule, batch, knobs, keys)

    return named_losses


def _mean_of_parts(function, parts):
    """The mean over k of function(part k), trees of floats, for parts [K, ...]: one after the other, to save memory."""
    count = jax.tree.leaves(parts)[0].shape[0]
    shapes = jax.eval_shape(function, jax.tree.map(lambda rows: rows[0], parts))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def add(total, part):
        return jax.tree.map(lambda t, value: t + value / count, total, function(part)), None

    def accumulate(parts, unroll):
        return jax.lax.scan(add, zeros, parts, unroll=unroll)[0]

    # XLA's CPU convolutions are many times slower inside a loop (as in objectives/stage2.py).
    return jax.lax.platform_dependent(
        parts, cpu=functools.partial(accumulate, unroll=True), default=functools.partial(accumulate, unroll=1)
    )


@functools.cache
def make_train_step(objective, student, teacher, optimiser, mesh, accumulate=1):
    """(state, frozen, batch, knobs, key) -> (state, {name: scalar}), jitted; donates the state.

    `student` and `teacher` (or None) are `Teacher.static()`; frozen = {"teacher": weights}, an argument so that the
    program does not contain them. The gradient is the mean of those of `accumulate` parts of the batch, and the same
    as of the whole. The same arguments give the same compiled step.
    """

    named_losses = _named_losses(objective, student, teacher, mesh)

    def train_step(state, frozen, batch, knobs, key):
        def mean_loss(params, batch, keys):
            losses, named = named_losses(params, state.ema, frozen, batch, knobs, keys)
            return losses.mean(), {name: values.mean() for name, values in named.items()}

        def gradient(examples):
            loss_fn = sharding.gathering_twice(mesh, mean_loss)
            found, grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, *examples)
            return found, sharding.split(mesh, grads)

        examples = batch, example_keys(key, state.step, batch["x"].shape[0])
        if accumulate == 1:
            (loss, named), grads = gradient(examples)
        else:
            (loss, named), grads = _mean_of_parts(gradient, sharding.parts_of_batch(mesh, examples, accumulate))
        sound = loss <= knobs.loss_limit
        state, optimisation = optim.apply_gradients(optimiser, state, grads, knobs.peak_lr, knobs.updates, sound)
        return sharding.split(mesh, state), {"loss": loss, **named, **optimisation}

    whole = sharding.replicated(mesh)
    options = compilation.compiler_options(mesh)
    # Where the state lies split, `sharding.split` says how.
    out_shardings = (whole if mesh.shape["fsdp"] == 1 else None, whole)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings, compiler_options=options)


@functools.cache
def make_gap(objective, student, teacher, mesh):
    """(state, frozen, batch, knobs, key) -> mean loss of what the state samples with, jitted; same key, same draws."""
    named_losses = _named_losses(objective, student, teacher, mesh)

    def gap(state, frozen, batch, knobs, key):
        keys = example_keys(key, 0, batch["x"].shape[0])
        return named_losses(state.eval_params, state.ema, frozen, batch, knobs, keys)[0].mean()

    options = compilation.compiler_options(mesh)
    return jax.jit(gap, out_shardings=sharding.replicated(mesh), compiler_options=options)


@dataclasses.dataclass(frozen=True)
class Loop:
    """What the loop of one stage needs besides the step; callables so that it knows no pipeline and no evaluator."""

    name: str
    updates: int
    batch_size: int
    checkpoint_every: int
    log_every: int
    sample_every: int  # 0: never
    sample: Callable[[Any, Any, int], None]  # (writer, state, step): a look at the student on the way
    is_over: Callable[[Any, Any, int], bool]  # (writer, state, step): whether to end before all updates are made
    flops: float  # of an update, recomputation apart, of one device
    peak_flops: float | None  # that a device can do in a second; None where nobody says
    trace: Callable[[int, Any, bool], None]  # (updates since the start, state, whether the loop ends here)
    on_start: Callable[[int], None]  # (step it goes on from)
    on_step: Callable[[int, int, str], None]  # (step, steps since the last call, note): progress


def fit(loop, step_fn, state, frozen, batches, knobs, key, *, mesh, checkpoints, make_writer):
    """Trains to `loop.updates` or `loop.is_over`, from the newest checkpoint on; returns the final TrainState, saved.

    `batches` yields this process's rows; `make_writer(restored_step)` opens the metrics. Raises UserError when updates
    stay non-finite or the loss explodes, with the last good state kept, Fault when no batch or checkpoint can be had,
    and Stopped, with the state saved, when `preemption.asked`.
    """
    restored, watch, limit = checkpoints.restore_newest(state), _Watch(loop.name), math.inf
    if restored is not None:
        state, saved = restored
        watch.typical = saved.pop("typical_loss", None)
        batches.set_state(saved)
        limit = saved.pop("loss_limit", watch.limit)
    start, pending = int(state.step), None
    limited = functools.lru_cache(1)(functools.partial(_limited, mesh, knobs))
    loop.on_start(start)
    with make_writer(start) as writer, preemption.deferred():
        report = _Reporter(loop, writer, start, watch)
        # evaluate -> save -> next(batch) -> step -> write the metrics of the step before. A state is saved before the
        # batch that follows it is drawn, so a resumed run draws that very batch; and reading a step's metrics after
        # the next one has been dispatched never makes the device wait. Saving waits for it anyway, and the metrics up
        # to a checkpoint must be written before it: a run that goes on from there does not see them again.
        for step in range(start, loop.updates + 1):
            stopping = preemption.asked()
            done = step == loop.updates or (not stopping and loop.is_over(writer, state, step))
            if loop.sample_every and not stopping and (done or step % loop.sample_every == 0) and step != start:
                loop.sample(writer, state, step)
            if (done or stopping or step % loop.checkpoint_every == 0) and step != checkpoints.latest_step():
                report(step, pending, done, saving=True)
                pending = None
                writer.flush()
                if step % loop.checkpoint_every == 0:
                    limit = watch.limit
                if done or not watch.exploded:
                    looked = {"typical_loss": watch.typical, "loss_limit": limit}
                    checkpoints.save(step, state, batches.get_state() | looked)
            checkpoints.seal_if_written()
            loop.trace(step - start, state, done or stopping)
            if stopping:
                raise Stopped
            metrics_of_step = None
            if not done:
                batch = sharding.shard_batch(mesh, _next(batches, loop.name, step))
                state, metrics_of_step = step_fn(state, frozen, batch, limited(limit), key)
            report(step, pending, done)
            # Where a look is due, so that what a run learns from does not depend on when it was told to stop.
            pending, limit = metrics_of_step, watch.limit
            if done:
                break
    return state


def _limited(mesh, knobs, limit):
    return dataclasses.replace(knobs, loss_limit=sharding.place(mesh, jnp.float32(limit)))


def _next(batches, name, step):
    try:
        return next(batches)
    except UserError:
        raise
    except Exception as error:  # Of whatever a file system or a decoder raises, in whatever thread of grain's.
        raise Fault(
            f"stage {name}, update {step}: no batch can be read ({type(error).__name__}: {error}); look after the "
            "data, and the same command goes on from the newest checkpoint"
        ) from error


class _Watch:
    """Whether the loss has exploded: by how far it lies above what is typical, for too many looks in a row.

    One such update is skipped; a run of them is a run that is lost. What is typical is a running geometric mean of the
    losses that were looked at where a run always looks, kept with each checkpoint. `exploded` counts.
    """

    def __init__(self, name):
        self._name, self.typical, self.exploded = name, None, 0

    def __call__(self, step, values, learns=True):
        loss, skipped = values["loss"], values["skipped"]
        if skipped >= _MAX_SKIPPED:
            self._give_up(step, f"the last {skipped:.0f} updates were skipped: not finite, or the loss had exploded")
        if not math.isfinite(loss):
            return
        if loss > self.limit:
            self.exploded += 1
            if self.exploded >= _MAX_EXPLODED:
                self._give_up(step, f"the loss is {loss:.3g}, where {self.typical:.3g} was typical")
            return
        self.exploded = 0
        if not learns:
            return
        loss = max(loss, 1e-30)
        self.typical = loss if self.typical is None else self.typical**0.9 * loss**0.1

    @property
    def limit(self):
        """Above which a loss has exploded."""
        # Below the scale of the data none has, however small it was: a student may start as its teacher.
        return math.inf if self.typical is None else _EXPLODED * max(self.typical, _SCALE / _EXPLODED)

    def _give_up(self, step, why):
        raise UserError(
            f"stage {self._name}, update {step}: {why}; lower its learning_rate. The checkpoints before it are kept"
        )


class _Reporter:
    """Writes and shows the metrics of an update, when they are due, once `watch` has looked at them."""

    def __init__(self, loop, writer, start, watch):
        self._loop, self._writer, self._reported, self._watch = loop, writer, start, watch
        self._rate = metrics.RateMeter()

    def __call__(self, step, values, last, saving=False):
        loop = self._loop
        due = last or step % loop.log_every == 0
        if values is None or not (due or saving):
            return
        values = {name: float(value) for name, value in jax.device_get(values).items()}
        self._watch(step, values, learns=due or step % loop.checkpoint_every == 0)
        if not due:
            return
        note = f"loss {values['loss']:.4g}"
        steps_per_second = self._rate.update(step)
        if steps_per_second is not None:
            values |= metrics.throughput(steps_per_second, loop.batch_size, loop.flops, loop.peak_flops)
            note += f"  {values['images_per_second']:.0f} images/s  {values['tflops_per_device']:.3g} TFLOP/s a device"
            if "mfu" in values:
                note += f"  MFU {values['mfu']:.0%}"
        self._writer.scalars(step, values)
        loop.on_step(step, step - self._reported, note)
        self._reported = step
