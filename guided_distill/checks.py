"""What fits its type in a config and makes no sense: each gets one line that names the key and what would be right."""

import itertools

from guided_distill import diffusion, latents
from guided_distill.errors import UserError
from guided_distill.evaluation.features import NETWORKS
from guided_distill.models.clip import ACTIVATIONS
from guided_distill.models.remat import POLICIES
from guided_distill.samplers import BASELINES

SERIES = ("det", "sto", "encode", "two", "tract", "consistency")
_SELF_TAUGHT = ("tract", "consistency")
FEATURES = ("classifier", *NETWORKS)
_PLANS = ("fixed", "auto")
_TEACHER_DTYPES = ("float32", "bfloat16")


def check(experiment):
    """Raises UserError for values that fit their type and make no sense."""
    for key, value, choices in (
        ("parameterisation", experiment.parameterisation, diffusion.PARAMETERISATIONS),
        ("weighting", experiment.weighting, diffusion.WEIGHTINGS),
        ("teacher_dtype", experiment.teacher_dtype, _TEACHER_DTYPES),
        ("model.remat_policy", getattr(experiment.model, "remat_policy", "nothing"), POLICIES),
    ):
        if value not in choices:
            raise UserError(f"config.{key} is {value!r}; it must be one of {', '.join(choices)}")
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
        if len({f"{w:g}" for w in strengths}) < len(strengths):  # directories are named by them
            raise UserError(f"config.{key} is {strengths}; name each w once, in six digits")
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
    weightings = (*diffusion.WEIGHTINGS, "landing")
    if stage2.weighting is not None and stage2.weighting not in weightings:
        raise UserError(f"config.stage2.weighting is {stage2.weighting!r}; it must be one of {', '.join(weightings)}")
    if stage2.weighting == "landing" and (other := [series for series in stage2.series if series != "det"]):
        raise UserError(
            f"config.stage2.weighting is 'landing', for the series 'det' alone; {other[0]!r} is trained too"
        )
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
    for name in ("num_steps", "features", "baselines"):
        if len(set(values := getattr(experiment.evaluate, name))) < len(values):
            raise UserError(f"config.evaluate.{name} is {values}; name each once")


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
    if data.name.startswith(latents.PREFIX) and experiment.latent_model is None:
        raise UserError("config.latent_model is missing: the folder of --mode=import whose latents the data are")
    for key in ("captions", "clip"):
        if getattr(experiment.evaluate, key) is not None and not data.text_length:
            raise UserError(f"config.evaluate.{key} is for models of captions; this one is of classes")
    if experiment.evaluate.captions is not None and getattr(model, "extra_channels", 0):
        raise UserError("config.evaluate.captions says what to draw and not where; a network that paints in needs both")
    if not hasattr(model, "context_dim"):
        if data.text_length and data.name.startswith(latents.PREFIX):
            raise UserError("config.model: latents bring their captions embedded, which sd_unet alone takes")
        return
    if isinstance(experiment.schedule, diffusion.DiscreteBetas):
        schedule = experiment.schedule
        ours = (schedule.beta_start, schedule.beta_end), schedule.num_betas, schedule.zero_terminal_snr
        theirs = model.betas, model.num_betas, model.zero_terminal_snr
        if ours != theirs:
            raise UserError(
                f"config.model.betas, num_betas and zero_terminal_snr are {theirs}, and config.schedule has {ours}: "
                "the network tells time by them, so they must agree"
            )
        if schedule.zero_terminal_snr and experiment.parameterisation == "eps":
            raise UserError(
                "config.schedule.zero_terminal_snr is True, and config.parameterisation 'eps': from pure noise an "
                "eps says nothing of the image; predict v"
            )
    if model.extra_channels not in (0, 1 + data.sample_shape[-1]):
        raise UserError(
            f"config.model.extra_channels is {model.extra_channels}; a network that paints in takes a mask and a "
            f"latent besides, {1 + data.sample_shape[-1]} channels"
        )
