"""A run in its workdir: opened, checked against its config and devices, and what its stages share."""

import dataclasses
import errno
import functools
import json
from typing import Any

import numpy as np

from guided_distill import diffusion, distributed, guidance, latents, sharding
from guided_distill.checkpoint import find_stage, is_complete, load_eval_params
from guided_distill.data import Dataset, load_dataset, read_captions, read_records, read_tokens
from guided_distill.differences import differing_keys
from guided_distill.errors import Fault, UserError
from guided_distill.experiment import Experiment, from_config
from guided_distill.files import absolute, read_json, write_whole
from guided_distill.interop import feature_weights, latent_folder, salimans_ho
from guided_distill.latent_space import frozen_hash, open_space
from guided_distill.stages import Stage, make_stages
from guided_distill.teachers import initial_params, make_module, outside_teacher, shapes_of
from guided_distill.text import hashed_words

# Of a workdir that was never one; all else, a full disk among it, is the machine's.
_MISTAKES = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EROFS)


_CONDITIONS = 1024  # records of latents whose captions models are looked at with: each is some hundred KB


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
    def conditions(self):
        """{name: [C, ...]}: what models are looked at with besides labels; None where they take nothing else.

        Of the records held out, or of config.evaluate.captions: "tokens" i32 [C, L], or for latents "text" and what
        else their network takes, f16.
        """
        fields = [name for name, *_ in self.stages[0].model.cond_fields]
        if not fields:
            return None
        if self.experiment.evaluate.captions is not None:
            return self.conditions_of(self.captions)
        test = self.dataset.test
        if fields == ["tokens"]:
            return {"tokens": read_tokens(test)}
        rows = read_records(test, np.arange(min(len(test), _CONDITIONS)))
        return {name: rows[name].astype(np.float16) for name in fields}

    def conditions_of(self, captions, *, truncate=True):
        """The same of captions in words. Raises UserError for one that is too long, unless it may lose its end."""
        data = self.experiment.data
        if self.space is None:
            return {"tokens": hashed_words(captions, length=data.text_length, vocabulary=data.vocabulary)}
        text, null = (self.space.embed(words, truncate=truncate).astype(np.float16) for words in (captions, [""]))
        return {"text": text, "null_text": np.broadcast_to(null, text.shape)}

    @functools.cached_property
    def captions(self):
        """The words of the captions that `conditions` has; None where there are none."""
        if not self.experiment.data.text_length:
            return None
        path = self.experiment.evaluate.captions
        if path is not None:
            return _read_lines(path)
        return read_captions(self.dataset.test, self.stages[0].model.num_labels(self.conditions))

    @functools.cached_property
    def space(self):
        """What turns latents into pictures; None where the network makes pictures itself."""
        return None if self.experiment.latent_model is None else open_space(self.experiment.latent_model)

    @property
    def picture_shape(self):
        """(H, W, C) of the pictures that samples stand for."""
        shape = self.experiment.data.sample_shape
        return shape if self.space is None else self.space.picture_shape(shape)

    def shown(self, x):
        """Samples [B, *S] as the pictures [B, H, W, C] they stand for."""
        return x if self.space is None else self.space.decode(x)

    @functools.cached_property
    def pictures(self):
        """(DataConfig, Dataset) of the pictures that samples are measured against: decoded where data are latents."""
        return pictures_of(self.experiment.data, self.dataset, self.space)

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
        if given and (latent_folder.is_latent(given) or salimans_ho.is_checkpoint(given)):
            return absolute(given)
        return find_stage(given, stage.name) if given else stage.directory(self.workdir)

    def params_of(self, stage):
        """The weights to sample with that a finished stage left."""
        if self.outside is not None and stage.name == "teacher":
            return sharding.place(self.mesh, self.outside.params)
        if self.given(stage) and latent_folder.is_latent(self.given(stage)):
            return sharding.place(self.mesh, latent_folder.read_latent(self.given(stage), ["unet"])[1]["unet"])
        if self.given(stage) and salimans_ho.is_checkpoint(self.given(stage)):
            return sharding.place(self.mesh, _read_salimans_ho(self.experiment, self.given(stage))[0])
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


