"""One stage on a topology, by arithmetic: memory of a chip, operations, bytes moved and sent, seconds per update."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from guided_distill import costs, sharding
from guided_distill.errors import UserError
from guided_distill.guidance import make_denoiser
from guided_distill.teachers import shapes_of

_USABLE = 0.95  # of a chip's memory: the runtime keeps some for itself
_DENOISING = ("teacher", "to_v")  # stages trained on data, with the network's dropout


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run is planned for: the topology, and over how many of its chips each parameter is split."""

    topology: Any
    fsdp: int = 1

    def __post_init__(self):
        if self.fsdp < 1 or self.topology.chips % self.fsdp:
            raise UserError(f"config.mesh.fsdp is {self.fsdp}, which does not divide {self.topology.chips} chips")

    def per_chip(self, name, batch_size, parts):
        """The share of one chip in a part of a batch. Raises UserError where it does not divide."""
        unit = self.topology.chips * parts
        if batch_size % unit:
            of_parts = f" in {parts} accumulated parts" if parts > 1 else ""
            raise UserError(
                f"config.{name}.batch_size is {batch_size}, which does not divide over the {self.topology.chips} chips "
                f"of {self.topology}{of_parts}; name a smaller topology or a multiple of {unit}"
            )
        return batch_size // unit


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """What one update of a stage costs. Memory, `flops`, `moved` and `sent` are one chip's, in bytes and operations."""

    name: str
    group: str  # of the config
    parts: int  # that a batch is accumulated from
    series_steps: int | None  # N of a student of one number of steps
    updates: int  # 0: taken from elsewhere
    batch_size: int
    parameters: int
    memory: dict[str, float]
    flops: float  # as executed, recomputation included
    useful_flops: float  # three forward passes of the student and what the teacher is asked
    moved: float
    sent: dict[str, float]  # by kind of collective
    seconds: float  # of the slowest of the three, at the speeds of the data sheet
    bound: str  # what takes the longest: compute, memory or links

    @property
    def bytes(self):
        """All of a chip's memory."""
        return sum(self.memory.values())

    @property
    def days(self):
        """Of all updates."""
        return self.updates * self.seconds / 86400

    def fits(self, topology):
        """Whether the chip has that much memory to use."""
        return self.bytes <= _USABLE * topology.chip.memory


def bytes_on_chip(leaf, place, itemsize=4):
    """Bytes of a parameter on one chip: its share where sharding.py splits it along `place.fsdp` chips."""
    size = place.topology.bytes_of(leaf.shape, itemsize)
    return size / place.fsdp if any(sharding.fsdp_spec(leaf.shape, place.fsdp)) else size


def _tree_bytes(tree, place, itemsize=4):
    return sum(bytes_on_chip(leaf, place, itemsize) for leaf in jax.tree.leaves(tree))


def plan_stage(experiment, stage, parent, place, known):
    """The StagePlan of a Stage whose teacher is the Stage `parent` (None of a teacher's own training).

    `known`, a dict, keeps what stages share, so that rounds of one network are counted once.
    """
    group = "stage2" if stage.series else stage.name.partition("_w")[0]
    parts = stage.training.accumulate
    batch = place.per_chip(group, stage.training.batch_size, parts)
    params = shapes_of(stage.init)
    forward, train = _network_costs(stage, params, batch, place, known)
    teacher = None
    if stage.teacher_calls:  # a clipped teacher costs what it costs unclipped
        teacher = _guided_cost(parent, batch, place, known)
    calls = stage.student_calls
    asked = stage.teacher_calls / parent.model.calls_per_step if teacher else 0
    flops = parts * (calls * train.flops + (asked * teacher.flops if teacher else 0))
    moved = parts * (calls * train.moved + (asked * teacher.moved if teacher else 0))
    moved += _optimiser_traffic(stage, params, place)
    theirs = shapes_of(parent.init) if teacher else {}
    sent = _sent(params, theirs, place, parts, jnp.dtype(experiment.teacher_dtype).itemsize)
    seconds, bound = _roofline(experiment, place.topology.chip, flops, moved, sent)
    return StagePlan(
        name=stage.name,
        group=group,
        parts=parts,
        series_steps=None if stage.any_steps else stage.num_steps,
        updates=0 if experiment.given(stage.name) else stage.training.updates,
        batch_size=stage.training.batch_size,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        memory=_memory(experiment, stage, parent, teacher, train, calls, batch, place),
        flops=flops,
        useful_flops=parts
        * (calls * 3 * forward.flops / stage.model.members + (asked * teacher.flops if teacher else 0)),
        moved=moved,
        sent=sent,
        seconds=seconds,
        bound=bound,
    )


