"""torch-fidelity's metrics, of features that are there already: what ours are compared with."""

import importlib
import importlib.util
import sys
import types
from unittest import mock


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
    names = {key for key in sys.modules if key.split(".")[0] == "torch_fidelity"}
    with mock.patch.dict(sys.modules):
        for key in names:
            del sys.modules[key]
        sys.modules |= {"torch_fidelity": package, "torch_fidelity.utils": _Unused("torch_fidelity.utils")}
        return importlib.import_module(f"torch_fidelity.metric_{name}")