@dataclasses.dataclass(frozen=True, eq=False)
class Decoded:
    """A source of latents as one of the pictures [H, W, C], f32 in [-1, 1], that their means stand for."""

    source: Any
    space: Any

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        return self.__getitems__([i])[0]

    def __getitems__(self, indices):
        """The records `indices`, decoded together."""
        found = read_records(self.source, indices)
        pictures = self.space.decode(found["x"])
        return [{"image": x, "label": label} for x, label in zip(pictures, found["label"], strict=True)]


def pictures_of(data, dataset, space):
    """(DataConfig, Dataset) of the pictures that a data set is of; `space` decodes them where they are latents."""
    if space is None:
        return data, dataset
    shape = space.picture_shape(data.sample_shape)
    train, test = (Decoded(split, space) for split in (dataset.train, dataset.test))
    theirs = dataclasses.replace(data, shape=shape, data_range=1.0)
    return theirs, Dataset(data.name, shape, data.num_classes, train, test)


def _read_lines(path):
    try:
        lines = absolute(path).read_text().splitlines()
    except OSError as error:
        raise UserError(f"config.evaluate.captions: {path} cannot be read ({error.strerror or error})") from error
    captions = [line.strip() for line in lines if line.strip()]
    if not captions:
        raise UserError(f"config.evaluate.captions: {path} holds no captions; write one a line")
    return captions


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
            _check_given(config, name, path, create)
    distributed.agreed(lambda: _check_same_config(run, config))
    if create:
        _ = run.dataset  # loaded before anything is written: a mistake in the data section leaves no workdir behind
        _check_latents(experiment)
        _check_evaluation(experiment.evaluate)
        distributed.agreed(lambda: _claim_workdir(run, config))
        if not (run.workdir / "config.json").exists():
            raise UserError(
                f"{run.workdir}: process 0 wrote config.json there, and this one does not see it; "
                "all processes need one workdir on storage that they share"
            )
    return run


def _check_latents(experiment):
    """Raises UserError unless the latents are those of config.latent_model, and have what the network is told."""
    data, model = experiment.data, experiment.model
    if not data.name.startswith(latents.PREFIX):
        return
    folder = data.name.removeprefix(latents.PREFIX)
    about, ours = latents.read_about(folder), frozen_hash(experiment.latent_model)
    if about.model_hash != ours:
        raise UserError(
            f"config.data.name: {folder} was encoded by another model than config.latent_model, "
            f"{experiment.latent_model}; name that one, or encode again"
        )
    width = getattr(model, "context_dim", None)
    if about.text is not None and width != about.text[1]:
        raise UserError(f"config.model.context_dim is {width}; captions of {folder} are {about.text[1]} wide")
    if getattr(model, "extra_channels", 0) and not about.inpainting:
        raise UserError(f"config.model paints in, and {folder} was encoded without masks; encode it with this config")


def _check_evaluation(config):
    """Raises UserError now for what only the evaluation reads, days later."""
    if config.captions is not None:
        _read_lines(config.captions)
    if config.clip is not None and not (absolute(config.clip) / "config.json").exists():
        raise UserError(f"config.evaluate.clip: {config.clip} holds no config.json; name a CLIP model's folder")
    for network in set(config.features) & feature_weights.SOURCES.keys():
        feature_weights.load_weights(network)


def _check_network(experiment):
    try:
        shapes_of(functools.partial(initial_params, experiment, True))
    except (TypeError, ValueError, ZeroDivisionError) as error:
        shape = "x".join(map(str, experiment.data.sample_shape))
        reason = str(error).strip().splitlines()[0][:160]
        raise UserError(f"config.model does not make a network for {shape} samples: {reason}") from error


def _check_given(config, name, path, create):
    """Raises UserError unless the stage at `path` has finished and was made with the same network and schedule."""
    key = f"config.{name}.checkpoint"
    if not absolute(path).exists():
        raise UserError(f"{key}: {path}: no such checkpoint; give a workdir, a stage directory of one, a folder that "
                        "--mode=import wrote, or a file of diffusion_distillation")  # fmt: skip
    if latent_folder.is_latent(path):
        _check_imported(config, name, path)
        return
    if salimans_ho.is_checkpoint(path):
        if create:
            _check_salimans_ho(config, name, path)
        return
    stage_dir = find_stage(path, name)
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
        if name == "stage1" and _clips_students(theirs) and not _clips_students(config):
            raise UserError(
                f"{key}: {stage_dir} was trained to be clipped to the data's range; set config.clip_targets=True, and "
                'leave "encode" out of config.stage2.series'
            )


