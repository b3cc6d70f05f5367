"""The exceptions that `main` prints as one line, and the exit codes it ends with."""


class UserError(Exception):
    """A mistake the user can mend: the message names the key or file, the value seen, and what would be right."""

    exit_code = 2


class Fault(UserError):
    """The machine's fault, such as a full disk: the message says what to look after; the same command then goes on."""

    exit_code = 1


class Stopped(SystemExit):
    """Ends a process that was told to stop. Not an Exception: who handles a damaged file must not take it for one."""

    exit_code = 75  # sysexits.h: a temporary failure, to be tried again; no shell, Python or JAX ends with it by itself

    def __init__(self):
        super().__init__(self.exit_code)
