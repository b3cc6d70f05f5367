"""Flags of XLA for tests, which compile far longer than they compute."""

import importlib.metadata

# Without LLVM's optimiser programs compile twice as fast, and without what replaced the older emitters of fusions in a
# further quarter less of a test's time. XLA ends a process that gives it a flag it does not know, as 0.11 this one.
COMPILED_QUICKLY = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    COMPILED_QUICKLY += " --xla_cpu_use_fusion_emitters=false"
