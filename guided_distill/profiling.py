"""A trace of a few updates, for XProf: what the devices and the host do, and when."""

import os

import jax

_AFTER = 5  # updates that are not traced: the first compiles, and the next fill the queue


def make_tracer(directory, updates):
    """(updates since the start, the state after them, whether the loop ends) -> None, to be called before every update.

    Traces `updates` of them into `directory` (`xprof DIRECTORY` shows it); does nothing where they are 0.
    """
    tracing = False

    def trace(done, state, ends):
        nonlocal tracing
        # Updates are dispatched ahead of the devices: without waiting for these the trace would hold none of them.
        if tracing and (ends or done == _AFTER + updates):
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            tracing = False
        elif updates and done == _AFTER and not ends:
            jax.block_until_ready(state)
            jax.profiler.start_trace(os.fspath(directory))
            tracing = True

    return trace
