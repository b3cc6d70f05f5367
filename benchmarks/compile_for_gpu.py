"""How long the step of a stage takes to compile for a GPU that is not there, and into how many kernels.

    pip install "jax[cuda13]"      # of jax 0.11, in an environment of its own
    python -m benchmarks.compile_for_gpu --config=cifar10_small --stage=teacher [--batch=256] [--set KEY=VALUE]

For an H200. Nothing is autotuned, which a compilation on the GPU does besides, and attention is XLA's in place of
cuDNN's. With XLA_FLAGS=--xla_gpu_enable_triton_gemm=false products are cuBLAS's.
"""

import collections
import os
import re
import time

os.environ["JAX_PLATFORMS"] = "cpu"

# ruff: noqa: E402
import jax
from jax._src import xla_bridge  # there is no other way to name a platform without a device
from jax.experimental import topologies

from benchmarks import plain_errors
from benchmarks.config_step import changes_of, load, make_parser
from guided_distill import sharding
from guided_distill.plan import ahead

# As XLA asks of the device where there is one; memory in bytes and bytes/s of NVIDIA's H200 data sheet.
_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 device_memory_size: 141000000000
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA" device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 minor: 0 patch: 0 }
"""


def h200():
    """The one device of a topology that is not there."""
    canonical = xla_bridge.canonicalize_platform

    def known(platform):
        try:
            return canonical(platform)
        except RuntimeError:
            return "cuda"

    xla_bridge.canonicalize_platform = known
    return topologies.get_topology_desc(platform="cuda", target_config=_H200, topology="1x1x1").devices[0]


def main():
    """Prints seconds, memory and kernels."""
    arguments = make_parser(__doc__).parse_args()
    with plain_errors():
        experiment, stage, parent = load(arguments.config, arguments.stage, arguments.batch, changes_of(arguments.set))
    stages = [one for one in (parent, stage) if one is not None]
    lower = dict(ahead.programs(experiment, stages, sharding.make_mesh([h200()])))[stage.name]
    lowered = lower()
    began, processor = time.perf_counter(), os.times()
    compiled = lowered.compile()
    # ptxas runs in processes of its own.
    spent = sum(after - before for after, before in zip(os.times()[:4], processor[:4], strict=True))
    took = time.perf_counter() - began
    print(f"{arguments.config}, {stage.name}, batch {stage.training.batch_size}, jax {jax.__version__}: compiled in "
          f"{took:.0f} s, {spent:.0f} s of the processor")  # fmt: skip
    memory = compiled.memory_analysis()
    arguments_mib, temporaries = memory.argument_size_in_bytes / 2**20, memory.temp_size_in_bytes / 2**20
    print(f"arguments {arguments_mib:,.0f} MiB, temporaries {temporaries:,.0f} MiB")
    found = collections.Counter(re.findall(r" (fusion|custom-call)\(", compiled.as_text()))
    print(f"{found['fusion']:,} fusions, {found['custom-call']:,} calls of libraries")


if __name__ == "__main__":
    main()
