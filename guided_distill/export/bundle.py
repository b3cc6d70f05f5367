"""A bundle: bundle.json, which says what the networks are, and their weights as students/<name>.safetensors.

Every later version of this package reads every earlier version of the format. Nothing in a bundle is executed.
"""

import dataclasses
import hashlib
import pathlib
import re
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

import guided_distill
from guided_distill import diffusion, guidance, samplers, sharding
from guided_distill.errors import UserError
from guided_distill.export.student import Student
from guided_distill.files import read_json, write_json, write_whole
from guided_distill.models import BACKBONES, make_model_fn

VERSION = 1
_FORMAT = "guided_distill bundle"
_DESCRIBED = ("name", "series", "num_steps", "sampler", "w_range", "network")  # of a Student, as they are


@dataclasses.dataclass(frozen=True)
class Bundle:
    """Students of one data set on this process's devices."""

    students: list[Student]
    grid: diffusion.Grid
    mesh: Any
    batch_size: int  # that sampling goes by
    about: dict  # bundle.json

    def sample(self, *, num_steps=None, w=1.0, labels=None, num=None, seed=0, series=None):
        """Images x f32 [num, *S] of the student for `num_steps`, those that --mode=sample makes of the seed.

        They agree to the bit on as many devices and CPU cores: XLA sums in another order on others.
        `num` is one for each label by default; `labels` are repeated over the images, None draws them. `series` is that
        of the first student with these steps by default; "teacher" is the teacher, where the bundle has it. Raises
        UserError for steps, series, w and labels that the bundle has no student for.
        """
        num = num if num is not None else 1 if labels is None else np.size(labels)
        if num < 1 or (labels is not None and not np.size(labels)):
            raise UserError(f"num = {num}: at least one image and, where they are given, one label are needed")
        return self.student(num_steps, series).sample(
            self.grid,
            self.mesh,
            num_steps=num_steps,
            w=w,
            labels=labels,
            num=num,
            seed=seed,
            batch_size=self.batch_size,
        )

    def student(self, num_steps=None, series=None):
        """The first Student of these steps and series; None is any. Raises UserError where there is none."""
        series = series or self.students[0].series
        for student in self.students:
            if student.series == series and num_steps in (None, student.num_steps):
                return student
            if student.series == series and student.num_steps is None:
                return student
        there = ", ".join(f"{s.num_steps or 'any divisor'} ({s.series})" for s in self.students)
        raise UserError(f"num_steps = {num_steps}, series = {series}: there is no such student; there are {there}")


def network_of(name, module):
    """Name and configuration of a backbone, as a bundle states them."""
    return {"name": name, **dataclasses.asdict(module.config)}


def write(directory, students, num_intervals, batch_size, about):
    """Writes bundle.json and the weights into a directory; `about` is further content of bundle.json.

    Raises UserError for a network or schedule that is a user's own function.
    """
    directory = pathlib.Path(directory)
    (directory / "students").mkdir(parents=True)
    described = [_write_student(directory, student) for student in students]
    model = students[0].model
    content = {
        "format": _FORMAT,
        "version": VERSION,
        "made_with": {"guided_distill": guided_distill.__version__, "jax": jax.__version__},
        "sample_shape": model.sample_shape,
        "num_classes": model.num_classes,
        "data_range": model.data_range,
        "schedule": _describe_schedule(model.schedule),
        "num_intervals": num_intervals,
        "batch_size": batch_size,
        "students": described,
        **about,
    }
    write_json(directory / "bundle.json", content)


def _write_student(directory, student):
    model = student.model
    if student.network is None or model.guided is not None:
        raise UserError(f"{student.name}: its network is a function of your own, which a bundle cannot hold; leave it "
                        "out, or export --formats=stablehlo alone")  # fmt: skip
    params = {path: np.asarray(value) for path, value in flatten_dict(jax.device_get(model.params), sep="/").items()}
    content = safetensors.numpy.save(params)
    file = f"students/{student.name}.safetensors"
    write_whole(directory / file, content)
    return {key: getattr(student, key) for key in _DESCRIBED} | {
        "parameterisation": model.parameterisation,
        "guidance": "classifier_free" if model.null_cond is not None and not model.w_conditioned else None,
        "calls_per_step": model.calls_per_step,
        "file": file,
        "sha256": hashlib.sha256(content).hexdigest(),
        "figures": student.figures,
    }


def _describe_schedule(schedule):
    for name, kind in diffusion.SCHEDULES.items():
        if type(schedule) is kind:
            return {"name": name, **dataclasses.asdict(schedule)}
    raise UserError(f"the schedule {type(schedule).__name__} is your own, which a bundle cannot hold; export "
                    "--formats=stablehlo alone")  # fmt: skip


