"""A trace covers the updates it was asked for, and is closed where the loop ends first."""

import jax
import pytest

from guided_distill import profiling


@pytest.fixture
def calls(monkeypatch):
    made = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda directory: made.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: made.append("stop"))
    return made


def updates_traced(calls, updates, last):
    trace, traced = profiling.make_tracer("nowhere", updates), 0
    for done in range(last + 1):
        trace(done, None, done == last)
        traced += bool(calls) and calls[-1] == "start" and done != last
    return traced


def test_as_many_updates_are_traced_as_asked_for(calls):
    assert updates_traced(calls, 3, last=50) == 3
    assert calls == ["start", "stop"]


def test_a_loop_that_ends_first_closes_the_trace(calls):
    assert updates_traced(calls, 30, last=9) == 4
    assert calls == ["start", "stop"]


@pytest.mark.parametrize(("updates", "last"), [(0, 50), (3, 2), (3, 5)])
def test_no_trace_is_begun_in_vain(calls, updates, last):
    updates_traced(calls, updates, last)
    assert calls == []


def test_a_real_trace_is_written(tmp_path):
    step = jax.jit(lambda x: jax.lax.fori_loop(0, 50, lambda _, x: jax.numpy.tanh(x @ x), x))
    trace, state = profiling.make_tracer(tmp_path, 3), jax.numpy.eye(128)
    for done in range(12):
        trace(done, state, False)
        state = step(state)  # dispatched, and not waited for
    (trace,) = tmp_path.rglob("*.xplane.pb")
    events = [
        event
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
    ]
    assert sum("tanh" in event.name or "dot" in event.name for event in events) >= 3 * 50
