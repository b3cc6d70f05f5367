"""An experiment as typed, frozen values: what a config file says, checked key by key."""

import dataclasses
import itertools
import types
import typing
from collections.abc import Mapping

from guided_distill import diffusion, latents
from guided_distill.checkpoint import CheckpointConfig
from guided_distill.data import DataConfig
from guided_distill.errors import UserError
from guided_distill.evaluation.features import NETWORKS
from guided_distill.models import BACKBONES
from guided_distill.models.clip import ACTIVATIONS
from guided_distill.optim import OptimiserConfig
from guided_distill.samplers import BASELINES


@dataclasses.dataclass(frozen=True)
class Training:
    """Length, batch and optimiser of a stage."""

    updates: int
    batch_size: int
    learning_rate: float
    warmup: int = 0
    decay: str = "constant"
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema: float = 0.0
    accumulate: int = 1  # parts that a batch goes through the network in: the same update, with less memory

    @property
    def optimiser(self):
        """The optimiser's static part."""
        return OptimiserConfig(self.warmup, self.decay, self.weight_decay, self.clip_norm, self.ema)


@dataclasses.dataclass(frozen=True)
class TeacherConfig(Training):
    """The teacher: trained here, taken from `checkpoint` (a workdir or stage directory of an earlier run), or what the
    function `factory` ("package.module:function") returns.
    """

    checkpoint: str | None = None
    factory: str | None = None
    cond_dropout: float = 0.1
    num_times: int | None = None  # None: continuous time