def _check_imported(config, name, path):
    """The same of a folder that --mode=import wrote: its U-Net is the config's, a student's one that takes w."""
    key, theirs = f"config.{name}.checkpoint", latent_folder.read_model(path)
    experiment = from_config(config)
    if experiment.backbone != "sd_unet":
        raise UserError(f"{key}: {path} is a latent model; config.model.name is {experiment.backbone!r}, not 'sd_unet'")
    ours = make_module(experiment, name == "stage1", experiment.parameterisation).config
    free = {"dtype", "remat", "remat_policy", "w_conditioned", *(() if theirs.unet.w_conditioned else ("w_channels",))}
    lines = [
        f"{field.name}: {getattr(theirs.unet, field.name)} -> {getattr(ours, field.name)}"
        for field in dataclasses.fields(ours)
        if field.name not in free and getattr(theirs.unet, field.name) != getattr(ours, field.name)
    ]
    if lines:
        raise UserError(f"{key}: {path} is another network than config.model ({'; '.join(lines)})")
    if theirs.unet.w_conditioned != (name == "stage1"):
        takes = "takes w" if theirs.unet.w_conditioned else "takes no w"
        raise UserError(f"{key}: the network of {path} {takes}: name it as config."
                        f"{'stage1' if theirs.unet.w_conditioned else 'teacher'}.checkpoint")  # fmt: skip
    predicts = "v" if name == "stage1" and experiment.to_v.updates else experiment.parameterisation
    if theirs.parameterisation != predicts:
        raise UserError(
            f"{key}: {path} predicts {theirs.parameterisation}, and the config says {predicts} (config.parameterisation"
            ", and config.to_v.updates, 0 where stage one is given)"
        )


def _check_salimans_ho(config, name, path):
    """The same of a file: a checkpoint of diffusion_distillation, whose networks take no w."""
    key, experiment = f"config.{name}.checkpoint", from_config(config)
    if name != "teacher" or experiment.backbone != "unet":
        raise UserError(f"{key}: {path} is a file; one of diffusion_distillation can be config.teacher.checkpoint, of "
                        "a config whose config.model.name is 'unet'")  # fmt: skip
    if experiment.schedule != diffusion.Cosine() or experiment.model.norm_groups != 32:
        raise UserError(f"{key}: what trained {path} knows the cosine schedule with log-SNR in [-20, 20] alone "
                        "(config.schedule), and norms of 32 groups (config.model.norm_groups)")  # fmt: skip
    if experiment.stage1.w_max > 0:
        raise UserError(f"{key}: {path} was trained without label dropout, so that there is nothing to be guided with: "
                        "set config.stage1.w_max=0")  # fmt: skip
    num_steps, first = _read_salimans_ho(experiment, path)[1], experiment.stage2.teacher_steps
    if num_steps and num_steps != first:
        raise UserError(f"{key}: {path} is a student of {num_steps} steps; set config.stage2.teacher_steps={num_steps}")


def _read_salimans_ho(experiment, path):
    module = make_module(experiment, False, experiment.parameterisation)
    return salimans_ho.read_checkpoint(
        path, module.config, shapes_of(functools.partial(initial_params, experiment, False))
    )


def _what_it_is(config, name):
    """The part of a config that says which model a stage leaves: what would read its weights wrongly if it differed."""
    keys = ["model", "schedule", "parameterisation"]
    found = {key: config.get(key) for key in keys}
    if name == "stage1":
        found["stage1"] = {key: config["stage1"][key] for key in ("w_min", "w_max")}
        found["to_v"] = bool(config.get("to_v", {}).get("updates"))
    return found


def _clips_students(config):
    """Whether `stages.bound` is a number there."""
    return bool(config.get("clip_targets")) and "encode" not in config["stage2"]["series"]


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
