"""The stages as data: what is trained, from whose weights, against which teacher."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from guided_distill import guidance
from guided_distill.experiment import Experiment, Training
from guided_distill.objectives import (
    Knobs,
    make_consistency,
    make_denoise,
    make_encode,
    make_stage1,
    make_stage2,
    make_tract,
    make_two_student,
    within_range,
)
from guided_distill.teachers import initial_params, make_model


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training: the objective, whose output it learns, from which weights it starts, for how long."""

    name: str
    position: int  # in its chain
    objective: Callable | None  # None: a teacher that is given
    training: Training
    model: guidance.Teacher  # static: the network that is trained
    init: Callable  # (key, mesh=None) -> first weights of that network, on a mesh where there is one
    parent: str | None  # the stage whose weights teach it, and which it starts from unless `from_scratch`
    teacher: guidance.Teacher | None  # static: the parent's network
    teacher_calls: int  # evaluations per example besides the student's own, those of an average that teaches among them
    num_steps: int  # of the sampler this stage trains or, before stage two, is looked at with
    w_range: tuple[float, float]
    series: str = ""  # of stage two
    from_scratch: bool = False

    @property
    def sampler(self):
        """The sampler this stage is trained for, a key of samplers.SAMPLERS."""
        trained_for = {"sto": "stochastic", "encode": "encode", "consistency": "renoising"}
        return trained_for.get(self.series, "deterministic")

    @property
    def any_steps(self):
        """Whether one network serves every number of steps, rather than `num_steps` alone."""
        return self.series in ("", "consistency")

    def steps(self, num_intervals):
        """The numbers of steps that it is sampled in, on a grid of so many intervals."""
        divisors = [n for n in range(1, num_intervals + 1) if num_intervals % n == 0]
        return divisors if self.any_steps else [self.num_steps]

    @property
    def asked_for(self):
        """What --series calls a student of stage two: its series, and where it is of one w alone that too: det_w1."""
        name = self.name.removeprefix("stage2_")
        return name if self.any_steps else name.rpartition("_")[0]

    @property
    def work_per_update(self):
        """In forward passes of one image: three for each call of the student, and what the teacher is asked."""
        return self.training.batch_size * (3 * self.student_calls + self.teacher_calls)

    @property
    def student_calls(self):
        """Of its network, by which an example is learnt: a teacher is guided by two where it samples, not here."""
        return 2 if self.series == "two" else 1

    def directory(self, workdir):
        """`workdir/<nn>_<name>`."""
        return workdir / f"{self.position:02d}_{self.name}"


_WITHOUT_STAGE_ONE = {"two", "consistency"}  # series that the guided teacher teaches itself


def make_stages(experiment: Experiment, outside=None) -> list[Stage]:
    """teacher [-> to_v] -> stage1 -> for each series, its rounds stage2_<series>_<N>, N falling.

    Consistency distillation is one stage, stage2_consistency. Stage one is there where it teaches. `outside` is a
    Teacher given in place of the experiment's own.
    """
    stages = [_teacher(experiment, outside)]
    if experiment.to_v.updates:
        stages.append(_to_v(experiment, stages[0]))
    guided = stages[-1]
    stage1 = _stage1(experiment, guided, outside)
    if set(experiment.stage2.series) - _WITHOUT_STAGE_ONE:
        stages.append(stage1)
    for series in experiment.stage2.series:
        if series == "consistency":
            stages.append(_consistency(experiment, stage1))
        else:
            stages += _rounds(experiment, guided if series == "two" else stage1, series)
    for w in experiment.stage1.single_w:
        first = _single_w(experiment, guided, w)
        stages += [first, *_rounds(experiment, first, "det")]
    return stages


def _taught_by(experiment, model):
    """A network as the teacher of the next: with its output clipped, as when it is sampled, or as it is."""
    return guidance.clipped(model) if experiment.clip_targets else model


def bound(experiment, model):
    """Where the x_hat of `model` is clipped while it is trained as a student, as its samplers clip it; None: nowhere.

    Not where an encoder learns from stage one: it runs on eps_hat as it is, and so needs x_hat to meet its targets.
    """
    clips = experiment.clip_targets and "encode" not in experiment.stage2.series
    return model.data_range if clips else None


def _learns_guidance(experiment, model):
    objective = make_stage1(weighting=experiment.weighting, num_times=experiment.teacher.num_times)
    return within_range(objective, bound(experiment, model))


def _whole_range(experiment):
    return (experiment.stage1.w_min, experiment.stage1.w_max)


def _init(experiment, w_conditioned, parameterisation):
    return functools.partial(initial_params, experiment, w_conditioned, parameterisation=parameterisation)


def _teacher(experiment, outside):
    model = make_model(experiment, w_conditioned=False) if outside is None else outside.static()
    return Stage(
        name="teacher",
        position=0,
        objective=None if outside else _denoise(experiment, model),
        training=experiment.teacher,
        model=model,
        init=(lambda key, mesh=None: outside.params) if outside else _init(experiment, False, None),
        parent=None,
        teacher=None,
        teacher_calls=0,
        num_steps=experiment.stage2.teacher_steps,
        w_range=_whole_range(experiment),
    )


def _denoise(experiment, model):
    return make_denoise(
        weighting=experiment.weighting,
        null_cond=model.null_cond,
        cond_dropout=experiment.teacher.cond_dropout,
        num_times=experiment.teacher.num_times,
    )


