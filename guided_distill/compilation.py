"""How programs are compiled where XLA's defaults are slow, and kept so that a second start compiles none of them."""

import functools
import os

import jax

from guided_distill.files import cache_directory

# Of dots and reductions alone, XLA's CPU library for them takes less time than of all it would do by default: a U-Net's
# training step at 32x32 takes four fifths, sampling two thirds (jax 0.10.2; benchmarks/train_step.py).
_ONE_CPU = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"}


def keep_programs():
    """Keeps compiled programs on disk: where JAX_COMPILATION_CACHE_DIR says, or in the user's cache directory."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "programs"))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            # A run on the CPU has many small ones.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@functools.cache
def compiler_options(mesh):
    """Options for `jax.jit` on a mesh: {} unless it is one CPU device, and its XLA knows the option.

    On several CPU devices of one process, where programs run at the same time, about half of the sampled batches had
    their first rows overwritten with this option, and with the library switched off, and none with XLA's default
    (jaxlib 0.10.2; two unconnected programs at once will do).
    """
    return dict(_ONE_CPU) if mesh.size == 1 and mesh.devices.flat[0].platform == "cpu" and _accepted() else {}


@functools.cache
def _accepted():
    # The option is experimental: another release of XLA may have another name for it, and refuse this one.
    try:
        jax.jit(lambda: 0, compiler_options=_ONE_CPU).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
