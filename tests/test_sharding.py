"""Devices and what lies on them."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax
from guided_distill import sharding
sharding.one_cpu_device_per_core({sizes})
print(jax.device_count())
"""


@pytest.mark.parametrize(("sizes", "divides"), [((64, 32), 32), ((64, 9), 1)])
def test_cores_are_devices_as_many_as_divide_the_batches(sizes, divides):
    cores = len(os.sched_getaffinity(0))
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(sizes=sizes)], env=environment, capture_output=True, text=True
    )
    assert int(done.stdout) == max(n for n in range(1, cores + 1) if divides % n == 0), done.stderr
