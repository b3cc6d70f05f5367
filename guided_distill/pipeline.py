"""The title page: the stages as data, each run or resumed, its weights handed on as the next one's teacher."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from guided_distill import diffusion, evaluate, guidance, metrics, pictures, sharding, train
from guided_distill.checkpoint import Checkpoints, find_stage, is_complete, load_eval_params, mark_complete
from guided_distill.data import load_dataset, make_batches
from guided_distill.errors import UserError
from guided_distill.experiment import Experiment, Training, differing_keys, from_config
from guided_distill.files import absolute, write_whole
from guided_distill.generate import sample_images
from guided_distill.models import BACKBONES, make_model_fn
from guided_distill.objectives import Knobs, make_denoise, make_stage1, make_stage2
from guided_distill.progress import RunProgress
from guided_distill.state import check_same_model, make_state, student_params

_GRID_IMAGES = 64


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training: the objective, whose output it learns, from which weights it starts, for how long."""

    name: str
    position: int
    objective: Callable
    training: Training
    model: guidance.Teacher  # static: the network that is trained
    teacher: guidance.Teacher | None  # static: the network that is frozen, the one of the stage before
    num_steps: int  # of the sampler this stage trains or, before stage two, is looked at with

    @property
    def work_per_update(self):
        """In forward passes of one image: three for the student, and what the teacher is asked."""
        asked = 0 if self.teacher is None else 2
        return self.training.batch_size * (3 + asked)

    def directory(self, workdir):
        """`workdir/<nn>_<name>`."""
        return workdir / f"{self.position:02d}_{self.name}"


@functools.cache
def _null_label(num_classes):
    # Cached, since a compiled step is looked up by the functions it was made of.
    return lambda cond: {**cond, "label": jnp.full_like(cond["label"], num_classes)}


@functools.cache
def _module(experiment, w_conditioned):
    module, _ = BACKBONES[experiment.backbone]
    both = 2 if experiment.parameterisation == "both" else 1
    config = dataclasses.replace(
        experiment.model,
        num_classes=experiment.data.num_classes,
        out_channels=both * experiment.data.channels,
        w_conditioned=w_conditioned,
    )
    return module(config)


@functools.cache
def make_model(experiment, w_conditioned):
    """The network of an experiment as a Teacher without weights: the teacher's, or with a w input the students'."""
    return guidance.Teacher(
        model_fn=make_model_fn(_module(experiment, w_conditioned)),
        params=None,
        schedule=experiment.schedule,
        parameterisation=experiment.parameterisation,
        null_cond=_null_label(experiment.data.num_classes),
        num_classes=experiment.data.num_classes,
        sample_shape=experiment.data.image_shape,
        w_conditioned=w_conditioned,
    )


def make_stages(experiment: Experiment) -> list[Stage]:
    """teacher -> stage1 -> stage2_det_<N> for N = teacher_steps / 2, ..., 2, 1."""
    teacher, student = make_model(experiment, False), make_model(experiment, True)
    denoise = make_denoise(
        weighting=experiment.weighting,
        null_cond=teacher.null_cond,
        cond_dropout=experiment.teacher.cond_dropout,
        num_times=experiment.teacher.num_times,
    )
    stage1 = make_stage1(weighting=experiment.weighting, num_times=experiment.teacher.num_times)
    stage2 = make_stage2(weighting=experiment.weighting)
    full = experiment.stage2.teacher_steps
    stages = [
        Stage("teacher", 0, denoise, experiment.teacher, teacher, None, full),
        Stage("stage1", 1, stage1, experiment.stage1, student, teacher, full),
    ]
    for position, num_steps in enumerate(experiment.stage2.rounds(), start=2):
        training = dataclasses.replace(experiment.stage2, updates=experiment.stage2.updates_of(num_steps))
        stages.append(Stage(f"stage2_det_{num_steps:04d}", position, stage2, training, student, student, num_steps))
    return stages


