"""How programs are compiled where XLA's defaults are slow."""

import functools

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
