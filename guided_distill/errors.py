"""The one exception for a mistake of the user; `main` prints it as one line and exits with code 2."""


class UserError(Exception):
    """A mistake the user can mend: the message names the key or file, the value seen, and what would be right."""
