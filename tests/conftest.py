"""The machine the tests run on: eight virtual CPU devices, strict about rank promotion, compiled programs kept on disk.

All of it goes through the environment, before jax is first imported, so that programs started by a test have it too.
"""

import os
import socket
from pathlib import Path

import pytest
from quickly import COMPILED_QUICKLY

# Eight devices share few cores: one may reach a collective so long after the others that XLA would abort the process.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        COMPILED_QUICKLY,
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
        "--xla_cpu_collective_timeout_seconds=600",
    ]
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"


@pytest.fixture(scope="session")
def free_port():
    """() -> a port of this machine that nobody listens at."""

    def find():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    return find
