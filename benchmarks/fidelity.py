"""torch-fidelity's metrics, of features that are there already: what ours are compared with."""

import importlib
import importlib.util
import sys
import types


class _Unused(types.ModuleType):
    """A module of which any name can be imported and none is used."""

    def __getattr__(self, name):
        return None


def metric(name):
    """The module `metric_<name>` of torch-fidelity: fid, isc, kid or prc.

    Its package and its `utils` are kept out: they import a torchvision that fits one version of PyTorch alone, to read
    images, which no metric of features does.
    """
    package = types.ModuleType("torch_fidelity")
    package.__path__ = list(importlib.util.find_spec("torch_fidelity").submodule_search_locations)
    before = _loaded()
    _forget()
    sys.modules |= {"torch_fidelity": package, "torch_fidelity.utils": _Unused("torch_fidelity.utils")}
    try:
        return importlib.import_module(f"torch_fidelity.metric_{name}")
    finally:
        _forget()
        sys.modules.update(before)


def _loaded():
    return {key: value for key, value in sys.modules.items() if key.split(".")[0] == "torch_fidelity"}


def _forget():
    for key in _loaded():
        del sys.modules[key]
