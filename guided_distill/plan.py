"""What a run would do and how much memory its weights take, without running it."""

import jax
from rich.console import Console
from rich.table import Table

from guided_distill.experiment import from_config
from guided_distill.stages import make_stages
from guided_distill.teachers import outside_teacher, shapes_of


def tree_bytes(tree):
    """Bytes of all arrays (or ShapeDtypeStructs) in a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def stage_memory(stage, parent=None):
    """{parameters (a count), weights, moments, ema, teacher (bytes)} of a stage, from shapes alone."""
    shapes = shapes_of(stage.init)
    weights = tree_bytes(shapes)
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes)),
        "weights": weights,
        "moments": 2 * weights,
        "ema": weights if stage.training.ema else 0,
        "teacher": tree_bytes(shapes_of(parent.init)) if parent else 0,
    }


def dry_run(config, console=None):
    """Prints the resolved stages with their parameters and memory. Raises UserError for a wrong config."""
    experiment = from_config(config)
    table = Table(title=f"{experiment.data.name}: stages, in order (memory of float32 weights, without activations)")
    for name in ("stage", "N", "updates", "batch", "parameters", "weights", "Adam", "EMA", "teacher", "sum"):
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    factory = experiment.teacher.factory
    stages = make_stages(experiment, outside_teacher(factory, experiment) if factory else None)
    stages = {stage.name: stage for stage in stages}
    for stage in stages.values():
        memory = stage_memory(stage, stages.get(stage.parent))
        parts = [memory[name] for name in ("weights", "moments", "ema", "teacher")]
        given = experiment.given(stage.name)
        training = stage.training
        table.add_row(
            f"{stage.name} (given)" if given else stage.name,
            str(stage.num_steps) if stage.series else "-",
            "0" if given else f"{training.updates:,}",
            f"{training.batch_size:,}",
            f"{memory['parameters']:,}",
            *(f"{part / 2**20:,.1f}" for part in [*parts, sum(parts)]),
        )
    table.caption = "memory in MiB; N: network evaluations per image of the student"
    if experiment.rounds.plan == "auto":
        table.caption += "; updates of rounds are shared out anew as the run goes"
    (console or Console(width=110, soft_wrap=True)).print(table)
