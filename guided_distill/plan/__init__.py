"""What a run would cost on a topology that need not be there: memory, time, what to change. Nothing is trained."""

import dataclasses

import jax
from rich.console import Console
from rich.table import Table

from guided_distill.chips import parse_topology, topology_of
from guided_distill.experiment import from_config
from guided_distill.plan import ahead
from guided_distill.plan.stage_plan import Place, StagePlan, plan_stage
from guided_distill.stages import make_stages
from guided_distill.teachers import outside_teacher

__all__ = ["Place", "StagePlan", "dry_run", "make_plan", "place_for", "stages_of"]

_WIDTH = 140  # of the tables
_SHARE_OF_PEAK = 0.4  # FLOP/s a diffusion network trained by JAX reaches, in round numbers


def place_for(topology=None, fsdp=1):
    """The Place that a flag names; without a topology that of the devices at hand."""
    if topology is not None:
        return Place(parse_topology(topology), fsdp)
    devices = jax.devices()
    return Place(topology_of(devices[0].device_kind, devices[0].platform, len(devices)), fsdp)


def stages_of(experiment):
    """The Stages of an experiment."""
    factory = experiment.teacher.factory
    return make_stages(experiment, outside_teacher(factory, experiment) if factory else None)


def make_plan(experiment, place, known, stages=None):
    """The StagePlans of an experiment's stages, in order. `known`, a dict, keeps what other plans share with this."""
    stages = stages or stages_of(experiment)
    by_name = {stage.name: stage for stage in stages}
    return [plan_stage(experiment, stage, by_name.get(stage.parent), place, known) for stage in stages]


def dry_run(config, console=None, *, topology=None, compiling=False):
    """Prints what each stage needs and takes, by arithmetic, and with `compiling` by the compiler. Raises UserError."""
    experiment, known = from_config(config), {}
    place = place_for(topology, experiment.mesh.fsdp)
    stages = stages_of(experiment)
    plans = make_plan(experiment, place, known, stages)
    console = console or Console(width=_WIDTH, soft_wrap=True)
    console.print(_memory_table(experiment, plans, place))
    console.print(_time_table(experiment, plans, place))
    for line in _summary(experiment, plans, place) + advice(experiment, plans, place, known):
        console.print(line, highlight=False)
    if compiling:
        devices = ahead.devices_of(place.topology) if topology else jax.devices()
        found = ahead.compile_all(experiment, stages, devices, lambda text: console.print(text, highlight=False))
        console.print(_compiled_table(plans, found, place))


def _table(title, names):
    table = Table(title=title, title_justify="left")
    words = ("stage", "program", "fits", "bound")
    for name in names:
        table.add_column(name, justify="left" if name in words else "right", no_wrap=True)
    return table


def _memory_table(experiment, plans, place):
    parts = list(plans[0].memory)
    limit = place.topology.chip.memory / 2**30
    title = f"{experiment.data.name} on {place.topology}, fsdp {place.fsdp}: MiB of a chip, which has {limit:.0f} GiB"
    table = _table(title, ["stage", "N", "batch", "parameters", *parts, "sum", "fits"])
    for plan in plans:
        table.add_row(
            plan.name if plan.updates else f"{plan.name} (given)",
            str(plan.series_steps or "-"),
            f"{plan.batch_size:,}",
            f"{plan.parameters:,}",
            *(f"{size / 2**20:,.0f}" for size in [*plan.memory.values(), plan.bytes]),
            "yes" if plan.fits(place.topology) else "NO",
        )
    return table


def _time_table(experiment, plans, place):
    kinds = [kind for kind in plans[0].sent if any(plan.sent[kind] for plan in plans)]
    table = _table(
        f"An update, and all of them, on {place.topology} at the speeds of its data sheet",
        [
            "stage",
            "updates",
            "TFLOP",
            "with remat",
            "GB moved",
            *(f"MB {kind}" for kind in kinds),
            "ms",
            "bound",
            "days",
        ],
    )
    for plan in plans:
        table.add_row(
            plan.name,
            f"{plan.updates:,}",
            f"{plan.useful_flops * place.topology.chips / 1e12:,.3f}",
            f"{plan.flops * place.topology.chips / 1e12:,.3f}",
            f"{plan.moved / 1e9:,.3f}",
            *(f"{plan.sent[kind] / 1e6:,.1f}" for kind in kinds),
            f"{1e3 * plan.seconds:,.2f}",
            plan.bound,
            f"{plan.days:,.2f}",
        )
    table.caption = "TFLOP of all chips; GB moved to and from memory and MB sent by kind of collective, of one"
    return table


