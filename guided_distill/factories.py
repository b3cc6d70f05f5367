"""Functions of the user's own, named in a config as "package.module:function"."""

import importlib

from guided_distill.errors import UserError


def is_factory(name: str) -> bool:
    """Whether `name` has the form of "package.module:function"; TFDS's own "name:1.0.0" has not."""
    module_name, _, function_name = name.partition(":")
    return function_name.isidentifier() and all(part.isidentifier() for part in module_name.split("."))


def call_factory(name: str, key: str):
    """What the function `name` ("package.module:function", called without arguments) returns.

    `key` is the config key that names it. Raises UserError where there is no such module or function; what the
    function itself raises is its author's business and comes through.
    """
    if not is_factory(name):
        raise UserError(f"{key}: {name!r} must have the form package.module:function")
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        # A module that is there and imports another that is not would be misnamed by "no such module".
        raise UserError(
            f"{key}: {name!r} names the module {module_name!r}, which cannot be imported from here ({error})"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{key}: {name!r}: the module {module_name!r} has no function {function_name!r}")
    return function()
