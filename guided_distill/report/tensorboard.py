"""The figures of an evaluation as TensorBoard's scalars."""

from guided_distill.files import absolute
from guided_distill.metrics import MetricWriter
from guided_distill.report.rows import read_summary


def tensorboard_rows(writer, rows) -> None:
    """Writes each metric of each Row: the step is the number of sampling steps, the tag names all the rest."""
    for row in sorted(rows, key=lambda row: row.num_steps):
        series = row.series.replace(", ", "_").replace(" ", "_")
        tag = f"{series}_{row.sampler}_w{row.w:g}"
        writer.scalars(row.num_steps, {f"{metric}/{tag}": value for metric, value in row.metrics.items()})


def write_tensorboard(workdir) -> None:
    """The figures of a workdir's summary.json as events in `workdir/evaluation`, in place of those of earlier calls."""
    workdir = absolute(workdir)
    rows = read_summary(workdir)["rows"]
    with MetricWriter(workdir / "evaluation") as writer:
        tensorboard_rows(writer, rows)
