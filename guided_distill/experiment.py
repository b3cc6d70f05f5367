"""An experiment as typed, frozen values: what a config file says, checked key by key."""

import dataclasses
import types
import typing
from collections.abc import Mapping

from guided_distill import diffusion
from guided_distill.checkpoint import CheckpointConfig
from guided_distill.checks import check
from guided_distill.data import DataConfig
from guided_distill.errors import UserError
from guided_distill.models import BACKBONES
from guided_distill.optim import OptimiserConfig


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
    """The teacher: trained here, taken from `checkpoint` (see README.md for what it may name), or what the
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
    the last two are taught by their own moving average, of decay `self_ema`. `weighting` is that of stage two, None:
    the experiment's; "landing" (series "det") measures x_hat against the noise that a step lands in.
    """

    series: tuple[str, ...] = ("det",)
    teacher_steps: int = 1024
    num_steps: tuple[int, ...] = ()
    self_ema: float = 0.5
    final_num_steps: tuple[int, ...] = (1, 2, 4)
    final_updates: int = 100_000
    weighting: str | None = None

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
    clip_targets: bool = False  # whether students learn x_hat as samplers clip it, see `stages.bound`

    def given(self, stage_name):
        """What the config names in place of training the stage of that name; None where it is trained."""
        teacher = self.teacher.checkpoint or self.teacher.factory
        return {"teacher": teacher, "stage1": self.stage1.checkpoint}.get(stage_name)

    @property
    def weighting_of_rounds(self):
        """That of stage two, which has its own where the config names one."""
        return self.stage2.weighting or self.weighting

    @property
    def batch_sizes(self):
        """{group of the config: batch size} of all stages there are, and of the evaluation."""
        groups = ["teacher", *["to_v"] * bool(self.to_v.updates), "stage1", "stage2", "evaluate"]
        return {name: getattr(self, name).batch_size for name in groups}


def from_config(config):
    """An Experiment from nested mappings. Raises UserError that names the key, its value and what would be right."""
    config = dict(config)
    backbone = _choice(config, "model", BACKBONES)
    config["model"] = _build(BACKBONES[backbone][1], config["model"], "config.model", leave_out=("name",))
    schedule = _choice(config, "schedule", diffusion.SCHEDULES)
    schedule_class = diffusion.SCHEDULES[schedule]
    config["schedule"] = _build(schedule_class, config["schedule"], "config.schedule", leave_out=("name",))
    experiment = _build(Experiment, {**config, "backbone": backbone}, "config")
    check(experiment)
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
