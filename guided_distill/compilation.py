"""How programs are compiled and spread over cores where XLA's defaults are slow."""

import functools
import math
import os

import jax

# XLA hands CPU convolutions to a library that uses one core. With dots and reductions alone left to it, a U-Net's
# training step at 32x32 takes two thirds of the time on two cores (jax 0.10.2; benchmarks/train_step.py).
_CPU = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"}


@functools.cache
def compiler_options(mesh):
    """Options for `jax.jit` on the devices of a mesh: {} everywhere but on CPUs whose XLA knows the option."""
    return dict(_CPU) if mesh.devices.flat[0].platform == "cpu" and _accepted() else {}


@functools.cache
def _accepted():
    # The option is experimental: another release of XLA may have another name for it, and refuse this one.
    try:
        jax.jit(lambda: 0, compiler_options=_CPU).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def one_cpu_device_per_core(batch_sizes):
    """Makes JAX see the cores of a CPU as devices, as many as divide all `batch_sizes`. Call before JAX is used.

    A network that is split over devices keeps all cores at work; one that is not leaves most of them idle between its
    convolutions (on two cores, the digits' update takes two thirds of the time). Accelerators are not touched, nor is a
    number of devices that XLA_FLAGS sets.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    shared = math.gcd(*batch_sizes)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", max(n for n in range(1, cores + 1) if shared % n == 0))
