"""What a run would do and how much memory its weights take, without running it."""

import jax
from rich.console import Console
from rich.table import Table

from guided_distill import pipeline
from guided_distill.experiment import from_config


def tree_bytes(tree):
    """Bytes of all arrays (or ShapeDtypeStructs) in a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def stage_memory(experiment, stage):
    """{parameters (a count), weights, moments, ema, teacher (bytes)} of a stage, from shapes alone."""

    def params_of(model):
        shapes = jax.eval_shape(
            lambda key: pipeline.initial_params(experiment, model.w_conditioned, key), jax.random.key(0)
        )
        return tree_bytes(shapes), sum(leaf.size for leaf in jax.tree.leaves(shapes))

    weights, parameters = params_of(stage.model)
    return {
        "parameters": parameters,
        "weights": weights,
        "moments": 2 * weights,
        "ema": weights if stage.training.ema else 0,
        "teacher": params_of(stage.teacher)[0] if stage.teacher else 0,
    }


def dry_run(config, console=None):
    """Prints the resolved stages with their parameters and memory. Raises UserError for a wrong config."""
    experiment = from_config(config)
    table = Table(title=f"{experiment.data.name}: stages, in order (memory of float32 weights, without activations)")
    for name in ("stage", "N", "updates", "batch", "parameters", "weights", "Adam", "EMA", "teacher", "sum"):
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    for stage in pipeline.make_stages(experiment):
        memory = stage_memory(experiment, stage)
        parts = [memory[name] for name in ("weights", "moments", "ema", "teacher")]
        given = stage.name == "teacher" and experiment.teacher.checkpoint
        training = stage.training
        table.add_row(
            f"{stage.name} (given)" if given else stage.name,
            str(stage.num_steps) if stage.position > 1 else "-",
            "0" if given else f"{training.updates:,}",
            f"{training.batch_size:,}",
            f"{memory['parameters']:,}",
            *(f"{part / 2**20:,.1f}" for part in [*parts, sum(parts)]),
        )
    table.caption = "memory in MiB; N: network evaluations per image of the student"
    (console or Console(width=110, soft_wrap=True)).print(table)
