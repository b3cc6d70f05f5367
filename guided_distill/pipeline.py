"""The title page: the stages, each run or resumed, its weights handed on as the next one's teacher."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from guided_distill import (
    diagnostics,
    distributed,
    evaluate,
    metrics,
    pictures,
    preemption,
    report,
    rounds,
    sharding,
    train,
)
from guided_distill.checkpoint import Checkpoints, mark_complete
from guided_distill.chips import peak_flops
from guided_distill.generate import sample_images
from guided_distill.profiling import make_tracer
from guided_distill.progress import RunProgress
from guided_distill.state import as_teacher, check_same_model, make_state, student_params
from guided_distill.teachers import flops_of_a_call, shapes_of
from guided_distill.workdir import open_run

_GRID_IMAGES = 64


def run(config, workdir, *, trace_updates=0):
    """The whole chain: every stage that is not finished, then the evaluation. The same call again goes on.

    Of each stage that is trained, `trace_updates` updates leave a trace for XProf, in profile/ of its directory.
    """
    this = open_run(config, workdir)
    rounds.check_plans(this)
    finished = distributed.agreed(lambda: [stage.name for stage in this.stages if this.finished(stage)])
    training = sum(stage.work_per_update * stage.training.updates for stage in this.stages)
    with RunProgress(training + _work_of_judging(this), enabled=this.is_main) as progress:
        for stage in this.stages:
            if stage.name in finished:
                progress.skip(stage.work_per_update * stage.training.updates)
                progress.say(f"{stage.name}: already trained")
            else:
                train_stage(this, stage, progress, trace_updates)
        return _judge(this, progress)


def _judge(this, progress):
    """Measures every model, says what each round lost, and makes the report of it all; returns the summary."""
    progress.after_work = preemption.stop_if_asked  # what was measured is written, row by row
    if this.space is not None and this.experiment.evaluate.captions is not None:
        if cut := sum(this.space.too_long(this.captions)):
            progress.say(f"captions longer than the text encoder takes, which lose their end: {cut:,}")
    summary = evaluate.evaluate(this, progress)
    told = summary.setdefault("diagnostics", {})
    for stage in diagnostics.looked_at(this.stages):
        if not diagnostics.is_of(told.get(stage.name), this.experiment, stage):
            told[stage.name] = diagnostics.diagnose(this, stage)
            if this.is_main:
                evaluate.write_summary(this, summary)
        if "warning" in told[stage.name]:
            progress.say(f"warning: {told[stage.name]['warning']}")
        progress.advance(diagnostics.work(this.experiment, [stage]), f"looking at {stage.name}")
    if this.is_main and not (this.workdir / "report.html").exists():
        report.write_tensorboard(this.workdir)
        report.write_report(this.workdir)  # last: it is what says that both are there
        progress.say(f"{this.workdir / 'report.html'}: all of it, to look at")
    return summary


def _work_of_judging(this):
    return evaluate.work(this.experiment, this.stages) + diagnostics.work(this.experiment, this.stages)


def train_stage(this, stage, progress, trace_updates=0):
    """Trains one stage to its end, from its newest checkpoint if there is one, and marks it complete."""
    experiment, mesh = this.experiment, this.mesh
    optimiser, planned = stage.training.optimiser, stage.training.updates
    directory = stage.directory(this.workdir)
    if this.is_main:
        evaluate.forget(this.workdir)
    key = jax.random.fold_in(jax.random.key(experiment.seed), stage.position)
    params, frozen = _weights(this, stage, key)
    stage = rounds.settle(this, stage, frozen, params)
    gate = rounds.Gate(this, stage, frozen, params)
    state = sharding.place(mesh, make_state(params, optimiser))
    with Checkpoints(directory, keep=experiment.checkpoint.keep) as checkpoints:
        state = train.fit(
            _loop(
                this,
                stage,
                progress,
                gate.is_over,
                make_tracer(directory / "profile", trace_updates if this.is_main else 0),
            ),
            rounds.step_of(this, stage),
            state,
            frozen,
            rounds.batches_of(this, stage),
            rounds.knobs_of(this, stage),
            key,
            mesh=mesh,
            checkpoints=checkpoints,
            make_writer=functools.partial(_make_writer, this, stage, metrics.parameter_overview(params)),
        )
    progress.skip(stage.work_per_update * (planned - int(state.step)))
    gate.check(state)
    if this.is_main:
        mark_complete(directory, json.dumps({"stage": stage.name, "step": int(state.step)}) + "\n")


def _weights(this, stage, key):
    """(the weights a stage starts from, what the train step takes besides its state: those that teach it)."""
    if stage.parent is None:
        return _first_params(stage, key, None, this.mesh), {}
    theirs = _params_of_parent(this, stage)
    params = _first_params(stage, key, theirs, this.mesh)
    return params, {"teacher": as_teacher(theirs, this.experiment.teacher_dtype)}


def _params_of_parent(this, stage):
    parent = this.stage(stage.parent)
    params = this.params_of(parent)
    if parent.objective is not None:
        check_same_model(params, shapes_of(parent.init), this.checkpoint_of(parent))
    return params


def _first_params(stage, key, teacher_params, mesh):
    """The weights a stage starts from: fresh ones, or its teacher's with fresh ones for what the teacher lacks."""
    # Copies throughout: the step donates its state, and the teacher, whose weights these may be, is still needed.
    if teacher_params is None or stage.from_scratch:
        return jax.tree.map(jnp.copy, stage.init(key, mesh))
    if _kinds(shapes_of(stage.init)) == _kinds(teacher_params):
        return jax.tree.map(jnp.copy, teacher_params)
    return student_params(teacher_params, stage.init(key, mesh))


