"""Devices, what lies on them and how programs for them are compiled."""

import jax
import pytest

from guided_distill import sharding


@pytest.fixture(autouse=True)
def forget():
    for function in (sharding.compiler_options, sharding._accepted):
        function.cache_clear()
    yield
    for function in (sharding.compiler_options, sharding._accepted):
        function.cache_clear()


def test_programs_compile_with_the_options_of_this_machine():
    mesh = sharding.make_mesh(jax.devices()[:1])
    assert sharding.compiler_options(mesh) == sharding._ONE_CPU
    doubled = jax.jit(lambda x: 2 * x, compiler_options=sharding.compiler_options(mesh))
    assert doubled(3) == 6


def test_an_option_that_this_xla_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setattr(sharding, "_ONE_CPU", {"xla_no_such_option": "1"})
    assert sharding.compiler_options(sharding.make_mesh(jax.devices()[:1])) == {}


def test_programs_on_several_cpu_devices_are_compiled_as_xla_does():
    assert sharding.compiler_options(sharding.make_mesh(jax.devices()[:2])) == {}
