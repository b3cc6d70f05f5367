"""The train step: its time beside the same U-Net and step in PyTorch, and its operations beside its parts'.

python -m benchmarks.train_step             both, of small networks on the CPU
python -m benchmarks.train_step --flops     operations only, which needs no PyTorch

A stage of a shipped config, on whatever devices there are: benchmarks/config_step.py.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from configs import digits
from guided_distill import diffusion, optim, sharding, train
from guided_distill.experiment import from_config
from guided_distill.stages import make_knobs, make_stages
from guided_distill.state import make_state
from guided_distill.teachers import initial_params, make_model

_ROUNDS, _STEPS = 7, 2  # turns of each side, and timed steps of a turn
_MOST_TIME, _MOST_FLOPS = 1.5, 1.05  # times PyTorch's time, times the sum of the parts


def digits_8x8():
    """The experiment of `make demo`."""
    return from_config(digits.get_config().to_dict())


def colour_32x32():
    """A U-Net of CIFAR-10's resolution that two cores can train, with attention at 8x8."""
    config = digits.get_config()
    config.data.update(image_size=32, channels=3)
    config.model.update(
        channels=32, norm_groups=8, emb_channels=128, multipliers=(1, 2, 2), num_blocks=2, attention_resolutions=(8,)
    )
    config.teacher.batch_size = 32
    return from_config(config.to_dict())


def random_params(experiment, *, w_conditioned=False):
    """Weights without the zeros of the initialisation, behind which two networks could differ unseen."""
    rng = np.random.default_rng(0)
    params = initial_params(experiment, w_conditioned, jax.random.key(0))
    return jax.tree.map(lambda p: np.asarray(p) + 0.02 * rng.normal(size=p.shape).astype(np.float32), params)


def random_batch(experiment, batch_size):
    """A batch of noise with labels."""
    rng = np.random.default_rng(1)
    shape = (batch_size, *experiment.data.sample_shape)
    labels = rng.integers(0, experiment.data.num_classes, batch_size, dtype=np.int32)
    return {"x": rng.uniform(-1, 1, shape).astype(np.float32), "label": labels}


def make_step_arguments(experiment, stage, params, teacher_params, mesh=None):
    """(train step, its five arguments) of a stage."""
    mesh = mesh or sharding.make_mesh()
    training = stage.training
    step_fn = train.make_train_step(
        stage.objective, stage.model, stage.teacher, training.optimiser, mesh, training.accumulate
    )
    grid = diffusion.make_grid(experiment.schedule, experiment.stage2.teacher_steps)
    knobs = make_knobs(stage, grid)
    state = make_state(jax.tree.map(jnp.asarray, params), training.optimiser)
    frozen = {} if teacher_params is None else {"teacher": teacher_params}
    arguments = sharding.place(mesh, (state, frozen, knobs, jax.random.key(0)))
    batch = sharding.shard_batch(mesh, random_batch(experiment, training.batch_size))
    return step_fn, (*arguments[:2], batch, *arguments[2:])


def our_turn(experiment, stage, params, teacher_params):
    """A function of n that makes n updates of a stage."""
    step_fn, (state, *arguments) = make_step_arguments(experiment, stage, params, teacher_params)

    def turn(steps):
        nonlocal state
        for _ in range(steps):
            state, metrics = step_fn(state, *arguments)
            float(metrics["loss"])

    return turn


def torch_unet(experiment, *, w_conditioned):
    """The experiment's network in PyTorch, with fresh weights."""
    import torch

    from benchmarks import unet_torch

    side, _, channels = experiment.data.sample_shape
    config = dataclasses.replace(
        experiment.model,
        num_classes=experiment.data.num_classes,
        out_channels=channels,
        w_conditioned=w_conditioned,
    )
    return unet_torch.make_unet(config, side, channels).to(memory_format=torch.channels_last)


def torch_network(experiment, params, *, w_conditioned):
    """The network in PyTorch with these weights, after checking that it is the same network."""
    import torch

    from benchmarks import unet_torch

    model = torch_unet(experiment, w_conditioned=w_conditioned)
    unet_torch.load_flax(model, params)
    batch, logsnr, w = random_batch(experiment, 8), np.linspace(-5.0, 5.0, 8, dtype=np.float32), np.ones(8, np.float32)
    static = make_model(experiment, w_conditioned=w_conditioned)
    ours = jax.jit(static.model_fn)(params, batch["x"], logsnr, {"label": batch["label"], "w": w})
    x, label = torch_batch(batch)
    with torch.no_grad():
        theirs = model(x, torch.tensor(logsnr), label, torch.tensor(w)).movedim(1, -1).numpy()
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4)
    return model


def torch_batch(batch):
    """A batch as PyTorch has it: channels first, in memory last."""
    import torch

    return torch.tensor(batch["x"]).movedim(-1, 1), torch.tensor(batch["label"]).long()


def torch_step(experiment, stage, model, teacher):
    """A stage's update of a PyTorch network, taught by another, or None."""
    from benchmarks import unet_torch

    num_classes = experiment.data.num_classes
    options = {
        "learning_rate": stage.training.learning_rate,
        "decay": stage.training.ema,
        "bfloat16": experiment.model.dtype == "bfloat16",
    }
    if teacher is None:
        cond_dropout = experiment.teacher.cond_dropout
        return unet_torch.DenoisingStep(model, cond_dropout=cond_dropout, num_classes=num_classes, **options)
    options["w_max"] = stage.w_range[1]
    if stage.series:
        return unet_torch.HalvingStep(model, teacher, num_steps=stage.num_steps, **options)
    return unet_torch.GuidedStep(model, teacher, num_classes=num_classes, **options)