def _memory(experiment, stage, parent, teacher, train, calls, batch, place):
    params = shapes_of(stage.init)
    weights, whole = _tree_bytes(params, place), _tree_bytes(params, Place(place.topology))
    # At the peak of the backward pass some gradients are there and some activations no longer are.
    working = max(calls * (train.peak - train.results) + train.results, teacher.peak if teacher else 0.0)
    teacher_itemsize = jnp.dtype(experiment.teacher_dtype).itemsize
    gathered = 0.0
    if place.fsdp > 1:
        # The gradients are split as they are made, and a layer's whole weights and gradients come and go; the teacher
        # is gathered before its steps, which are a loop, and stays.
        gathered = 2.0 * max(place.topology.bytes_of(leaf.shape, 4) for leaf in jax.tree.leaves(params))
        whole_place = Place(place.topology)
        gathered += _tree_bytes(shapes_of(parent.init), whole_place, teacher_itemsize) if parent else 0.0
    sample = place.topology.bytes_of((batch, *stage.model.sample_shape), 4)
    return {
        "weights": weights,
        "Adam": 2.0 * weights,
        "EMA": weights if stage.training.ema else 0.0,
        "teacher": _tree_bytes(shapes_of(parent.init), place, teacher_itemsize) if parent else 0.0,
        # What parts of a batch add up to is kept beside those of one part.
        "gradients": train.results * weights / whole + (weights if stage.training.accumulate > 1 else 0.0),
        "activations": max(working - train.results, 0.0) + gathered + sample,
    }


def _arguments(model, batch):
    """(z, logsnr, cond) of a network for `batch` examples, as shapes."""
    z = jax.ShapeDtypeStruct((batch, *model.sample_shape), jnp.float32)
    return z, jax.ShapeDtypeStruct((batch,), jnp.float32), model.cond_shapes(batch)


def _network_costs(stage, params, batch, place, known):
    """(cost of one prediction of the network that a stage trains, that of one loss with its gradients)."""
    model, dropout = stage.model, stage.name in _DENOISING
    # Another parameterisation of the same network costs the same.
    key = (model.model_fn, model.sample_shape, dropout, batch, place.topology)
    if key not in known:

        def predict(params, z, logsnr, cond, key):
            denoiser = make_denoiser(model.model_fn, params, model.schedule, model.parameterisation)
            return denoiser(z, logsnr, cond, dropout_key=key if dropout else None).x

        arguments = (*_arguments(model, batch), jax.eval_shape(lambda: jax.random.key(0)))
        with sharding.imagined(place.topology.platform):
            known[key] = costs.costs_with_gradient(predict, params, *arguments, bytes_of=place.topology.bytes_of)
    return known[key]


def _guided_cost(stage, batch, place, known):
    """One guided prediction of a stage's network: `calls_per_step` forward passes."""
    teacher, params = stage.model, shapes_of(stage.init)
    if teacher.guided is None:
        cost, _ = _network_costs(stage, params, batch, place, known)
        calls = teacher.calls_per_step / teacher.members  # an ensemble's members are one network here
        return costs.Cost(calls * cost.flops, calls * cost.moved, calls * cost.peak, cost.results)
    key = ("guided", teacher, batch, place.topology)
    if key not in known:

        def guided(params, z, logsnr, cond):
            return teacher.denoiser(params)(z, logsnr, cond)

        arguments = params, *_arguments(teacher, batch)
        with sharding.imagined(place.topology.platform):
            known[key] = costs.cost_of(guided, *arguments, bytes_of=place.topology.bytes_of)
    return known[key]


def _optimiser_traffic(stage, params, place):
    """Weights, moments and average are read and written, gradients read twice: for their norm, and applied."""
    return _tree_bytes(params, place) * (2 * (4 if stage.training.ema else 3) + 2)


def _sent(params, teacher, place, parts, teacher_itemsize):
    """{collective: bytes} that a chip sends in one update, in rings: float32 weights gathered, gradients summed.

    With each of the `parts` of a batch.
    """

    def ring(chips):
        return (chips - 1) / chips

    split, copies = place.fsdp, place.topology.chips // place.fsdp
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    theirs = sum(leaf.size * teacher_itemsize for leaf in jax.tree.leaves(teacher))
    return {
        # The student's weights forwards and backwards, the teacher's once.
        "all-gather": parts * ring(split) * (2 * whole + theirs),
        "reduce-scatter": parts * ring(split) * whole,
        "all-reduce": parts * 2 * ring(copies) * whole / split,
    }


def _roofline(experiment, chip, flops, moved, sent):
    dtype = getattr(experiment.model, "dtype", "float32")
    times = {
        "compute": flops / chip.flops_per_second(dtype),
        "memory": moved / chip.memory_speed,
        "links": sum(sent.values()) / chip.link_speed,
    }
    bound = max(times, key=times.get)
    return times[bound], bound