def initial_params(experiment, w_conditioned, key):
    """Fresh parameters of the experiment's network, float32."""
    z = jnp.zeros((1, *experiment.data.image_shape))
    one = jnp.zeros(1)
    return jax.jit(_module(experiment, w_conditioned).init)(key, z, one, one.astype(jnp.int32), one)["params"]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run in its workdir: what its stages share."""

    experiment: Experiment
    workdir: Any
    mesh: Any
    stages: list[Stage]
    grid: diffusion.Grid

    @functools.cached_property
    def dataset(self):
        """The data, loaded when first needed: sampling needs none."""
        return load_dataset(self.experiment.data)

    @property
    def is_main(self):
        """Whether this process writes the files."""
        return jax.process_index() == 0

    def checkpoint_of(self, stage):
        """Where the weights of a finished stage are: its directory, or the teacher checkpoint that was given."""
        outside = self.experiment.teacher.checkpoint
        return absolute(outside) if stage.name == "teacher" and outside else stage.directory(self.workdir)

    def params_of(self, stage):
        """The weights to sample with that a finished stage left."""
        return load_eval_params(self.checkpoint_of(stage), sharding.replicated(self.mesh))

    def finished(self, stage):
        """Whether there is nothing left to train in this stage."""
        return bool(stage.name == "teacher" and self.experiment.teacher.checkpoint) or is_complete(
            stage.directory(self.workdir)
        )

    def require_finished(self):
        """Raises UserError unless every stage has been trained."""
        for stage in self.stages:
            if not self.finished(stage):
                raise UserError(
                    f"{stage.directory(self.workdir)}: this stage is not finished; finish it with --mode=run"
                )


def open_run(config, workdir, *, create=True) -> Run:
    """Checks config, devices, data and workdir, and writes config.json; without `create` the run must be there already.

    Raises UserError for each that is wrong.
    """
    experiment = from_config(config)
    mesh = sharding.make_mesh()
    for name in ("teacher", "stage1", "stage2", "evaluate") if create else ("evaluate",):
        sharding.check_batch(mesh, f"config.{name}.batch_size", getattr(experiment, name).batch_size)
    _check_network(experiment)
    grid = sharding.replicate(mesh, diffusion.make_grid(experiment.schedule, experiment.stage2.teacher_steps))
    run = Run(experiment, absolute(workdir), mesh, make_stages(experiment), grid)
    if experiment.teacher.checkpoint:
        _check_outside_teacher(config, experiment.teacher.checkpoint)
    _check_same_config(run, config)
    if create:
        _ = run.dataset  # loaded before anything is written: a mistake in the data section leaves no workdir behind
        _claim_workdir(run, config)
    return run


def param_shapes(experiment, w_conditioned):
    """The tree of parameters as ShapeDtypeStructs: nothing is computed."""
    return jax.eval_shape(functools.partial(initial_params, experiment, w_conditioned), jax.random.key(0))


def _check_network(experiment):
    try:
        param_shapes(experiment, True)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        shape = "x".join(map(str, experiment.data.image_shape))
        reason = str(error).strip().splitlines()[0][:160]
        raise UserError(f"config.model does not make a network for {shape} images: {reason}") from error


def _check_outside_teacher(config, path):
    """Raises UserError unless the teacher at `path` has finished and was made with the same network and schedule."""
    stage_dir = find_stage(path)
    if not is_complete(stage_dir):
        raise UserError(f"config.teacher.checkpoint: {stage_dir} is not finished; finish it with --mode=run first")
    if "_teacher" not in stage_dir.name:
        raise UserError(f"config.teacher.checkpoint: {stage_dir} is a student's; a teacher is needed")
    made_with = stage_dir.parent / "config.json"
    if made_with.exists():
        keys = ("model", "schedule", "parameterisation")
        theirs = json.loads(made_with.read_text())
        lines = differing_keys({k: config[k] for k in keys}, {k: theirs.get(k) for k in keys})
        if lines:
            raise UserError(f"config.teacher.checkpoint: {stage_dir} is another model ({'; '.join(lines)})")


def _check_same_config(run, config):
    path = run.workdir / "config.json"
    try:
        theirs = json.loads(path.read_text()) if path.exists() else None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}); delete it, or use another --workdir") from error
    begun = any((stage.directory(run.workdir) / "checkpoints").exists() for stage in run.stages)
    lines = differing_keys(dict(config), theirs) if theirs and begun else []
    if lines:
        raise UserError(
            f"{run.workdir} was made with another config ({'; '.join(lines)}); use those values or another --workdir"
        )


def _claim_workdir(run, config):
    try:
        if run.is_main:
            run.workdir.mkdir(parents=True, exist_ok=True)
            write_whole(run.workdir / "config.json", json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"workdir {run.workdir} cannot be written: {error.strerror or error}") from error


def run(config, workdir):
    """The whole chain: every stage that is not finished, then the evaluation. The same call again goes on."""
    this = open_run(config, workdir)
    training = sum(stage.work_per_update * stage.training.updates for stage in this.stages)
    with RunProgress(training + evaluate.work(this.experiment, this.stages), enabled=this.is_main) as progress:
        for stage in this.stages:
            if this.finished(stage):
                progress.skip(stage.work_per_update * stage.training.updates)
                progress.say(f"{stage.name}: already trained")
            else:
                train_stage(this, stage, progress)
        return evaluate.evaluate(this, progress)


def train_stage(this, stage, progress):
    """Trains one stage to its end, from its newest checkpoint if there is one, and marks it complete."""
    experiment, mesh, training = this.experiment, this.mesh, stage.training
    directory = stage.directory(this.workdir)
    if this.is_main:
        evaluate.forget(this.workdir)
    key = jax.random.fold_in(jax.random.key(experiment.seed), stage.position)
    frozen = {}
    if stage.teacher is None:
        params = initial_params(experiment, False, key)
    else:
        before = this.stages[stage.position - 1]
        frozen["teacher"] = this.params_of(before)
        like = param_shapes(experiment, stage.teacher.w_conditioned)
        check_same_model(frozen["teacher"], like, this.checkpoint_of(before))
        fresh = frozen["teacher"] if stage.teacher.w_conditioned else initial_params(experiment, True, key)
        params = student_params(frozen["teacher"], fresh)
    state = sharding.replicate(mesh, make_state(params, training.optimiser))
    batches = make_batches(
        this.dataset.train,
        batch_size=training.batch_size,
        seed=experiment.seed + 1000 * stage.position,
        flip=experiment.data.flip,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    step_fn = train.make_train_step(stage.objective, stage.model, stage.teacher, training.optimiser, mesh)
    with Checkpoints(directory, keep=experiment.checkpoint.keep) as checkpoints:
        train.fit(
            _loop(this, stage, progress),
            step_fn,
            state,
            frozen,
            batches,
            sharding.replicate(mesh, make_knobs(experiment, stage, this.grid)),
            key,
            mesh=mesh,
            checkpoints=checkpoints,
            make_writer=functools.partial(_make_writer, this, stage, metrics.parameter_overview(params)),
        )
    if this.is_main:
        mark_complete(directory, json.dumps({"stage": stage.name, "step": training.updates}) + "\n")


def _make_writer(this, stage, overview, restored_step):
    writer = metrics.MetricWriter(stage.directory(this.workdir), restored_step=restored_step, enabled=this.is_main)
    if restored_step == 0:
        writer.text(0, {"parameters": overview, "config": (this.workdir / "config.json").read_text()})
    return writer


def _loop(this, stage, progress):
    experiment, training = this.experiment, stage.training

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
        on_start=on_start,
        on_step=on_step,
    )


def make_knobs(experiment, stage, grid):
    """The traced numbers of a stage, on the host; `grid` has experiment.stage2.teacher_steps intervals."""
    return Knobs(
        num_steps=np.int32(stage.num_steps),
        updates=np.int32(stage.training.updates),
        peak_lr=np.float32(stage.training.learning_rate),
        w_min=np.float32(experiment.stage1.w_min),
        w_max=np.float32(experiment.stage1.w_max),
        grid=grid,
    )


def _write_samples(this, stage, writer, state, step):
    """A grid of samples of the network as it is, at its own number of steps: a PNG, and in TensorBoard."""
    batches = sample_images(
        stage.model,
        state.eval_params,
        this.grid,
        this.mesh,
        seed=0,
        num=_GRID_IMAGES,
        w=min(1.0, this.experiment.stage1.w_max),
        num_steps=min(stage.num_steps, 16),
        batch_size=this.experiment.evaluate.batch_size,
        labels=np.arange(_GRID_IMAGES) % stage.model.num_classes,
    )
    picture = pictures.image_grid(np.concatenate([x for _, _, x in batches]))
    writer.images(step, {"samples": picture})
    if this.is_main:
        directory = stage.directory(this.workdir) / "samples"
        directory.mkdir(parents=True, exist_ok=True)
        pictures.save_png(directory / f"{step:07d}.png", picture)


def evaluate_run(config, workdir):
    """Measures the models of a finished run again, with the config's `evaluate` section."""
    this = open_run(config, workdir, create=False)
    this.require_finished()
    with RunProgress(evaluate.work(this.experiment, this.stages), enabled=this.is_main) as progress:
        return evaluate.evaluate(this, progress)
