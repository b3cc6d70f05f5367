"""What an evaluation measures: every model, with every sampler, at every number of steps."""

import dataclasses
from typing import Any

from guided_distill.samplers import DRAWS_NOISE, network_calls


@dataclasses.dataclass(frozen=True)
class Entry:
    """One model with one sampler at one of the numbers of steps it is measured at."""

    stage: Any
    num_steps: int
    sampler: str = "deterministic"
    reference: bool = False  # the teacher's own best

    @property
    def is_teacher(self):
        """Whether this is the model that is distilled."""
        return self.stage.name in ("teacher", "to_v")

    @property
    def calls(self):
        """Network evaluations per image."""
        return self.stage.model.calls_per_step * network_calls(self.sampler, self.num_steps)

    @property
    def keeps_the_map(self):
        """Whether an image is a function of its first noise alone, hence comparable with the reference's."""
        return self.sampler not in DRAWS_NOISE

    @property
    def label(self):
        """How the picture and the progress call it."""
        calls = f"({self.calls} call{'s' * (self.calls > 1)})"
        if self.is_teacher:
            name = "teacher" if self.sampler == "deterministic" else self.sampler
            return f"{name} {self.num_steps}x{self.stage.model.calls_per_step} {calls}"
        series = {"": "stage 1", "det": "student", "sto": "stochastic student", "two": "two students"}
        name = series.get(self.stage.series, self.stage.series)
        low, high = self.stage.w_range
        return f"{name}{f' of w {low:g}' * (low == high)} {self.num_steps} {calls}"

    def key(self, w):
        """What names its row for a w."""
        return self.stage.name, self.sampler, self.num_steps, w

    def file(self, w):
        """The name, without suffix, of what is kept of its samples for a w."""
        return f"{self.stage.name}_{self.sampler}_{self.num_steps:04d}_w{w:g}"

    def strengths(self, config):
        """Those w of an evaluation that the model was trained for."""
        low, high = self.stage.w_range
        return [w for w in config.w if low <= w <= high]


def make_entries(experiment, stages):
    """The reference teacher first: everything after it is compared with its images."""
    config = experiment.evaluate
    few = sorted(config.num_steps, reverse=True)
    guided, *students = (stage for stage in stages if stage.name != "teacher" or not experiment.to_v.updates)
    entries = [Entry(guided, experiment.stage2.teacher_steps, reference=True)]
    entries += [Entry(guided, n, sampler) for sampler in ("deterministic", *config.baselines) for n in few]
    for first in (stage for stage in students if not stage.series):
        entries += [Entry(first, n) for n in few]
    taught = [stage for stage in students if stage.series and stage.sampler != "encode"]
    steps = {stage.name: stage.steps(experiment.stage2.teacher_steps) for stage in taught}
    return entries + [Entry(stage, n, stage.sampler) for stage in taught for n in few if n in steps[stage.name]]
