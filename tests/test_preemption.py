"""SIGTERM: what it ends at once, what it lets be saved first, and what a second one does."""

import os
import signal
import subprocess
import sys

import pytest

from guided_distill import preemption
from guided_distill.errors import Stopped


@pytest.fixture
def listening():
    before = signal.getsignal(signal.SIGTERM)
    preemption.listen()
    yield
    preemption.listen()  # forgets that it was told
    signal.signal(signal.SIGTERM, before)


def told():
    os.kill(os.getpid(), signal.SIGTERM)


def test_outside_of_training_it_stops_at_once_and_is_no_exception_that_a_reader_catches(listening):
    with pytest.raises(Stopped) as stopped:
        try:
            told()
        except Exception:
            pytest.fail("taken for a damaged file")
    assert stopped.value.code == 75


def test_inside_deferred_it_is_noted_and_leaving_raises(listening):
    with pytest.raises(Stopped), preemption.deferred():
        assert not preemption.asked()
        told()
        assert preemption.asked()
    with pytest.raises(Stopped):
        preemption.stop_if_asked()


def test_nothing_happens_unasked(listening):
    with preemption.deferred():
        preemption.stop_if_asked()


def test_a_second_one_kills():
    program = (
        "import os, signal, time\nfrom guided_distill import preemption\npreemption.listen()\n"
        "with preemption.deferred():\n"
        "    for _ in range(2):\n        os.kill(os.getpid(), signal.SIGTERM)\n        print('noted', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "noted\n"), done.stderr