@dataclasses.dataclass(frozen=True)
class Stage1Config(Training):
    """Stage one; w ~ U[w_min, w_max] here and in stage two. Trained here, or taken from `checkpoint` like a teacher.

    `w_margin`, a share of the range, is added at both ends of it and what is drawn there set back to the end.
    Each w of `single_w` gets a student of its own besides, without a w input.
    """

    checkpoint: str | None = None
    w_min: float = 0.0
    w_max: float = 4.0
    w_margin: float = 0.0
    single_w: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Stage2Config(Training):
    """Stage two: `teacher_steps` DDIM steps of the stage-one model are halved until one is left.

    `num_steps` names other rounds, as (8, 2, 1). Rounds whose student takes a number of steps listed in
    `final_num_steps` train for `final_updates`. `series` names what is trained: students of the deterministic ("det")
    and the stochastic sampler ("sto"), an encoder ("encode"), the two-student baseline ("two"), students by groups of
    steps ("tract"), and one student for all numbers of steps ("consistency"), trained for as long as that of one step;
    the last two are taught by their own moving average, of decay `self_ema`.
    """

    series: tuple[str, ...] = ("det",)
    teacher_steps: int = 1024
    num_steps: tuple[int, ...] = ()
    self_ema: float = 0.5
    final_num_steps: tuple[int, ...] = (1, 2, 4)
    final_updates: int = 100_000

    def updates_of(self, num_steps):
        """Updates of the round whose student takes `num_steps`."""
        return self.final_updates if num_steps in self.final_num_steps else self.updates

    def rounds(self):
        """The students' numbers of steps, in the order of training: teacher_steps / 2, ..., 2, 1 by default."""
        if self.num_steps:
            return list(self.num_steps)
        steps = [self.teacher_steps // 2]
        while steps[-1] > 1:
            steps.append(steps[-1] // 2)
        return steps

    def steps_of_students(self):
        """The numbers of steps, fewer than the first teacher's, that there is some student for."""
        if "consistency" in self.series:
            return [n for n in range(self.teacher_steps // 2, 0, -1) if self.teacher_steps % n == 0]
        return self.rounds()


@dataclasses.dataclass(frozen=True)
class RoundsConfig:
    """Updates and learning rate of the rounds of stage two: the config's own ("fixed"), or planned ("auto").

    "auto" spends what "fixed" would, its own cost included: shares of the updates go by the gap each round opens with,
    and of `probe_rates` times the learning rate the best after `probe_updates` is taken. With `gate_every` a round ends
    when its gap, looked at that often, fell by less than the share `gate_least_fall`. Where more than the share
    `gate_most_left` of the gap is left at the end, the run stops. A gap is the loss over `gap_samples` examples.
    """

    plan: str = "fixed"
    probe_updates: int = 20
    probe_rates: tuple[float, ...] = (0.5, 1.0, 2.0)
    gate_every: int = 0
    gate_least_fall: float = 0.02
    gate_most_left: float | None = None
    gap_samples: int = 512


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """The surface that is measured: the models at each of `num_steps`, the reference teacher, over `w`.

    `baselines` are further samplers of the teacher, besides the deterministic one. `features` are the networks that
    measure: "classifier", trained on the data set itself, "efficientnet_lite0" and "inception_v3". `reference` is an
    npz of --mode=reference, ADM or EDM to compare with; None: the statistics of the training split. `captions` is a
    text file of captions, one a line, to draw in place of those held out, `clip` a CLIP model's folder as transformers
    writes it, which the CLIP score is taken with.
    """

    num_samples: int
    batch_size: int
    w: tuple[float, ...]
    num_steps: tuple[int, ...]
    classifier_updates: int
    baselines: tuple[str, ...] = ()
    features: tuple[str, ...] = ("classifier",)
    reference: str | None = None
    captions: str | None = None
    clip: str | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Over how many devices every large weight, its moments and its average are split; the batch is over all."""

    fsdp: int = 1


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Updates between lines of metrics, and between grids of samples (0: none)."""

    every: int = 50
    sample_every: int = 0


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything a run is made of; what `differences.py` calls free leaves the trained weights alone."""

    seed: int
    data: DataConfig
    backbone: str
    model: typing.Any  # the backbone's own config
    schedule: typing.Any
    parameterisation: str
    weighting: str
    teacher: TeacherConfig
    stage1: Stage1Config
    stage2: Stage2Config
    evaluate: EvaluateConfig
    log: LogConfig
    checkpoint: CheckpointConfig
    to_v: Training = Training(updates=0, batch_size=0, learning_rate=0.0)  # no updates: there is no such stage
    rounds: RoundsConfig = RoundsConfig()
    mesh: MeshConfig = MeshConfig()
    teacher_dtype: str = "float32"  # or "bfloat16", of the weights that are learned from, while they are learned from
    latent_model: str | None = None  # a folder of --mode=import, whose autoencoder the data are latents of
    clip_targets: bool = False  # whether students learn x_hat as the teacher's sampler clips it, or as it is

    def given(self, stage_name):
        """What the config names in place of training the stage of that name; None where it is trained."""
        teacher = self.teacher.checkpoint or self.teacher.factory
        return {"teacher": teacher, "stage1": self.stage1.checkpoint}.get(stage_name)

    @property
    def batch_sizes(self):
        """{group of the config: batch size} of all stages there are, and of the evaluation."""
        groups = ["teacher", *["to_v"] * bool(self.to_v.updates), "stage1", "stage2", "evaluate"]
        return {name: getattr(self, name).batch_size for name in groups}


SERIES = ("det", "sto", "encode", "two", "tract", "consistency")
_SELF_TAUGHT = ("tract", "consistency")
FEATURES = ("classifier", *NETWORKS)
_PLANS = ("fixed", "auto")
_TEACHER_DTYPES = ("float32", "bfloat16")


def from_config(config):
    """An Experiment from nested mappings. Raises UserError that names the key, its value and what would be right."""
    config = dict(config)
    backbone = _choice(config, "model", BACKBONES)
    config["model"] = _build(BACKBONES[backbone][1], config["model"], "config.model", leave_out=("name",))
    schedule = _choice(config, "schedule", diffusion.SCHEDULES)
    schedule_class = diffusion.SCHEDULES[schedule]
    config["schedule"] = _build(schedule_class, config["schedule"], "config.schedule", leave_out=("name",))
    experiment = _build(Experiment, {**config, "backbone": backbone}, "config")
    _check(experiment)
    return experiment


def _choice(config, key, choices):
    name = config.get(key, {}).get("name")
    if name not in choices:
        raise UserError(f"config.{key}.name is {name!r}; it must be one of {', '.join(choices)}")
    return name


def _build(cls, values, path, leave_out=()):
    """A dataclass from a mapping, nested ones included, with every value of the annotated type."""
    if not isinstance(values, Mapping):
        raise UserError(f"{path} is {values!r}; it must be a group of keys")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {key: value for key, value in values.items() if key not in leave_out}
    for key in values.keys() - fields.keys():
        raise UserError(f"{path}.{key}: no such key; there are {', '.join(sorted(fields))}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise UserError(f"{path}.{name} is missing")
    return cls(**{key: _convert(hints[key], value, f"{path}.{key}") for key, value in values.items()})


def _convert(hint, value, path):
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is typing.Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(arguments[0], value, path)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{path} is {value!r}; it must be a list")
        return tuple(_convert(arguments[0], item, path) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{path} is {value!r}; it must be of type {hint.__name__}")
    return value


def _check(experiment):
    """Raises UserError for values that fit their type and make no sense."""
    for key, choices in (
        ("parameterisation", diffusion.PARAMETERISATIONS),
        ("weighting", diffusion.WEIGHTINGS),
        ("teacher_dtype", _TEACHER_DTYPES),
    ):
        if getattr(experiment, key) not in choices:
            raise UserError(f"config.{key} is {getattr(experiment, key)!r}; it must be one of {', '.join(choices)}")
    _check_at_least(experiment)
    _check_rounds(experiment.stage2)
    _check_plan(experiment.rounds, experiment.stage2.series)
    if experiment.clip_targets and experiment.data.data_range is None:
        raise UserError("config.clip_targets is True, but config.data.data_range names no range to clip to")
    stage1 = experiment.stage1
    if not 0.0 <= stage1.w_min <= stage1.w_max:
        raise UserError(f"config.stage1: w_min {stage1.w_min} and w_max {stage1.w_max} must be 0 <= w_min <= w_max")
    if stage1.w_margin < 0.0:
        raise UserError(f"config.stage1.w_margin is {stage1.w_margin}; it must be at least 0")
    for key, strengths in (("evaluate.w", experiment.evaluate.w), ("stage1.single_w", stage1.single_w)):
        for w in strengths:
            if not stage1.w_min <= w <= stage1.w_max:
                raise UserError(f"config.{key} holds {w}, outside the trained range [{stage1.w_min}, {stage1.w_max}]")
    for num_steps in experiment.evaluate.num_steps:
        if num_steps not in experiment.stage2.steps_of_students():
            trained = ", ".join(map(str, experiment.stage2.steps_of_students()))
            raise UserError(f"config.evaluate.num_steps holds {num_steps}; students are trained for {trained}")
    for name in experiment.evaluate.baselines:
        if name not in BASELINES:
            raise UserError(f"config.evaluate.baselines holds {name!r}; there are {', '.join(BASELINES)}")
    for name in experiment.evaluate.features:
        if name not in FEATURES:
            raise UserError(f"config.evaluate.features holds {name!r}; there are {', '.join(FEATURES)}")
    if experiment.teacher.checkpoint and experiment.teacher.factory:
        raise UserError("config.teacher: checkpoint and factory both name a teacher; one is needed")
    if stage1.checkpoint and not (experiment.teacher.checkpoint or experiment.teacher.factory):
        raise UserError("config.stage1.checkpoint is given without its teacher: give config.teacher.checkpoint too")
    if experiment.to_v.updates and experiment.teacher.factory:
        raise UserError(
            "config.to_v trains a teacher of this config; a teacher of a factory says what it predicts itself"
        )
    if len({f"{w:g}" for w in stage1.single_w}) < len(stage1.single_w):
        raise UserError(f"config.stage1.single_w is {stage1.single_w}; name each w once, in six digits")
    if "encode" in experiment.stage2.series:
        _check_encoder(experiment)
    if experiment.data.flip and experiment.data.shape and not experiment.data.name.startswith(latents.PREFIX):
        raise UserError("config.data.flip is True; only images are flipped, and config.data.shape says these are none")


def _check_encoder(experiment):
    if experiment.stage1.w_min != 0.0:
        raise UserError(
            f"config.stage2.series holds 'encode', which is trained at w = 0; config.stage1.w_min is "
            f"{experiment.stage1.w_min}"
        )
    if experiment.parameterisation == "x" and not experiment.to_v.updates:
        raise UserError(
            "config.stage2.series holds 'encode', which divides an x prediction by sigma = 5e-5; "
            "predict v (config.parameterisation, or a stage config.to_v)"
        )


def _check_rounds(stage2):
    teacher_steps = stage2.teacher_steps
    if teacher_steps < 2 or teacher_steps & (teacher_steps - 1):
        raise UserError(f"config.stage2.teacher_steps is {teacher_steps}; it must be a power of 2, at least 2")
    if not stage2.series:
        raise UserError("config.stage2.series is empty; name at least one of " + ", ".join(SERIES))
    for series in stage2.series:
        if series not in SERIES:
            raise UserError(f"config.stage2.series holds {series!r}; there are {', '.join(SERIES)}")
    if len(set(stage2.series)) < len(stage2.series):
        raise UserError(f"config.stage2.series is {stage2.series}; name each once")
    if not 0.0 < stage2.self_ema < 1.0:
        raise UserError(f"config.stage2.self_ema is {stage2.self_ema}; it must be between 0 and 1")
    path = [teacher_steps, *stage2.rounds()]
    for before, after in itertools.pairwise(path):
        if after < 1 or before <= after or before % after:
            raise UserError(
                f"config.stage2.num_steps: {before} -> {after} is no round; each number must divide the one before it, "
                f"from teacher_steps = {teacher_steps} on"
            )
        if before != 2 * after and (only := [s for s in stage2.series if s in ("sto", "encode", "two")]):
            raise UserError(f"config.stage2.num_steps: {before} -> {after}: series {only[0]!r} only halves")


def _check_plan(rounds, series):
    if rounds.plan not in _PLANS:
        raise UserError(f"config.rounds.plan is {rounds.plan!r}; it must be one of {', '.join(_PLANS)}")
    if not rounds.probe_rates or min(rounds.probe_rates) <= 0.0:
        raise UserError(f"config.rounds.probe_rates is {rounds.probe_rates}; name at least one, all above 0")
    if not 0.0 <= rounds.gate_least_fall < 1.0:
        raise UserError(f"config.rounds.gate_least_fall is {rounds.gate_least_fall}; it must be from 0 to below 1")
    if rounds.gate_most_left is not None and not rounds.gate_most_left > 0.0:
        raise UserError(f"config.rounds.gate_most_left is {rounds.gate_most_left}; it must be above 0")
    alone = [name for name in series if name in _SELF_TAUGHT]
    if alone and (rounds.plan == "auto" or rounds.gate_every or rounds.gate_most_left is not None):
        raise UserError(
            f"config.rounds has a plan or a gate, which go by the gap to the teacher; series {alone[0]!r} learns from "
            "its own average, so that its gap says little: give it config.stage2.updates"
        )


def _check_at_least(experiment):
    least = {
        **{"to_v.updates": 0, "to_v.accumulate": 1, "mesh.fsdp": 1},
        **{f"{stage}.{key}": 1 for stage in ("teacher", "stage1", "stage2") for key in ("updates", "batch_size")},
        **{f"{stage}.accumulate": 1 for stage in ("teacher", "stage1", "stage2")},
        **{"rounds.probe_updates": 1, "rounds.gate_every": 0, "rounds.gap_samples": 1},
        **{"stage2.final_updates": 1, "log.every": 1, "log.sample_every": 0, "checkpoint.every": 1},
        **{"checkpoint.keep": 1, "evaluate.num_samples": 2, "evaluate.batch_size": 1},
        **{"evaluate.classifier_updates": 1, "data.image_size": 1, "data.channels": 1, "data.num_classes": 1},
        **{"data.holdout": 0, "data.text_length": 0, "data.vocabulary": 2},
    }
    for key, bound in least.items():
        group, name = key.split(".")
        value = getattr(getattr(experiment, group), name)
        if value < bound:
            raise UserError(f"config.{key} is {value}; it must be at least {bound}")
    if experiment.teacher.num_times is not None and experiment.teacher.num_times < 1:
        raise UserError(f"config.teacher.num_times is {experiment.teacher.num_times}; it must be at least 1")
    _check_captions(experiment)
    _check_latents(experiment)
    for name in ("w", "num_steps", "features"):
        if not getattr(experiment.evaluate, name):
            raise UserError(f"config.evaluate.{name} is empty; name at least one value")


def _check_captions(experiment):
    data, text = experiment.data, getattr(experiment.model, "text", None)
    for key in ("holdout", "text_length"):
        if getattr(data, key) == 1:
            raise UserError(f"config.data.{key} is 1, which leaves nothing; it must be 0, for none, or at least 2")
    latent = hasattr(experiment.model, "context_dim")
    if data.text_length and not (latent or hasattr(experiment.model, "text")):
        raise UserError(
            f"config.data.text_length is {data.text_length}: of the networks only unet and sd_unet take captions"
        )
    if latent and data.text_length and "classifier" in experiment.evaluate.features:
        _refuse_classifier()
    if latent:
        return
    if bool(data.text_length) != (text is not None):
        raise UserError(
            f"config.data.text_length is {data.text_length}, and config.model.text "
            f"{'is missing' if text is None else 'is given'}: captions need both"
        )
    if text is None:
        return
    if "classifier" in experiment.evaluate.features:
        _refuse_classifier()
    if text.activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UserError(f"config.model.text.activation is {text.activation!r}; it must be one of {known}")
    if text.heads < 1 or text.width % text.heads:
        raise UserError(f"config.model.text: width {text.width} does not divide by heads {text.heads}")


def _refuse_classifier():
    raise UserError(
        "config.evaluate.features holds 'classifier', which tells labels apart; pictures of captions are measured "
        "by efficientnet_lite0 or inception_v3"
    )


def _check_latents(experiment):
    """Of a latent network: noise levels as the schedule has them, data without a range, captions for it to be told."""
    data, model = experiment.data, experiment.model
    if data.name.startswith(latents.PREFIX) and data.data_range is not None:
        raise UserError("config.data.data_range names a range, which latents have not; set it to None")
    if not hasattr(model, "context_dim"):
        if data.text_length and data.name.startswith(latents.PREFIX):
            raise UserError("config.model: latents bring their captions embedded, which sd_unet alone takes")
        return
    if isinstance(experiment.schedule, diffusion.DiscreteBetas):
        schedule = experiment.schedule
        ours = (schedule.beta_start, schedule.beta_end), schedule.num_betas
        if ours != (model.betas, model.num_betas):
            raise UserError(
                f"config.model.betas and num_betas are {model.betas}, {model.num_betas}, and config.schedule has "
                f"{ours[0]}, {ours[1]}: the network tells time by them, so they must agree"
            )
    if model.extra_channels not in (0, 1 + data.sample_shape[-1]):
        raise UserError(
            f"config.model.extra_channels is {model.extra_channels}; a network that paints in takes a mask and a "
            f"latent besides, {1 + data.sample_shape[-1]} channels"
        )
