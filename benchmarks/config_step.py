"""One stage of a shipped config on the devices at hand: compilation, memory, time, MFU; and the same step in PyTorch.

    python -m benchmarks.config_step --config=imagenet64 --stage=stage2_det_0512 --batch=128 --set model.remat=False
    ... --peer           PyTorch too, in a process of its own after ours, on one device of the same kind
    ... --trace=DIR      a trace of three updates for XProf, and what takes longest in it
    ... --updates=0      compiles alone, and says how long that takes, with no program kept from before, and what memory

Of pictures with labels. Weights and images are random: time does not depend on them. PyTorch's step is that of
benchmarks/unet_torch.py: it always clips x_hat, and knows no weight decay, accumulation or rematerialisation. That the
networks are the same is tested in tests/parity.
"""

import argparse
import ast
import collections
import glob
import statistics
import subprocess
import sys
import time

from benchmarks import plain_errors

_WARM, _TRACED, _SHOWN = 3, 3, 15


def load(name, stage_name, batch_size, changes):
    """(experiment, stage, the stage that teaches it or None) of a config with some values exchanged. Raises UserError.

    `name` is the config's, or its file's, and may end in its variant, as in cifar10_small:cores.
    """
    from guided_distill import config_files
    from guided_distill.errors import UserError
    from guided_distill.experiment import from_config
    from guided_distill.models.unet import UNetConfig
    from guided_distill.stages import make_stages

    config = config_files.load(name)
    for group in ("teacher", "stage1", "stage2"):
        config[group].batch_size = batch_size or config[group].batch_size
    config.update_from_flattened_dict(changes)
    experiment = from_config(config.to_dict())
    stages = {stage.name: stage for stage in make_stages(experiment)}
    if stage_name not in stages:
        raise UserError(f"--stage={stage_name} is not one of {', '.join(stages)}")
    if (
        len(experiment.data.sample_shape) != 3
        or experiment.data.text_length
        or not isinstance(experiment.model, UNetConfig)
    ):
        raise UserError(f"--config={name}: only U-Nets of pictures with labels are timed here")
    return experiment, stages[stage_name], stages.get(stages[stage_name].parent)


def ours(experiment, stage, parent, updates, trace):
    """Compiles and times our step, and traces it."""
    import jax

    from benchmarks.train_step import make_step_arguments
    from guided_distill import compilation, costs, sharding
    from guided_distill.chips import peak_flops
    from guided_distill.teachers import flops_of_a_call

    if updates:
        compilation.keep_programs()
    mesh = sharding.make_mesh(fsdp=experiment.mesh.fsdp)
    sharding.check_batch(mesh, "--batch", stage.training.batch_size, stage.training.accumulate)
    params, theirs = (None if one is None else _random_params(experiment, one.model) for one in (stage, parent))
    step_fn, arguments = make_step_arguments(experiment, stage, params, theirs, mesh)
    del params, theirs
    # Counted from shapes, recomputation in it; the parts are three passes of the student and what the teacher is asked.
    whole = costs.cost_of(step_fn.__wrapped__, *arguments).flops
    parts = stage.work_per_update * flops_of_a_call(stage.model, stage.init)
    began = time.perf_counter()
    compiled = step_fn.lower(*arguments).compile()
    how = "compiled, or found where programs are kept," if updates else "compiled"
    print(f"{how} in {time.perf_counter() - began:.1f} s", flush=True)
    print(f"operations: {whole / 1e12:.4g} TFLOP an update, {whole / parts:.3f} times those of its parts", flush=True)
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
    flops = parts / jax.device_count()
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
    """What takes longest of a trace on the first GPU: kernels by name, and all of them by kind."""
    from jax.profiler import ProfileData

    path = max(glob.glob(f"{directory}/**/*.xplane.pb", recursive=True))  # the newest: its folder is named by the time
    kernels, kinds = collections.Counter(), collections.Counter()
    for plane in ProfileData.from_file(path).planes:
        if plane.name != "/device:GPU:0":
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                kernels[event.name, str(dict(event.stats).get("hlo_op", ""))] += event.duration_ns
                kinds[kind_of(event.name)] += event.duration_ns
    total = sum(kinds.values())
    if not total:
        print("the trace holds no kernels of a GPU: look at it with XProf", flush=True)
        return
    print(f"kernels take {total / 1e6 / _TRACED:.1f} ms an update; by kind:")
    for kind, took in kinds.most_common():
        print(f"  {took / total:6.1%}  {took / 1e6 / _TRACED:8.2f} ms  {kind}")
    print("by kernel:")
    for (kernel, operation), took in kernels.most_common(_SHOWN):
        print(f"  {took / total:6.1%}  {took / 1e6 / _TRACED:8.2f} ms  {kernel[:90]}  {operation[:40]}", flush=True)


