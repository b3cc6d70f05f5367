"""--mode=export: finished students of a workdir, written, loaded back, compared, and only then put in their place."""

import dataclasses
import importlib.util
import os
import pathlib
import shutil
import sys

import numpy as np

from guided_distill import pictures
from guided_distill.errors import UserError
from guided_distill.export import bundle, card, onnx, pipelines, stablehlo, verify
from guided_distill.export.student import Student
from guided_distill.files import read_json
from guided_distill.teachers import make_module
from guided_distill.workdir import open_run

FORMATS = ("bundle", "stablehlo", "onnx", "diffusers")
_BY_DEFAULT = (1, 2, 4, 8)
_FIGURES = ("sampler", "num_steps", "nfe", "w", "seconds_per_image", "metrics", "intervals", "num_samples",
            "feature_network", "reference")  # fmt: skip
_PATHS = (("data", "data_dir"), ("teacher", "checkpoint"), ("stage1", "checkpoint"), ("evaluate", "reference"),
          ("evaluate", "captions"), ("evaluate", "clip"))  # fmt: skip


def export(config, workdir, *, formats, stages, with_teacher, licence, out):
    """Writes students of a finished run to the directory `out` in each of `formats`, once all agree with the live ones.

    `stages` names them; None: those of 1, 2, 4 and 8 deterministic steps that there are. Raises UserError for unknown
    formats and stages, stages that are not finished, an `out` that holds files, and artefacts that deviate.
    """
    place = _check_out(out)
    for flag, names in (("formats", formats), ("stages", stages or ())):
        if len(set(names)) < len(names):
            raise UserError(f"--{flag}={','.join(names)}: each is named once")
    for form in formats:
        if form not in FORMATS:
            raise UserError(f"--formats={','.join(formats)}: there are {', '.join(FORMATS)}, not {form!r}")
    if "stablehlo" in formats and importlib.util.find_spec("flatbuffers") is None:
        raise UserError("--formats=stablehlo: jax writes it with flatbuffers; pip install 'guided_distill[export]'")
    this = open_run(config, workdir, create=False)
    if this.stages[0].model.cond_fields and tuple(formats) != ("diffusers",):
        raise UserError("students of captions leave as --formats=diffusers alone, where they are of latents; "
                        "--mode=sample draws from their run")  # fmt: skip
    if with_teacher and tuple(formats) == ("diffusers",):
        raise UserError("--with_teacher: its pipeline would be another; add bundle to --formats, or leave it out")
    students = _students(this, stages, with_teacher)
    if "diffusers" in formats:
        pipelines.check(this, _few_step(students))
    if "stablehlo" in formats:
        stablehlo.check(students)
    if "onnx" in formats:
        onnx.check(students)
    unfinished = place.parent / f".{place.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        verified = {form: _make(form, this, students, unfinished, config, licence) for form in formats}
        _write_card(this, students, unfinished, formats, verified, licence)
        if place.exists():
            place.rmdir()
        unfinished.rename(place)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    _say(f"{place}: {', '.join(formats)} of {', '.join(student.name for student in students)}; see README.md there")


def _check_out(out):
    if out is None:
        raise UserError("--out is missing: the directory to export to")
    if "://" in out:
        raise UserError(f"--out={out}: must be a directory of this machine, where the export is verified; copy it then")
    place = pathlib.Path(os.path.abspath(os.path.expanduser(out)))
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"--out={out}: there is something already; name a new directory, or delete it")
    return place


def _students(this, names, with_teacher):
    """The Students that leave, with their weights."""
    finished = {stage.name: stage for stage in this.stages if this.finished(stage)}
    if names is None:
        names = [f"stage2_det_{n:04d}" for n in _BY_DEFAULT]
        names = [name for name in names if name in finished]
        if not names:
            raise UserError(f"{this.workdir}: no student of 1, 2, 4 or 8 deterministic steps is finished; name others "
                            "by --stages, or train with --mode=run")  # fmt: skip
    summary = this.workdir / "summary.json"
    rows = read_json(summary)["rows"] if summary.exists() else []
    able = [name for name, stage in finished.items() if stage.sampler != "encode" and _is_student(stage)]
    for name in names:
        if name not in able:
            raise UserError(f"--stages={','.join(names)}: {name} is no finished student of {this.workdir}; there are "
                            f"{', '.join(able) or 'none yet'}")  # fmt: skip
    students = [_student(this, finished[name], name.removeprefix("stage2_"), rows) for name in names]
    if with_teacher:
        guided = this.stage("to_v" if this.experiment.to_v.updates else "teacher")
        students.append(_student(this, guided, "teacher", rows))
    return students


