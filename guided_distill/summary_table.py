"""The figures of an evaluation as the terminal shows them."""

from rich.table import Table

from guided_distill.evaluation.measure import name_of


def table_of(summary):
    """The rows of a summary as a rich.table.Table, by the first of the networks."""
    network, floor = summary["evaluate"]["features"][0], summary["noise_floor"]
    frechet = name_of("frechet", network)
    table = Table(title=frechet if floor is None else f"{frechet} of real halves (noise floor): {floor:.3g}")
    for name in ("model", "steps", "w", "frechet", "score", "label", "to ref.", "ms/image"):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for row in summary["rows"]:
        values = row["metrics"]
        table.add_row(
            row["stage"] if row["model"] == "student" or row["sampler"] == "deterministic" else row["sampler"],
            _steps(row),
            f"{row['w']:g}",
            f"{values[frechet]:.2f}",
            f"{values[name_of('score', network)]:.2f}",
            _or_dash(values.get("label_agreement"), ".1%"),
            _or_dash(values.get("distance_to_reference"), ".4f"),
            f"{1000 * row['seconds_per_image']:.2f}",
        )
    return table


def _steps(row):
    """8 for eight steps of one call, 8x2 for a guided teacher's, and the number of calls where it is neither."""
    steps, each = row["num_steps"], row["nfe"] / row["num_steps"]
    if not each.is_integer():
        return f"{steps} ({row['nfe']} calls)"
    return str(steps) if each == 1 else f"{steps}x{each:.0f}"


def _or_dash(value, form):
    return "-" if value is None else format(value, form)