def kind_of(kernel):
    """Of what kind a kernel is, by the names that cuDNN, cuBLAS and XLA give theirs."""
    name = kernel.lower().replace("convert", "")

    def has(*words):
        return any(word in name for word in words)

    if has("fmha", "flash", "sdpa"):
        return "attention by cuDNN"
    if has("conv", "fprop", "dgrad", "wgrad"):
        return "convolutions"
    if has("gemm", "cublas", "cutlass", "nvjet"):
        return "matrix products"
    if has("memcpy", "memset", "nchwtonhwc", "nhwctonchw", "transpose"):
        return "copies and transposes"
    return "XLA's fusions" if has("fusion", "wrapped", "loop", "reduce", "triton") else "other"


def theirs(experiment, stage, parent, updates):
    """Times the same step in PyTorch: as it is written, and compiled."""
    import torch

    from benchmarks.train_step import random_batch, torch_batch, torch_step, torch_unet

    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"PyTorch {torch.__version__} on {torch.cuda.get_device_name() if device == 'cuda' else 'the CPU'}")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True

    def network(model):
        return torch_unet(experiment, w_conditioned=model.w_conditioned).to(device)

    batch_size = stage.training.batch_size
    x, label = (values.to(device) for values in torch_batch(random_batch(experiment, batch_size)))
    for name, wrap in (("as it is", lambda model: model), ("torch.compile", torch.compile)):
        began, seconds = time.perf_counter(), []
        teacher = None if parent is None else wrap(network(parent.model).requires_grad_(False))
        step = torch_step(experiment, stage, wrap(network(stage.model)), teacher)
        for _ in range(_WARM + updates):
            start = time.perf_counter()
            step(x, label)
            seconds.append(time.perf_counter() - start)
            if len(seconds) == 1:
                print(f"PyTorch, {name}: the first update after {time.perf_counter() - began:.1f} s", flush=True)
        took = statistics.median(seconds[_WARM:])
        print(f"PyTorch, {name}: {1e3 * took:.1f} ms a step, {batch_size / took:.1f} images/s", flush=True)
        del step, teacher
        if device == "cuda":
            print(f"PyTorch, {name}: at most {torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB", flush=True)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def changes_of(settings):
    """{key: value} of "key=value"; values as Python's literals, words as they stand."""
    return {key: _literal(value) for key, _, value in (setting.partition("=") for setting in settings)}


def _literal(value):
    try:
        return ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return value


def make_parser(description):
    """Of the options that name a stage of a config."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a config by name or file, as digits or x.py:variant")
    parser.add_argument("--stage", default="stage1")
    parser.add_argument("--batch", type=int, help="in place of the config's own")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another value of the config")
    return parser


def main():
    """Each side in a process of its own, so that the memory of one is not the other's."""
    parser = make_parser(__doc__)
    parser.add_argument("--updates", type=int, default=10, help="that are timed")
    parser.add_argument("--trace", metavar="DIR")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.updates and (arguments.peer or arguments.trace):
        parser.error("--updates=0 compiles alone: there is nothing to trace or to compare")
    if arguments.side is None:
        for side in ("ours", "peer")[: 1 + arguments.peer]:
            command = [sys.executable, "-m", "benchmarks.config_step", *sys.argv[1:], f"--side={side}"]
            if code := subprocess.run(command).returncode:
                sys.exit(code)
        return

    with plain_errors():
        experiment, stage, parent = load(arguments.config, arguments.stage, arguments.batch, changes_of(arguments.set))
        if arguments.side == "peer":
            theirs(experiment, stage, parent, arguments.updates)
            return
        settings = " ".join(arguments.set)
        print(
            f"{arguments.config}, {stage.name}, batch {stage.training.batch_size}, {experiment.model.dtype} {settings}"
        )
        ours(experiment, stage, parent, arguments.updates, arguments.trace)


if __name__ == "__main__":
    main()