def _is_student(stage):
    return stage.name not in ("teacher", "to_v")


def _student(this, stage, name, rows):
    module = make_module(this.experiment, stage.model.w_conditioned, stage.model.parameterisation)
    ours = stage.model.model_fn is bundle.make_model_fn(module)
    return Student(
        name=name,
        series=stage.asked_for if stage.series else name,
        num_steps=None if stage.any_steps else stage.num_steps,
        sampler=stage.sampler,
        w_range=tuple(stage.w_range),
        model=dataclasses.replace(stage.model, params=this.params_of(stage)),
        network=bundle.network_of(this.experiment.backbone, module) if ours else None,
        figures=[{key: row[key] for key in _FIGURES if key in row} for row in rows if row["stage"] == stage.name],
    )


def _few_step(students):
    """Those a pipeline is for: a teacher is sampled in as many steps as one likes."""
    return [student for student in students if student.series != "teacher"]


def _make(form, this, students, directory, config, licence):
    """Writes one format, loads it back and returns {name: deviation}. Raises UserError where one is above its bound."""
    batch_size = this.experiment.evaluate.batch_size
    if form == "bundle":
        about = {"data": card.title(this.experiment.data.name), "licence": licence, "config": _without_paths(config)}
        bundle.write(directory, students, this.grid.num_intervals, batch_size, about)
        deviations = verify.bundle(directory, students, this.grid, batch_size)
    elif form == "diffusers":
        pipelines.write(directory, this, _few_step(students), _say)
        deviations = verify.pipelines(directory, _few_step(students), this.grid)
    elif form == "onnx":
        onnx.write(directory, students, this.grid)
        deviations = verify.onnxs(directory, students, this.grid)
    else:
        stablehlo.write(directory, students, this.grid)
        deviations = verify.stablehlos(directory, students, this.grid)
    for name, deviation in deviations.items():
        (student,) = (s for s in students if name in (s.name, f"{s.name}_sampler", f"{s.name}_denoiser"))
        limit = verify.bound(form, student)
        _say(f"{form}: {name} deviates from the live one by {deviation:.1e} (at most {limit:g})")
        if not deviation <= limit:
            raise UserError(f"--mode=export: {form} of {name}, loaded in a fresh process, deviates by {deviation:.2e} "
                            f"from the live one; at most {limit:g} is right, so nothing was exported")  # fmt: skip
    return deviations


def _without_paths(config):
    """A config without what it says of the machine it ran on."""
    config = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
    config["latent_model"] = None
    config["data"]["name"] = card.title(config["data"]["name"])
    for group, key in _PATHS:
        if key in config.get(group, {}):
            config[group][key] = None
    return config


def _write_card(this, students, directory, formats, verified, licence):
    num = min(10, this.stages[0].model.num_labels(this.conditions))
    rows = []
    for student in students:
        steps, w = student.num_steps or min(this.grid.num_intervals, 32), np.clip(1.0, *student.w_range)
        x = student.sample(this.grid, this.mesh, num_steps=steps, w=w, labels=np.arange(num), num=num, seed=0,
                           batch_size=this.experiment.evaluate.batch_size, conditions=this.conditions)  # fmt: skip
        rows.append((f"{student.name}, {steps} step{'s' * (steps != 1)}, w = {w:g}", this.shown(x)))
    groups = [("the same noise in each column", rows)]
    pictures.save_png(directory / "samples.png", pictures.comparison(groups, card.title(this.experiment.data.name)))
    text = card.make_card(this.experiment, students, formats, verified, licence)
    (directory / "README.md").write_text(text)


def _say(text):
    print(text, file=sys.stderr, flush=True)