def load(directory):
    """The Bundle in a directory. Raises UserError, naming the file, for what is missing, damaged, foreign or newer."""
    path = pathlib.Path(directory).expanduser() / "bundle.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a directory that --mode=export --formats=bundle wrote")
    about = read_json(path)
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise UserError(f"{path} is not a bundle of guided_distill")
    version = about.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise UserError(f"{path} has version {version!r}; this guided_distill reads up to {VERSION}: upgrade it")
    if not about.get("students"):
        raise UserError(f"{path} holds no students")
    mesh = sharding.make_mesh()
    try:
        schedule = _build(diffusion.SCHEDULES, about["schedule"])
        students = [_read_student(path.parent, about, schedule, one, mesh) for one in about["students"]]
        grid = sharding.place(mesh, diffusion.make_grid(schedule, about["num_intervals"]))
        return Bundle(students, grid, mesh, _positive(about["batch_size"]), about)
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        reason = (str(error).strip().splitlines() or [""])[0][:160]
        raise UserError(f"{path} is damaged, or not of this package ({type(error).__name__}: {reason})") from error


def _positive(number):
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"{number!r} must be a whole number of at least 1")
    return number


def _build(kinds, described):
    """A frozen configuration from its name and values."""
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in described.items()}
    return kinds[values.pop("name")](**values)


def _read_student(directory, about, schedule, one, mesh):
    module = BACKBONES[one["network"]["name"]][0](
        _build({name: config for name, (_, config) in BACKBONES.items()}, one["network"])
    )
    model = guidance.Teacher(
        model_fn=make_model_fn(module),
        params=None,
        schedule=schedule,
        parameterisation=one["parameterisation"],
        null_cond=guidance.null_label(about["num_classes"]) if one["guidance"] else None,
        num_classes=_positive(about["num_classes"]),
        sample_shape=tuple(map(_positive, about["sample_shape"])),
        data_range=about["data_range"],
        w_conditioned=module.config.w_conditioned,
    )
    if one["sampler"] not in samplers.SAMPLERS or one["parameterisation"] not in diffusion.PARAMETERISATIONS:
        raise ValueError(f"{one['name']} has the sampler {one['sampler']} of {one['parameterisation']}")
    if one["num_steps"] is not None and about["num_intervals"] % _positive(one["num_steps"]):
        raise ValueError(f"{one['num_steps']} steps do not divide {about['num_intervals']} intervals")
    params = sharding.place(mesh, _read_params(directory, one, model, module))
    low, high = one["w_range"]
    kept = {key: one[key] for key in ("name", "series", "num_steps", "sampler", "network", "figures")}
    return Student(w_range=(low, high), model=dataclasses.replace(model, params=params), **kept)


def _read_params(directory, one, model, module):
    if not re.fullmatch(r"students/\w[\w.+-]*\.safetensors", one["file"]):
        raise UserError(f"bundle.json names the file {one['file']!r}, which is not within students/")
    path = directory / one["file"]
    if not path.is_file():
        raise UserError(f"{path}: no such file, though bundle.json names it; copy the whole bundle again")
    content = path.read_bytes()
    try:
        params = safetensors.numpy.load(content)
    except (safetensors.SafetensorError, ValueError) as error:
        raise UserError(f"{path} is truncated or not safetensors ({error}); copy the whole bundle again") from error
    _check_params(path, params, model, module)
    if hashlib.sha256(content).hexdigest() != one["sha256"]:
        raise UserError(f"{path} is not the file that bundle.json was written with; copy the whole bundle again")
    return unflatten_dict(params, sep="/")


def _check_params(path, params, model, module):
    """Raises UserError, naming the first tensor, unless these are finite weights of the network."""
    z, one = np.zeros((1, *model.sample_shape), np.float32), np.zeros(1, np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), z, one, one.astype(np.int32), one)["params"]
    expected = flatten_dict(shapes, sep="/")
    for name in sorted(expected.keys() | params.keys()):
        if name not in params:
            raise UserError(f"{path} lacks {name}, which the network of bundle.json has")
        if name not in expected:
            raise UserError(f"{path} has {name}, which the network of bundle.json lacks")
        ours, theirs = expected[name], params[name]
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            raise UserError(f"{path}: {name} is {theirs.dtype}{list(theirs.shape)}; the network of bundle.json takes "
                            f"{ours.dtype}{list(ours.shape)}")  # fmt: skip
        if not np.isfinite(theirs).all():
            raise UserError(f"{path}: {name} holds values that are not finite")
