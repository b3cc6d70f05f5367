"""A run that stops in the middle, as if it were killed."""

from guided_distill import train

_MAKE = train.make_train_step


class Stopped(Exception):
    """Raised in place of the update that would come next."""


def stop_after(monkeypatch, updates):
    """From now on all stages together make `updates` updates, probes among them, and then raise Stopped."""
    left = [updates]

    def stopping(*arguments):
        step = _MAKE(*arguments)

        def counted(*rest):
            left[0] -= 1
            if left[0] < 0:
                raise Stopped
            return step(*rest)

        return counted

    monkeypatch.setattr(train, "make_train_step", stopping)
