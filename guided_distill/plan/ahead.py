"""The programs of a run compiled ahead of time, for devices that need not be there, with the memory they take."""

import dataclasses
import hashlib
import json
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from guided_distill import diffusion, samplers, sharding, train
from guided_distill.errors import UserError
from guided_distill.files import cache_directory, read_json, write_whole
from guided_distill.generate import compiled
from guided_distill.stages import make_knobs
from guided_distill.state import as_teacher, make_state
from guided_distill.teachers import shapes_of

_OPTIONS = {"v4": {"chip_config_name": "megacore"}}  # else its two cores are listed as two devices


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program, bytes of one device: arguments, temporaries, results; and how long it took.

    `aliased` bytes of the results lie in arguments that were given up; `peak` is the most that live at once, where the
    compiler says so.
    """

    arguments: int
    temporaries: int
    results: int
    aliased: int
    peak: int
    seconds: float

    @property
    def bytes(self):
        """All memory that the program takes."""
        return self.arguments + self.temporaries + self.results - self.aliased


def devices_of(topology):
    """The devices of a Topology that is not there. Raises UserError without libtpu or for what it cannot describe."""
    if not topology.is_tpu:
        raise UserError(f"--topology={topology}: with --compile it must be one of TPUs; leave it out for what is here")
    options = _OPTIONS.get(topology.kind, {})
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=str(topology), **options).devices
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--topology={topology}: {reason}; --compile needs libtpu, the extra [plan]") from error


def programs(experiment, stages, mesh):
    """Yields (name, lower), one for each distinct train step and sampler; lower() gives the program for `mesh`."""
    by_name, seen = {stage.name: stage for stage in stages}, set()
    for stage in stages:
        if stage.objective is None:
            continue
        shapes = step_arguments(experiment, stage, by_name.get(stage.parent), mesh)
        training = stage.training
        step = train.make_train_step(
            stage.objective, stage.model, stage.teacher, training.optimiser, mesh, training.accumulate
        )
        if (step, stage.training.batch_size) not in seen:
            seen.add((step, stage.training.batch_size))
            yield stage.name, lambda step=step, shapes=shapes: step.lower(*shapes)
        sampler = compiled(stage.model, samplers.SAMPLERS[stage.sampler], mesh)
        if sampler not in seen and stage.sampler != "encode":
            seen.add(sampler)
            shapes = _sampler_arguments(experiment, stage, mesh)
            yield f"{stage.name}, sampler", lambda sampler=sampler, shapes=shapes: sampler.lower(*shapes)


def _placed(tree, shardings):
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )


def _grid(experiment):
    make = diffusion.make_grid
    return jax.eval_shape(lambda: jax.tree.map(jnp.asarray, make(experiment.schedule, experiment.stage2.teacher_steps)))


def step_arguments(experiment, stage, parent, mesh):
    """(state, frozen, batch, knobs, key) of a stage's train step, as shapes on a mesh."""
    size = stage.training.batch_size
    grid = diffusion.make_grid(experiment.schedule, experiment.stage2.teacher_steps)
    state, knobs, key = jax.eval_shape(
        lambda params: (
            make_state(params, stage.training.optimiser),
            jax.tree.map(jnp.asarray, make_knobs(stage, grid)),
            jax.random.key(0),
        ),
        shapes_of(stage.init),
    )
    dtype = experiment.teacher_dtype
    frozen = (
        {} if parent is None else {"teacher": jax.eval_shape(lambda p: as_teacher(p, dtype), shapes_of(parent.init))}
    )
    cond = stage.model.cond_shapes(size)
    del cond["w"]
    batch = {"x": jax.ShapeDtypeStruct((size, *experiment.data.sample_shape), jnp.float32), **cond}
    split = jax.tree.map(lambda _: sharding.batched(mesh), batch)
    trees = (state, frozen, knobs, key)
    state, frozen, knobs, key = _placed(trees, sharding.shardings_of(mesh, trees))
    return state, frozen, _placed(batch, split), knobs, key


def _sampler_arguments(experiment, stage, mesh):
    """(params, grid, keys, cond, num_steps) of a stage's sampler, as shapes on a mesh."""
    size = experiment.evaluate.batch_size
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size))
    cond = stage.model.cond_shapes(size)
    whole = (shapes_of(stage.init), _grid(experiment), jax.ShapeDtypeStruct((), jnp.int32))
    params, grid, num_steps = _placed(whole, sharding.shardings_of(mesh, whole))
    keys, cond = _placed((keys, cond), jax.tree.map(lambda _: sharding.batched(mesh), (keys, cond)))
    return params, grid, keys, cond, num_steps


def compile_all(experiment, stages, devices, say):
    """{name: Compiled} of the distinct programs; `say` (text) is told what is going on. Results are kept on disk."""
    found = {}
    for name, lower in programs(experiment, stages, sharding.make_mesh(devices, experiment.mesh.fsdp)):
        say(f"{name}: lowering")
        lowered = lower()
        path = cache_directory() / "plan" / f"{_fingerprint(lowered, devices)}.json"
        if path.exists():
            found[name] = Compiled(**read_json(path))
            say(f"{name}: known from {path}, where it took {found[name].seconds:.0f} s")
            continue
        say(f"{name}: compiling for {len(devices)} {devices[0].device_kind}; a large network takes many minutes")
        began = time.monotonic()
        analysis = lowered.compile().memory_analysis()
        found[name] = Compiled(
            arguments=analysis.argument_size_in_bytes,
            temporaries=analysis.temp_size_in_bytes,
            results=analysis.output_size_in_bytes,
            aliased=analysis.alias_size_in_bytes,
            peak=analysis.peak_memory_in_bytes,
            seconds=time.monotonic() - began,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(dataclasses.asdict(found[name])) + "\n")
        say(f"{name}: {found[name].seconds:.0f} s")
    return found


def _fingerprint(lowered, devices):
    """A name for a program: its text, the devices, and the version of what compiles it."""
    version = devices[0].client.platform_version
    text = [lowered.as_text(), devices[0].device_kind, str(len(devices)), jax.__version__, version]
    return hashlib.sha256("\0".join(text).encode()).hexdigest()[:24]