def _compiled_table(plans, found, place):
    """The compiler's memory of each program beside the arithmetic's, which has none for samplers."""
    table = _table(
        f"Compiled for {place.topology}: MiB of a chip",
        ["program", "arguments", "temporaries", "results kept", "sum", "by arithmetic", "differs", "compiled in"],
    )
    by_name = {plan.name: plan.bytes for plan in plans}
    for name, program in found.items():
        kept = program.results - program.aliased
        ours = by_name.get(name)
        table.add_row(
            name,
            *(f"{size / 2**20:,.0f}" for size in (program.arguments, program.temporaries, kept, program.bytes)),
            f"{ours / 2**20:,.0f}" if ours else "-",
            f"{ours / program.bytes - 1:+.0%}" if ours else "-",
            f"{program.seconds:,.0f} s",
        )
    return table


def _summary(experiment, plans, place):
    chip, chips = place.topology.chip, place.topology.chips
    dtype = getattr(experiment.model, "dtype", "float32")
    flops = sum(plan.updates * plan.useful_flops for plan in plans)
    slower = flops / (_SHARE_OF_PEAK * chip.flops_per_second(dtype)) / 86400
    days = sum(plan.days for plan in plans)
    lines = [
        f"The whole chain: {days:,.2f} days on {chips} chips by these times; {slower:,.2f} at {_SHARE_OF_PEAK:.0%} of "
        "peak FLOP/s, if memory allows. Evaluation, samples and checkpoints are not in it.",
        "Exact: parameters, FLOPs, bytes of weights but for padding. Estimated by a model of fusion: activations and",
        "bytes moved. A network of a few channels takes several times as much on a TPU, which pads it; --compile asks.",
    ]
    if experiment.rounds.plan == "auto":
        lines.append("Updates of rounds are shared out anew as the run goes.")
    return lines


def advice(experiment, plans, place, known):
    """Lines that say what would make the stages fit; none where they do."""
    misfits = [plan for plan in plans if not plan.fits(place.topology)]
    if not misfits:
        return []
    worst = max(misfits, key=lambda plan: plan.bytes)
    needs, has = worst.bytes / 2**30, place.topology.chip.memory / 2**30
    lines = [f"{worst.name} needs {needs:.1f} GiB of a chip that has {has:.0f}. What would do:"]
    for policy, costs in (("products", "hardly more computation"), ("nothing", "a third more computation")):
        if _keeps_less(policy, experiment.model):
            model = dataclasses.replace(experiment.model, remat=True, remat_policy=policy)
            most = _most(make_plan(dataclasses.replace(experiment, model=model), place, known))
            lines.append(f"  --config.model.remat=True --config.model.remat_policy={policy}: {most:.1f} GiB, {costs}")
    fsdp = _smallest_fsdp(experiment, place, known)
    shared_out = f"  --config.mesh.fsdp={fsdp}: weights, moments and teacher shared out"
    lines.append(shared_out if fsdp else "  no size of config.mesh.fsdp is enough")
    batch = largest_batch(worst, place)
    lines.append(
        f"  --config.{worst.group}.accumulate={_parts(worst, batch, place)}: a batch goes through in parts"
        if batch
        else "  no batch is small enough: the weights alone are too large"
    )
    return lines


def _keeps_less(policy, model):
    """Whether a policy of rematerialisation keeps less than a network does now."""
    kept = ("everything", "products", "nothing")
    if not hasattr(model, "remat"):
        return False
    return kept.index(policy) > kept.index(model.remat_policy if model.remat else "everything")


def _parts(plan, batch, place):
    """The fewest parts, each of as many examples for every chip, that are no larger than `batch`."""
    per_chip = plan.batch_size // place.topology.chips
    return next(n for n in range(1, per_chip + 1) if per_chip % n == 0 and plan.batch_size <= n * batch)


def _most(plans):
    return max(plan.bytes for plan in plans) / 2**30


def _smallest_fsdp(experiment, place, known):
    sizes = [2**power for power in range(1, 12) if place.topology.chips % 2**power == 0]
    fitting = (
        size
        for size in sizes
        if all(p.fits(place.topology) for p in make_plan(experiment, dataclasses.replace(place, fsdp=size), known))
    )
    return next(fitting, None)


def largest_batch(plan, place):
    """The largest batch, an example of each chip at least, with which a stage fits; 0 where none does."""
    grows = plan.memory["activations"]
    left = 0.95 * place.topology.chip.memory - (plan.bytes - grows)
    per_chip = plan.batch_size // plan.parts // place.topology.chips
    return max(0, int(per_chip * left / grows)) * place.topology.chips
