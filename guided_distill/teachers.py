"""Networks as Teachers: an experiment's own, that of an earlier run, and one a user's function returns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from guided_distill import costs, guidance, sharding
from guided_distill.checkpoint import find_stage, load_eval_params
from guided_distill.diffusion import PARAMETERISATIONS
from guided_distill.errors import UserError
from guided_distill.experiment import from_config
from guided_distill.factories import call_factory
from guided_distill.files import read_json
from guided_distill.models import BACKBONES, make_model_fn
from guided_distill.state import check_same_model, student_params
from guided_distill.text import end_of_text


@functools.cache
def make_module(experiment, w_conditioned, parameterisation):
    """The experiment's network as a Linen module."""
    module, _ = BACKBONES[experiment.backbone]
    both = 2 if parameterisation == "both" else 1
    data, text = experiment.data, {}
    if getattr(experiment.model, "text", None) is not None:
        known = {"vocabulary": data.vocabulary, "positions": data.text_length}
        text = {"text": dataclasses.replace(experiment.model.text, **known)}
    config = dataclasses.replace(
        experiment.model,
        num_classes=0 if data.text_length else data.num_classes,  # a caption says more than a label
        out_channels=both * data.sample_shape[-1],
        w_conditioned=w_conditioned,
        **text,
    )
    return module(config)


@functools.cache
def make_model(experiment, *, w_conditioned, parameterisation=None, guided=True):
    """The experiment's network as a Teacher without weights: a teacher's, or with a w input the students'.

    `parameterisation` is the experiment's where None; `guided=False` makes a network of one fixed w, with neither.
    """
    parameterisation = parameterisation or experiment.parameterisation
    return guidance.Teacher(
        model_fn=make_model_fn(make_module(experiment, w_conditioned, parameterisation)),
        params=None,
        schedule=experiment.schedule,
        parameterisation=parameterisation,
        null_cond=_null_cond(experiment) if guided else None,
        num_classes=experiment.data.num_classes,
        sample_shape=experiment.data.sample_shape,
        cond_fields=_cond_fields(experiment),
        data_range=experiment.data.data_range,
        w_conditioned=w_conditioned,
    )


def _null_cond(experiment):
    data = experiment.data
    if any(name == "text" for name, *_ in _cond_fields(experiment)):
        return guidance.null_text
    if data.text_length:
        return guidance.null_caption(data.num_classes, end_of_text(data.vocabulary))
    return guidance.null_label(data.num_classes)


def _cond_fields(experiment):
    """What the network is told besides a label: tokens of a caption, or that embedded; a hole and what is around it."""
    data, model = experiment.data, experiment.model
    if not hasattr(model, "extra_channels"):  # no network of latents
        return (("tokens", (data.text_length,), "int32"),) if data.text_length else ()
    fields = ()
    if data.text_length:
        shape = (data.text_length, model.context_dim)
        fields = (("text", shape, "float32"), ("null_text", shape, "float32"))
    if model.extra_channels:
        side = data.sample_shape[:-1]
        fields += (("mask", (*side, 1), "float32"), ("masked", data.sample_shape, "float32"))
    return fields


def initial_params(experiment, w_conditioned, key, mesh=None, parameterisation=None):
    """Fresh parameters of the experiment's network, float32; made where they lie on a mesh, if there is one."""
    module = make_module(experiment, w_conditioned, parameterisation or experiment.parameterisation)
    z = jnp.zeros((1, *experiment.data.sample_shape))
    one = jnp.zeros(1)
    arguments = key, z, one, one.astype(jnp.int32), one
    rest = {name: jnp.zeros((1, *shape), dtype) for name, shape, dtype in _cond_fields(experiment)}
    rest.pop("null_text", None)
    init = functools.partial(module.init, **rest)
    out_shardings = None if mesh is None else sharding.shardings_of(mesh, jax.eval_shape(init, *arguments))
    return jax.jit(init, out_shardings=out_shardings)(*arguments)["params"]


def shapes_of(init):
    """The tree of parameters that `init` makes of a key, as ShapeDtypeStructs: nothing is computed."""
    return jax.eval_shape(init, jax.random.key(0))


@functools.cache  # the rounds of a chain share their network, and a large one takes seconds to trace
def flops_of_a_call(model, init):
    """Operations of one forward pass of one example through a network, counted from shapes (costs.py).

    `model` is a `Teacher.static()`, `init` makes its weights of a key; members of an ensemble count one by one.
    """
    row = jax.ShapeDtypeStruct((1,), jnp.float32)
    z = jax.ShapeDtypeStruct((1, *model.sample_shape), jnp.float32)
    with sharding.imagined("cpu"):
        return costs.cost_of(model.model_fn, shapes_of(init), z, row, model.cond_shapes(1)).flops / model.members


def load_teacher(path):
    """The teacher of an earlier run as a Teacher with its weights, to be combined (`guidance.ensemble`, ...) or used.

    `path` is a workdir. Its students start from the teacher's weights. Raises UserError where there is no such run.
    """
    stage_dir = find_stage(path)
    config = stage_dir.parent / "config.json"
    if not config.exists():
        raise UserError(f"{path}: holds no config.json; give the workdir of an earlier run")
    experiment = from_config(read_json(config))
    params = load_eval_params(stage_dir, functools.partial(sharding.by_size, sharding.make_mesh()))
    init = functools.partial(initial_params, experiment, False)
    check_same_model(params, shapes_of(init), stage_dir)

    def start(key):
        return student_params(params, initial_params(experiment, True, key))

    student = make_model(experiment, w_conditioned=True)
    return dataclasses.replace(
        make_model(experiment, w_conditioned=False), params=params, student=(student.model_fn, start)
    )


def outside_teacher(name, experiment):
    """The Teacher that the function `name` ("package.module:function") returns, fit for this experiment's data.

    Raises UserError for what it lacks.
    """
    teacher, key = call_factory(name, "config.teacher.factory"), "config.teacher.factory"
    if not isinstance(teacher, guidance.Teacher):
        raise UserError(f"{key}: {name!r} returned a {type(teacher).__name__}; a guidance.Teacher is needed")
    for what, theirs, ours in (
        ("sample_shape", teacher.sample_shape, experiment.data.sample_shape),
        ("num_classes", teacher.num_classes, experiment.data.num_classes),
        ("cond_fields", teacher.cond_fields, _cond_fields(experiment)),
    ):
        if theirs != ours:
            raise UserError(f"{key}: the teacher of {name!r} has {what} {theirs}, the config's data {ours}")
    if teacher.params is None or (teacher.null_cond is None and teacher.guided is None):
        raise UserError(f"{key}: the teacher of {name!r} needs params, and null_cond or guided to be guided with")
    if teacher.parameterisation not in PARAMETERISATIONS:
        known = ", ".join(PARAMETERISATIONS)
        raise UserError(f"{key}: {name!r} has parameterisation {teacher.parameterisation!r}; it must be one of {known}")
    return teacher
