"""Loss curves of the first updates, however the work is laid out; run as a program, of one process of several."""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from tiny import tiny_config

from configs import common, digits
from guided_distill import diffusion, distributed, sharding, train
from guided_distill.experiment import from_config
from guided_distill.stages import make_knobs, make_stages
from guided_distill.state import make_state
from guided_distill.teachers import initial_params

# Wide enough for its kernels to be worth splitting.
WIDE = tiny_config(clip_targets=False)
WIDE["model"].update(channels=32, norm_groups=8, emb_channels=128)
EXPERIMENT = from_config(WIDE)
UPDATES = 20
NAMES = ["teacher", "stage1", "stage2_det_0002"]


def quick_experiment():
    """One that compiles in a second."""
    config = digits.get_config()
    common.use_mlp(config, features=128, num_layers=2, emb_channels=32)
    config.stage2.update(teacher_steps=4, final_num_steps=(1,))
    config.evaluate.num_steps = (1, 2)
    return from_config(config.to_dict())


QUICK = quick_experiment()


def mesh_of(devices, fsdp=1):
    return sharding.make_mesh(jax.devices()[:devices], fsdp)


@functools.cache
def params_of(experiment, w_conditioned):
    params = initial_params(experiment, w_conditioned, jax.random.key(1))
    return jax.tree.map(lambda p: p + 0.05 * jnp.sin(jnp.arange(p.size, dtype=p.dtype).reshape(p.shape)), params)


def arguments_of(experiment, stage, mesh):
    """(state, frozen, knobs, key) of a stage's step, on a mesh."""
    params = jax.tree.map(jnp.copy, params_of(experiment, stage.model.w_conditioned))
    state = make_state(params, stage.training.optimiser)
    frozen = {} if stage.teacher is None else {"teacher": params_of(experiment, stage.teacher.w_conditioned)}
    knobs = make_knobs(stage, diffusion.make_grid(experiment.schedule, experiment.stage2.teacher_steps))
    return sharding.place(mesh, (state, frozen, knobs, jax.random.key(0)))


def batch_of(step, size=16):
    """This process's rows of a batch."""
    rng = np.random.default_rng(step)
    x = rng.uniform(-1, 1, (size, 8, 8, 1)).astype(np.float32)
    share = size // jax.process_count()
    rows = slice(share * jax.process_index(), share * (jax.process_index() + 1))
    return {"x": x[rows], "label": rng.integers(0, 10, size, dtype=np.int32)[rows]}


@functools.cache
def curve(experiment, name, devices, fsdp=1, accumulate=1, remat=False, policy="nothing"):
    """(loss and norm of the gradient of the first updates, the state after them)."""
    if remat:
        model = dataclasses.replace(experiment.model, remat=True, remat_policy=policy)
        experiment = dataclasses.replace(experiment, model=model)
    stage = {stage.name: stage for stage in make_stages(experiment)}[name]
    mesh, optimiser = mesh_of(devices, fsdp), stage.training.optimiser
    step = train.make_train_step(stage.objective, stage.model, stage.teacher, optimiser, mesh, accumulate)
    state, frozen, knobs, key = arguments_of(experiment, stage, mesh)
    found = []
    for update in range(UPDATES):
        state, values = step(state, frozen, sharding.shard_batch(mesh, batch_of(update)), knobs, key)
        found.append([float(values["loss"]), float(values["grad_norm"])])
    assert step._cache_size() == 1
    return np.array(found), state


def main():
    """Prints the curves of a quick network; arguments: coordinator, number of processes, process, layout as JSON."""
    coordinator, processes, process, layout = sys.argv[1:]
    if int(processes) > 1:
        distributed.initialise(coordinator, int(processes), int(process))
    print(json.dumps({name: curve(QUICK, name, *json.loads(layout))[0].tolist() for name in NAMES}))


if __name__ == "__main__":
    main()
