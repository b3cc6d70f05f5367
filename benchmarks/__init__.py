"""Programs that print measured figures; run as `python -m benchmarks.<name>`."""

import contextlib
import sys

from guided_distill.errors import UserError


@contextlib.contextmanager
def plain_errors():
    """Ends the process with the one line and the exit code of a UserError, as `guided_distill.main` does."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
