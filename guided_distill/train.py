"""The training step and the only training loop in the house: init -> restore -> loop."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from guided_distill import compilation, guidance, metrics, optim, sharding
from guided_distill.errors import UserError

_MAX_SKIPPED = 20  # non-finite updates in a row before a run is given up: more than a spike, and far from an epoch


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
        state, optimisation = optim.apply_gradients(optimiser, state, grads, knobs.peak_lr, knobs.updates)
        values = {"loss": loss, **named, **optimisation, "param_norm": optax.tree.norm(state.params)}
        return sharding.split(mesh, state), values

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
    on_start: Callable[[int], None]  # (step it goes on from)
    on_step: Callable[[int, int, str], None]  # (step, steps since the last call, note): progress


def fit(loop, step_fn, state, frozen, batches, knobs, key, *, mesh, checkpoints, make_writer):
    """Trains to `loop.updates` or `loop.is_over`, from the newest checkpoint on; returns the final TrainState, saved.

    `batches` yields this process's rows; `make_writer(restored_step)` opens the metrics. Raises UserError when
    updates stay non-finite, with the last good state kept.
    """
    restored = checkpoints.restore_newest(state)
    if restored is not None:
        state, iterator_state = restored
        batches.set_state(iterator_state)
    start, pending = int(state.step), None
    loop.on_start(start)
    with make_writer(start) as writer:
        report = _Reporter(loop, writer, start)
        # evaluate -> save -> next(batch) -> step -> write the metrics of the step before. A state is saved before the
        # batch that follows it is drawn, so a resumed run draws that very batch; and reading a step's metrics after
        # the next one has been dispatched never makes the device wait. Saving waits for it anyway, and the metrics up
        # to a checkpoint must be written before it: a run that goes on from there does not see them again.
        for step in range(start, loop.updates + 1):
            done = step == loop.updates or loop.is_over(writer, state, step)
            if loop.sample_every and (done or step % loop.sample_every == 0) and step != start:
                loop.sample(writer, state, step)
            if (done or step % loop.checkpoint_every == 0) and step != checkpoints.latest_step():
                report(step, pending, done)
                pending = None
                checkpoints.save(step, state, batches.get_state())
            checkpoints.seal_if_written()
            metrics_of_step = None
            if not done:
                batch = sharding.shard_batch(mesh, next(batches))
                state, metrics_of_step = step_fn(state, frozen, batch, knobs, key)
            report(step, pending, done)
            pending = metrics_of_step
            if done:
                break
    return state


class _Reporter:
    """Writes and shows the metrics of an update, when they are due; gives up on a run of non-finite gradients."""

    def __init__(self, loop, writer, start):
        self._loop, self._writer, self._reported = loop, writer, start
        self._rate = metrics.RateMeter()

    def __call__(self, step, values, last):
        loop = self._loop
        if values is None or (step % loop.log_every and not last):
            return
        values = {name: float(value) for name, value in jax.device_get(values).items()}
        if values["skipped"] >= _MAX_SKIPPED:
            raise UserError(
                f"stage {loop.name}, update {step}: the last {values['skipped']:.0f} gradients were not finite; "
                "lower its learning_rate. The checkpoints before it are kept"
            )
        note = f"loss {values['loss']:.4g}"
        steps_per_second = self._rate.update(step)
        if steps_per_second is not None:
            values["images_per_second"] = steps_per_second * loop.batch_size
            note += f"  {values['images_per_second']:.0f} images/s"
        self._writer.scalars(step, values)
        loop.on_step(step, step - self._reported, note)
        self._reported = step
