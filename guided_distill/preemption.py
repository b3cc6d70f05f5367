"""Being told to stop: SIGTERM, which schedulers send some time before they kill.

A single process notes it by a handler of its own. Of several, JAX's preemption service takes it, and finds a call of
`asked` that none of them has come to yet.
"""

import contextlib
import itertools
import signal

import jax
from jax.experimental import multihost_utils

from guided_distill.errors import Stopped

_state = {"asked": False, "deferred": False}
_calls = itertools.count(1)


def listen():
    """From now on SIGTERM raises `Stopped`, at once or, inside `deferred`, where the caller asks; a second one kills.

    After `distributed.initialise`. Does nothing among several processes, where JAX listens.
    """
    if not jax.distributed.is_initialized():
        _state.update(asked=False, deferred=False)
        signal.signal(signal.SIGTERM, _on_signal)


def _on_signal(number, frame):
    signal.signal(number, signal.SIG_DFL)
    _state["asked"] = True
    if not _state["deferred"]:
        raise Stopped


@contextlib.contextmanager
def deferred():
    """Inside, SIGTERM is noted and nothing else: whoever enters looks at `asked`, saves, and raises `Stopped`;
    otherwise leaving does."""
    _state["deferred"] = True
    try:
        yield
    finally:
        _state["deferred"] = False
    if _state["asked"]:
        raise Stopped


def asked():
    """Whether to stop here: True on all processes at the same call, which all must therefore make equally often.

    No process waits for another, unless one of them has been told to stop.
    """
    if jax.distributed.is_initialized():
        return multihost_utils.reached_preemption_sync_point(next(_calls))
    return _state["asked"]


def stop_if_asked():
    """Raises `Stopped` where `asked` says so: for work of which nothing needs to be saved."""
    if asked():
        raise Stopped
