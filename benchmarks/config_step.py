"""One stage of a shipped config on the devices at hand: compilation, memory, time, MFU; and the same step in PyTorch.

    python -m benchmarks.config_step --config=imagenet64 --stage=stage2_det_0512 --batch=128 --set model.remat=False
    ... --peer           PyTorch too, in a process of its own after ours, on the same device
    ... --trace=DIR      a trace of three updates for XProf, and what takes longest in it
    ... --updates=0      compiles, and says what memory that takes

Weights and images are random: time does not depend on them.
"""

import argparse
import ast
import collections
import dataclasses
import glob
import importlib
import statistics
import subprocess
import sys
import time

_WARM, _TRACED, _SHOWN = 3, 3, 15


def load(name, stage_name, batch_size, changes):
    """(experiment, stage, the stage that teaches it or None) of configs/<name>.py with some values exchanged."""
    from guided_distill.experiment import from_config
    from guided_distill.stages import make_stages

    config = importlib.import_module(f"configs.{name}").get_config()
    for group in ("teacher", "stage1", "stage2"):
        config[group].batch_size = batch_size or config[group].batch_size
    config.update_from_flattened_dict(changes)
    experiment = from_config(config.to_dict())
    stages = {stage.name: stage for stage in make_stages(experiment)}
    stage = stages[stage_name]
    return experiment, stage, stages.get(stage.parent)


def ours(experiment, stage, parent, updates, trace):
    """Compiles and times our step, and traces it."""
    import jax

    from benchmarks.train_step import make_step_arguments
    from guided_distill import compilation
    from guided_distill.chips import peak_flops
    from guided_distill.teachers import flops_of_a_call

    compilation.keep_programs()
    params, theirs = (None if one is None else _random_params(experiment, one.model) for one in (stage, parent))
    step_fn, arguments = make_step_arguments(experiment, stage, params, theirs)
    del params, theirs
    began = time.perf_counter()
    compiled = step_fn.lower(*arguments).compile()
    print(f"compiled in {time.perf_counter() - began:.1f} s", flush=True)
    memory, state, rest = compiled.memory_analysis(), arguments[0], arguments[1:]
    del arguments
    for what in ("argument", "temp", "output", "alias"):
        print(f"{what}: {getattr(memory, f'{what}_size_in_bytes') / 2**20:,.0f} MiB of a device", flush=True)
    if not updates:
        return
    seconds = []
    for _ in range(_WARM + updates):
        start = time.perf_counter()
        state, metrics = compiled(state, *rest)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    step, device = statistics.median(seconds[_WARM:]), jax.devices()[0]
    flops = stage.work_per_update * flops_of_a_call(stage.model, stage.init) / jax.device_count()
    peak = peak_flops(device, experiment.model.dtype)
    share = "not known" if peak is None else f"{flops / step / peak:.1%} of {peak / 1e12:.0f} TFLOP/s"
    print(f"{jax.device_count()} x {device.device_kind}: {1e3 * step:.1f} ms a step, {flops / step / 1e12:.3g} TFLOP/s")
    print(f"MFU: {share}; {stage.training.batch_size / step:.1f} images/s", flush=True)
    most = (device.memory_stats() or {}).get("peak_bytes_in_use")
    print(f"most memory in use: {'not known' if most is None else f'{most / 2**20:,.0f} MiB'}", flush=True)
    if trace:
        with jax.profiler.trace(trace):
            for _ in range(_TRACED):
                state, metrics = compiled(state, *rest)
            jax.block_until_ready(state)
        print_costs(trace)


def _random_params(experiment, model):
    """Weights without the zeros of the initialisation, none of which is computed: a GPU compiles for minutes to draw
    them, and 300 M take NumPy half a minute."""
    import jax
    import numpy as np

    from guided_distill.teachers import initial_params

    shapes = jax.eval_shape(lambda: initial_params(experiment, model.w_conditioned, jax.random.key(0)))
    drawn = np.float32(0.02) * np.random.default_rng(0).standard_normal(2**20, np.float32)
    return jax.tree.map(lambda leaf: np.resize(drawn, leaf.shape), shapes)


def print_costs(directory):
    """What takes longest of a trace: kernels of the devices by name, and all of them by kind."""
    from jax.profiler import ProfileData

    path = max(glob.glob(f"{directory}/**/*.xplane.pb", recursive=True))  # the newest: its folder is named by the time
    kernels, kinds = collections.Counter(), collections.Counter()
    for plane in ProfileData.from_file(path).planes:
        if not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                found = dict(event.stats)
                kernels[event.name, str(found.get("hlo_op", ""))] += event.duration_ns
                kinds[_kind(event.name, str(found.get("tf_op", found.get("name", ""))))] += event.duration_ns
    total = sum(kinds.values())
    if not total:
        print("the trace names no kernels of this device", flush=True)
        return
    print(f"device busy {total / 1e6 / _TRACED:.1f} ms an update; by kind:")
    for kind, took in kinds.most_common():
        print(f"  {took / total:6.1%}  {took / 1e6 / _TRACED:8.2f} ms  {kind}")
    print("by kernel:")
    for (kernel, operation), took in kernels.most_common(_SHOWN):
        print(f"  {took / total:6.1%}  {took / 1e6 / _TRACED:8.2f} ms  {kernel[:90]}  {operation[:40]}", flush=True)


