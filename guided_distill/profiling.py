"""A trace of a few updates, for XProf: what the devices and the host do, and when."""

import os

import jax

_AFTER = 5  # updates that are not traced: the first compiles, and the next fill the queue


def make_tracer(directory, updates):
    """(updates since the start, whether the loop ends) -> None, to be called before every update.

    Traces `updates` of them into `directory` (`xprof DIRECTORY` shows it); does nothing where they are 0.
    """
    tracing = False

    def trace(done, ends):
        nonlocal tracing
        if tracing and (ends or done == _AFTER + updates):
            jax.profiler.stop_trace()
            tracing = False
        elif updates and done == _AFTER and not ends:
            jax.profiler.start_trace(os.fspath(directory))
            tracing = True

    return trace
