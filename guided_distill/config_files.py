"""Where config files are, in the current directory or among those that come with the package, and what they hold."""

import importlib.machinery
import importlib.util
import os
import pathlib
import sys

from guided_distill.errors import UserError

_PACKAGE = pathlib.Path(__file__).parent
# A wheel carries the configs within the package; in a clone, and installed from one with -e, they lie beside it.
SHIPPED = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
_NO_EXPERIMENT = ("__init__", "common")


def find(name):
    """The config file that `--config=name` means, as "path" or "path:variant", ready to be run.

    A file is taken as typed. Else `digits`, `digits.py` and `configs/digits.py` all mean the file of that name in
    configs/ of the current directory or, where there is none, of the package. Raises UserError that lists the names.
    """
    typed, colon, variant = name.partition(":")
    folder, file = os.path.split(typed)
    file = file.removesuffix(".py") + ".py"
    fallbacks = [pathlib.Path("configs", file), SHIPPED / file] if folder in ("", "configs") else []
    for path in (pathlib.Path(typed), *fallbacks):
        if path.is_file():
            _let_import_from(path.absolute().parent)
            return f"{path}{colon}{variant}"
    there = ", ".join(sorted({path.stem for path in SHIPPED.glob("*.py")} - {*_NO_EXPERIMENT}))
    raise UserError(f"--config={name}: no such file; give the path of one of your own, or one of {there}")


def load(name):
    """The ConfigDict of the config file that `--config=name` means, made for the variant where `name` has one.

    Raises UserError where there is no such file, or no such variant of it.
    """
    path, _, variant = find(name).partition(":")
    spec = importlib.util.spec_from_file_location("config", path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    try:
        return module.get_config(*filter(None, [variant]))
    except (TypeError, ValueError) as error:
        raise UserError(f"--config={name}: {why_not(name, error)}") from error


def why_not(name, error):
    """What get_config said when called for `name`; a config that has other variants lists them itself."""
    has_none = ":" in name and "get_config() takes 0" in str(error)
    return f"it comes in no variants; leave out {name[name.index(':') :]}" if has_none else str(error)


def _let_import_from(folder):
    """`from configs import x` finds x beside a config file that is in a configs/, else on the path, else in ours.

    One package of all these folders: a project's own configs/ neither hides ours nor is hidden.
    """
    spec = importlib.machinery.ModuleSpec("configs", None, is_package=True)
    own = [str(folder)] if folder.name == "configs" else []
    spec.submodule_search_locations = [*own, *(os.path.join(path, "configs") for path in sys.path), str(SHIPPED)]
    sys.modules["configs"] = importlib.util.module_from_spec(spec)
