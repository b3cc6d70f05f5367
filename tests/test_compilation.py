"""How programs for a mesh are compiled."""

import jax
import pytest

from guided_distill import compilation, sharding


@pytest.fixture(autouse=True)
def forget():
    for function in (compilation.compiler_options, compilation._accepted):
        function.cache_clear()
    yield
    for function in (compilation.compiler_options, compilation._accepted):
        function.cache_clear()


def test_programs_compile_with_the_options_of_this_machine():
    mesh = sharding.make_mesh(jax.devices()[:1])
    assert compilation.compiler_options(mesh) == compilation._ONE_CPU
    doubled = jax.jit(lambda x: 2 * x, compiler_options=compilation.compiler_options(mesh))
    assert doubled(3) == 6


def test_an_option_that_this_xla_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setattr(compilation, "_ONE_CPU", {"xla_no_such_option": "1"})
    assert compilation.compiler_options(sharding.make_mesh(jax.devices()[:1])) == {}


def test_programs_on_several_cpu_devices_are_compiled_as_xla_does():
    assert compilation.compiler_options(sharding.make_mesh(jax.devices()[:2])) == {}