def _kinds(tree):
    return jax.tree.structure(tree), [leaf.shape for leaf in jax.tree.leaves(tree)]


def _make_writer(this, stage, overview, restored_step):
    writer = metrics.MetricWriter(stage.directory(this.workdir), restored_step=restored_step, enabled=this.is_main)
    if restored_step == 0:
        writer.text(0, {"parameters": overview, "config": (this.workdir / "config.json").read_text()})
    return writer


def _loop(this, stage, progress, is_over, trace):
    experiment, training = this.experiment, stage.training
    dtype = getattr(experiment.model, "dtype", "float32")

    def on_start(step):
        progress.begin()
        progress.skip(step * stage.work_per_update)

    def on_step(step, steps, note):
        progress.advance(steps * stage.work_per_update, f"{stage.name} {step}/{training.updates}", note)

    return train.Loop(
        name=stage.name,
        updates=training.updates,
        batch_size=training.batch_size,
        checkpoint_every=experiment.checkpoint.every,
        log_every=experiment.log.every,
        sample_every=experiment.log.sample_every,
        sample=functools.partial(_write_samples, this, stage),
        is_over=is_over,
        flops=stage.work_per_update * flops_of_a_call(stage.model, stage.init) / this.mesh.size,
        peak_flops=peak_flops(this.mesh.devices.flat[0], dtype),
        trace=trace,
        on_start=on_start,
        on_step=on_step,
    )


def _write_samples(this, stage, writer, state, step):
    """A grid of samples of the network as it is, at its own number of steps: a PNG, and in TensorBoard."""
    if stage.sampler == "encode":  # what it makes of an image is noise
        return
    batches = sample_images(
        stage.model,
        state.eval_params,
        this.grid,
        this.mesh,
        seed=0,
        num=_GRID_IMAGES,
        w=min(max(1.0, stage.w_range[0]), stage.w_range[1]),
        num_steps=min(stage.num_steps, 16),
        sampler=stage.sampler,
        batch_size=this.experiment.evaluate.batch_size,
        labels=np.arange(_GRID_IMAGES) % stage.model.num_labels(this.conditions),
        conditions=this.conditions,
    )
    picture = pictures.image_grid(this.shown(np.concatenate([x for _, _, x in batches])))
    writer.images(step, {"samples": picture})
    if this.is_main:
        directory = stage.directory(this.workdir) / "samples"
        directory.mkdir(parents=True, exist_ok=True)
        pictures.save_png(directory / f"{step:07d}.png", picture)


def evaluate_run(config, workdir):
    """Measures the models of a finished run again, with the config's `evaluate` section."""
    this = open_run(config, workdir, create=False)
    this.require_finished()
    with RunProgress(_work_of_judging(this), enabled=this.is_main) as progress:
        return _judge(this, progress)