def _kind(kernel, source):
    """Of what kind a kernel is, by its name and the operation of ours it comes from."""
    kernel, source = kernel.lower(), source.lower()
    if "fmha" in kernel or "flash" in kernel or ("sdpa" in kernel):
        return "attention (cuDNN)"
    if any(word in kernel for word in ("conv", "xmma_fprop", "xmma_dgrad", "xmma_wgrad", "fprop", "dgrad", "wgrad")):
        return "convolutions"
    if "convert" not in kernel and any(word in kernel for word in ("gemm", "cublas", "cutlass", "nvjet")):
        return "matrix products"
    if "memcpy" in kernel or "memset" in kernel:
        return "copies"
    if "transpose" in kernel:
        return "transposes"
    return "reductions and fused elementwise" if "fusion" in kernel or "loop" in kernel else "other"


def theirs(experiment, stage, parent, updates):
    """Times the same step in PyTorch: as it is written, and compiled."""
    import torch

    from benchmarks import unet_torch
    from benchmarks.train_step import random_batch, torch_batch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True

    def network(model):
        side, _, channels = experiment.data.sample_shape
        config = dataclasses.replace(
            experiment.model,
            num_classes=experiment.data.num_classes,
            out_channels=channels,
            w_conditioned=model.w_conditioned,
        )
        made = unet_torch.make_unet(config, side, channels).to(device, memory_format=torch.channels_last)
        print(f"PyTorch {torch.__version__}: {sum(p.numel() for p in made.parameters()):,} parameters", flush=True)
        return made

    training, num_classes = stage.training, experiment.data.num_classes
    options = {
        "learning_rate": training.learning_rate,
        "decay": training.optimiser.ema,
        "bfloat16": experiment.model.dtype == "bfloat16",
    }
    x, label = (values.to(device) for values in torch_batch(random_batch(experiment, training.batch_size)))

    def make_step(wrap):
        model = wrap(network(stage.model))
        if stage.teacher is None:
            options["cond_dropout"] = experiment.teacher.cond_dropout
            return unet_torch.DenoisingStep(model, num_classes=num_classes, **options)
        options["w_max"], teacher = stage.w_range[1], wrap(network(parent.model).requires_grad_(False))
        if stage.series:
            return unet_torch.HalvingStep(model, teacher, num_steps=stage.num_steps, **options)
        return unet_torch.GuidedStep(model, teacher, num_classes=num_classes, **options)

    for name, wrap in (("as it is", lambda model: model), ("torch.compile", torch.compile)):
        began, seconds = time.perf_counter(), []
        step = make_step(wrap)
        for _ in range(_WARM + updates):
            start = time.perf_counter()
            step(x, label)
            seconds.append(time.perf_counter() - start)
            if len(seconds) == 1:
                print(f"PyTorch, {name}: the first update after {start - began + seconds[0]:.1f} s", flush=True)
        took = statistics.median(seconds[_WARM:])
        print(f"PyTorch, {name}: {1e3 * took:.1f} ms a step, {training.batch_size / took:.1f} images/s", flush=True)
        if device == "cuda":
            print(f"PyTorch, {name}: at most {torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB", flush=True)
        del step
        _clear(torch)


def _clear(torch):
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _changes(settings):
    """{key: value} of "key=value", the values as Python's literals."""
    return {key: ast.literal_eval(value) for key, _, value in (setting.partition("=") for setting in settings)}


def main():
    """Each side in a process of its own, so that the memory of one is not the other's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the stem of a file in configs/")
    parser.add_argument("--stage", default="stage1")
    parser.add_argument("--batch", type=int, help="in place of the config's own")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another value of the config")
    parser.add_argument("--updates", type=int, default=10, help="that are timed")
    parser.add_argument("--trace", metavar="DIR")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side is None:
        for side in ("ours", "peer")[: 1 + arguments.peer]:
            command = [sys.executable, "-m", "benchmarks.config_step", *sys.argv[1:], f"--side={side}"]
            subprocess.run(command, check=True)
        return
    experiment, stage, parent = load(arguments.config, arguments.stage, arguments.batch, _changes(arguments.set))
    if arguments.side == "peer":
        theirs(experiment, stage, parent, arguments.updates)
        return
    settings = " ".join(arguments.set)
    print(f"{arguments.config}, {stage.name}, batch {stage.training.batch_size}, {experiment.model.dtype} {settings}")
    ours(experiment, stage, parent, arguments.updates, arguments.trace)


if __name__ == "__main__":
    main()