def torch_turns(experiment, stage, params, teacher_params):
    """{number of threads: a stage's update in PyTorch, the same work}."""
    import torch

    from benchmarks import unet_torch

    model = torch_network(experiment, params, w_conditioned=stage.model.w_conditioned)
    teacher = None
    if stage.teacher is not None:
        teacher = torch_network(experiment, teacher_params, w_conditioned=stage.teacher.w_conditioned)
    step = torch_step(experiment, stage, model, teacher)
    x, label = torch_batch(random_batch(experiment, stage.training.batch_size))

    def turn(threads, steps):
        torch.set_num_threads(threads)
        for _ in range(steps):
            step(x, label)

    return {threads: functools.partial(turn, threads) for threads in unet_torch.thread_counts()}


def print_times():
    """An update of each kind of stage beside PyTorch's with the threads that suit it best, in alternating turns."""
    print(f"updates: loss, gradient, clipping, Adam, EMA; medians of {_ROUNDS} alternating turns", flush=True)
    for name, experiment in (("8x8", digits_8x8()), ("32x32", colour_32x32())):
        teacher, student = random_params(experiment), random_params(experiment, w_conditioned=True)
        of_stage = ((teacher, None), (student, teacher), (student, student))
        for stage, weights in zip(make_stages(experiment)[:3], of_stage, strict=True):
            print_ratio(f"{name}, {stage.name}", experiment, stage, *weights)


def print_ratio(name, experiment, stage, params, teacher_params):
    """Times of one stage's update, ours and PyTorch's."""
    theirs = torch_turns(experiment, stage, params, teacher_params)
    turns = {"ours": our_turn(experiment, stage, params, teacher_params), **theirs}
    milliseconds = {who: [] for who in turns}
    for _ in range(_ROUNDS):
        for who, turn in turns.items():
            turn(1)  # the other side's threads may still spin, and its data fill the cache
            start = time.perf_counter()
            turn(_STEPS)
            milliseconds[who].append(1e3 * (time.perf_counter() - start) / _STEPS)
    median = {who: statistics.median(times) for who, times in milliseconds.items()}
    ratio = median["ours"] / min(median[threads] for threads in theirs)
    peers = ", ".join(
        f"PyTorch with {threads} thread(s) {median[threads]:.1f} ms (fastest turn {min(milliseconds[threads]):.1f})"
        for threads in theirs
    )
    millions = sum(p.size for p in jax.tree.leaves(params)) / 1e6
    print(
        f"{name}, batch {stage.training.batch_size}, {millions:.2f} M parameters: "
        f"ours {median['ours']:.1f} ms (fastest turn {min(milliseconds['ours']):.1f}), {peers}; "
        f"ratio to the faster {ratio:.2f} (at most {_MOST_TIME})",
        flush=True,
    )


def flops(function, *arguments):
    """XLA's count of the operations of a program compiled with XLA's own options, under which it counts all of them."""
    # Not of jax.value_and_grad, whose `__wrapped__` is the value alone.
    function = function.__wrapped__ if isinstance(function, jax.stages.Wrapped) else function
    # Unrolled, since a loop's body is counted once.
    with mock.patch.object(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True)):
        return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def part_flops(experiment, stage, state, teacher_params, batch):
    """{part: operations} of the parts that a distillation step cannot do without, each compiled alone."""
    x, batch_size = batch["x"], batch["x"].shape[0]
    cond = {"label": batch["label"], "w": jnp.ones(batch_size)}
    logsnr = jnp.zeros(batch_size)

    def student_loss(params, target):
        return jnp.mean((stage.model.model_fn(params, x, logsnr, cond) - target) ** 2)

    def update(state, grads):
        return optim.apply_gradients(stage.training.optimiser, state, grads, 1e-4, stage.training.updates)

    if stage.teacher.w_conditioned:
        network, inputs, calls = "two teacher forwards of B", (x, logsnr, cond), 2
    else:
        network, calls = "one teacher forward of 2B", 1
        inputs = jax.tree.map(lambda a: jnp.concatenate([a, a]), (x, logsnr, {"label": cond["label"]}))
    return {
        network: calls * flops(stage.teacher.model_fn, teacher_params, *inputs),
        "student's value and gradient": flops(jax.value_and_grad(student_loss), state.params, x),
        "optimiser": flops(update, state, state.params),
    }


def print_flops():
    """XLA's own counts of the compiled stage-1 and stage-2 steps beside the sums of their parts."""
    print("operations by XLA's own count, in MFLOP", flush=True)
    experiment = digits_8x8()
    teacher, student = random_params(experiment), random_params(experiment, w_conditioned=True)
    for stage, teacher_params in zip(make_stages(experiment)[1:3], (teacher, student), strict=True):
        step_fn, arguments = make_step_arguments(experiment, stage, student, teacher_params)
        whole = flops(step_fn, *arguments)
        parts = part_flops(experiment, stage, arguments[0], teacher_params, arguments[2])
        total = sum(parts.values())
        listed = " + ".join(f"{name} {count / 1e6:.1f}" for name, count in parts.items())
        print(
            f"{stage.name}: step {whole / 1e6:.1f}; {listed} = {total / 1e6:.1f}; "
            f"ratio {whole / total:.3f} (at most {_MOST_FLOPS})",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flops", action="store_true", help="only count operations")
    arguments = parser.parse_args()
    if not arguments.flops:
        print_times()
    print_flops()


if __name__ == "__main__":
    main()
