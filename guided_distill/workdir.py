"""A run in its workdir: opened, checked against its config and devices, and what its stages share."""

import dataclasses
import errno
import functools
import json
from typing import Any

from guided_distill import diffusion, distributed, guidance, sharding
from guided_distill.checkpoint import find_stage, is_complete, load_eval_params
from guided_distill.data import load_dataset, read_tokens
from guided_distill.differences import differing_keys
from guided_distill.errors import Fault, UserError
from guided_distill.experiment import Experiment, from_config
from guided_distill.files import absolute, read_json, write_whole
from guided_distill.stages import Stage, make_stages
from guided_distill.teachers import initial_params, outside_teacher, shapes_of

# Of a workdir that was never one; all else, a full disk among it, is the machine's.
_MISTAKES = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EROFS)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run in its workdir: what its stages share."""

    experiment: Experiment
    workdir: Any
    mesh: Any
    stages: list[Stage]
    grid: diffusion.Grid
    outside: guidance.Teacher | None = None  # the teacher that a user's function returned

    @functools.cached_property
    def dataset(self):
        """The data, loaded when first needed: sampling needs none."""
        return load_dataset(self.experiment.data)

    @functools.cached_property
    def captions(self):
        """Tokens i32 [C, L] of the captions held out, which models are looked at with; None of a set without any."""
        if not self.experiment.data.text_length:
            return None
        return read_tokens(self.dataset.test)

    @property
    def is_main(self):
        """Whether this process writes the files."""
        return distributed.is_main()

    def stage(self, name):
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)

    def given(self, stage):
        """What stands for a stage that was trained elsewhere, as the config names it; None for one of this run."""
        return self.experiment.given(stage.name)

    def checkpoint_of(self, stage):
        """Where the weights of a finished stage are: its directory, or that of the run it was given from."""
        given = self.given(stage)
        return find_stage(given, stage.name) if given else stage.directory(self.workdir)

    def params_of(self, stage):
        """The weights to sample with that a finished stage left."""
        if self.outside is not None and stage.name == "teacher":
            return sharding.place(self.mesh, self.outside.params)
        return load_eval_params(self.checkpoint_of(stage), functools.partial(sharding.by_size, self.mesh))

    def finished(self, stage):
        """Whether there is nothing left to train in this stage."""
        return bool(self.given(stage)) or is_complete(stage.directory(self.workdir))

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
    mesh = sharding.make_mesh(fsdp=experiment.mesh.fsdp)
    for name, batch_size in experiment.batch_sizes.items():
        if create or name == "evaluate":
            parts = getattr(getattr(experiment, name), "accumulate", 1)
            sharding.check_batch(mesh, f"config.{name}.batch_size", batch_size, parts)
    _check_network(experiment)
    outside = outside_teacher(experiment.teacher.factory, experiment) if experiment.teacher.factory else None
    if outside is not None and outside.guided is not None and "two" in experiment.stage2.series:
        raise UserError("config.stage2.series holds 'two', which needs a teacher with classifier-free guidance alone")
    stages = make_stages(experiment, outside)
    grid = diffusion.make_grid(stages[0].model.schedule, experiment.stage2.teacher_steps)
    run = Run(experiment, absolute(workdir), mesh, stages, sharding.place(mesh, grid), outside)
    for name in ("teacher", "stage1"):
        if path := getattr(experiment, name).checkpoint:
            _check_given(config, name, path)
    distributed.agreed(lambda: _check_same_config(run, config))
    if create:
        _ = run.dataset  # loaded before anything is written: a mistake in the data section leaves no workdir behind
        distributed.agreed(lambda: _claim_workdir(run, config))
        if not (run.workdir / "config.json").exists():
            raise UserError(
                f"{run.workdir}: process 0 wrote config.json there, and this one does not see it; "
                "all processes need one workdir on storage that they share"
            )
    return run


def _check_network(experiment):
    try:
        shapes_of(functools.partial(initial_params, experiment, True))
    except (TypeError, ValueError, ZeroDivisionError) as error:
        shape = "x".join(map(str, experiment.data.sample_shape))
        reason = str(error).strip().splitlines()[0][:160]
        raise UserError(f"config.model does not make a network for {shape} samples: {reason}") from error


def _check_given(config, name, path):
    """Raises UserError unless the stage at `path` has finished and was made with the same network and schedule."""
    stage_dir, key = find_stage(path, name), f"config.{name}.checkpoint"
    if not is_complete(stage_dir):
        raise UserError(f"{key}: {stage_dir} is not finished; finish it with --mode=run first")
    if not stage_dir.name.endswith(f"_{name}"):
        raise UserError(f"{key}: {stage_dir} is another stage; a {name} is needed")
    made_with = stage_dir.parent / "config.json"
    if made_with.exists():
        theirs = read_json(made_with)
        lines = differing_keys(_what_it_is(config, name), _what_it_is(theirs, name))
        if lines:
            raise UserError(f"{key}: {stage_dir} is another model ({'; '.join(lines)})")


def _what_it_is(config, name):
    """The part of a config that says which model a stage leaves: what would read its weights wrongly if it differed."""
    keys = ["model", "schedule", "parameterisation"]
    found = {key: config.get(key) for key in keys}
    if name == "stage1":
        found["stage1"] = {key: config["stage1"][key] for key in ("w_min", "w_max")}
        found["to_v"] = bool(config.get("to_v", {}).get("updates"))
    return found


def _check_same_config(run, config):
    path = run.workdir / "config.json"
    theirs = read_json(path) if path.exists() else None
    begun = any(any(run.workdir.glob(f"[0-9][0-9]_*/{name}")) for name in ("checkpoints", "plan.json"))
    lines = differing_keys(dict(config), theirs) if theirs and begun else []
    if lines:
        raise UserError(
            f"{run.workdir} was made with another config ({'; '.join(lines)}); use those values or another --workdir"
        )


def _claim_workdir(run, config):
    try:
        run.workdir.mkdir(parents=True, exist_ok=True)
        write_whole(run.workdir / "config.json", json.dumps(config, indent=2) + "\n")
    except OSError as error:
        kind = UserError if error.errno in _MISTAKES else Fault
        raise kind(f"workdir {run.workdir} cannot be written: {error.strerror or error}") from error