def _to_v(experiment, teacher):
    """A short training that turns the teacher's output into v: students then never divide by alpha or sigma."""
    model = make_model(experiment, w_conditioned=False, parameterisation="v")
    return dataclasses.replace(
        teacher,
        name="to_v",
        position=1,
        objective=_denoise(experiment, model),
        training=experiment.to_v,
        model=model,
        init=_init(experiment, False, "v"),
        parent=teacher.name,
        teacher=teacher.model,
    )


def _stage1(experiment, guided, outside):
    parameterisation = guided.model.parameterisation if outside is None else None
    model = make_model(experiment, w_conditioned=True, parameterisation=parameterisation)
    init, from_scratch = _init(experiment, True, parameterisation), outside is not None
    if outside is not None and outside.student is not None:
        model_fn, start = outside.student
        init = lambda key, mesh=None: start(key)  # noqa: E731
        model = dataclasses.replace(
            outside.static(),
            model_fn=model_fn,
            w_conditioned=True,
            guided=None,
            guided_calls=None,
            members=1,
            student=None,
        )
    elif outside is not None:
        model = dataclasses.replace(model, schedule=outside.schedule, data_range=outside.data_range)
    return Stage(
        name="stage1",
        position=guided.position + 1,
        objective=_learns_guidance(experiment, model),
        training=experiment.stage1,
        model=model,
        init=init,
        parent=guided.name,
        teacher=_taught_by(experiment, guided.model),
        teacher_calls=guided.model.calls_per_step,
        num_steps=guided.num_steps,
        w_range=_whole_range(experiment),
        from_scratch=from_scratch,
    )


def _consistency(experiment, stage1):
    """One network for every number of steps, in the place of stage one: it too begins as the teacher, and is told w."""
    config = experiment.stage2
    return dataclasses.replace(
        stage1,
        name="stage2_consistency",
        objective=within_range(
            make_consistency(weighting=experiment.weighting_of_rounds, num_times=config.teacher_steps),
            bound(experiment, stage1.model),
        ),
        training=dataclasses.replace(config, updates=config.updates_of(1), ema=config.self_ema),
        teacher_calls=stage1.teacher_calls + 1,
        num_steps=1,
        series="consistency",
    )


def _single_w(experiment, guided, w):
    """Stage one for one strength alone: a network without a w input (arXiv 2210.03142, section 5.1)."""
    whole = _stage1(experiment, guided, None)
    parameterisation, theirs = guided.model.parameterisation, guided.model
    model = make_model(experiment, w_conditioned=False, parameterisation=parameterisation, guided=False)
    model = dataclasses.replace(model, schedule=theirs.schedule, data_range=theirs.data_range)
    return dataclasses.replace(
        whole,
        name=f"stage1_w{w:g}",
        objective=_learns_guidance(experiment, model),
        model=model,
        init=_init(experiment, False, parameterisation),
        w_range=(w, w),
        from_scratch=guided.objective is None,
    )


def _rounds(experiment, first, series):
    """The rounds of stage two from `first` on: each learns in one step what the one before does in several."""
    config, before, teacher_steps = experiment.stage2, first, experiment.stage2.teacher_steps
    single = first.name.removeprefix("stage1") if first.name.startswith("stage1_w") else ""
    stages = []
    for num_steps in config.rounds():
        substeps = teacher_steps // num_steps
        training = dataclasses.replace(config, updates=config.updates_of(num_steps))
        if series == "tract":
            training = dataclasses.replace(training, ema=config.self_ema)
        stages.append(
            dataclasses.replace(
                before,
                name=f"encode_{num_steps:04d}" if series == "encode" else f"stage2_{series}{single}_{num_steps:04d}",
                position=before.position + 1,
                objective=_objective(
                    experiment.weighting_of_rounds,
                    series,
                    substeps,
                    before.model.null_cond if series == "two" else None,
                    bound(experiment, before.model),
                ),
                training=training,
                parent=before.name,
                # The encoder runs the other way, where nothing is clipped.
                teacher=before.model if series == "encode" else _taught_by(experiment, before.model),
                teacher_calls=(2 if series == "tract" else substeps) * before.model.calls_per_step,
                num_steps=num_steps,
                w_range=(0.0, 0.0) if series == "encode" else before.w_range,
                series=series,
                from_scratch=False,
            )
        )
        before, teacher_steps = stages[-1], num_steps
    return stages


@functools.cache  # rounds of one kind share the objective, hence the compiled step
def _objective(weighting, series, substeps, null_cond, within):
    if series == "encode":
        return make_encode(weighting=weighting)
    if series == "two":
        return make_two_student(weighting=weighting, null_cond=null_cond, bound=within)
    if series == "tract":
        return within_range(make_tract(weighting=weighting, group=substeps), within)
    return within_range(make_stage2(weighting=weighting, series=series, substeps=substeps), within)


def make_knobs(stage, grid, w_margin=0.0):
    """The traced numbers of a stage, on the host; `grid` has experiment.stage2.teacher_steps intervals.

    `w_margin` is a share of the stage's range of w.
    """
    low, high = stage.w_range
    return Knobs(
        num_steps=np.int32(stage.num_steps),
        updates=np.int32(stage.training.updates),
        peak_lr=np.float32(stage.training.learning_rate),
        w_min=np.float32(low),
        w_max=np.float32(high),
        w_margin=np.float32(w_margin * (high - low)),
        loss_limit=np.float32(np.inf),
        grid=grid,
    )
