"""Files of weights of other projects as arrays by their keys: safetensors, and PyTorch's without running any code."""

import contextlib

import jax
import numpy as np
import safetensors

from guided_distill.errors import UserError

_EXTRA = "pip install 'guided_distill[eval]'"


class _Unread:
    """What a checkpoint holds besides tensors: made and filled as the file says, and nothing of it is kept or run."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


# What the published checkpoints of Stable Diffusion and LDM name besides tensors, as Lightning left it in them: the
# class of a callback, a key there, and its best loss, a number of NumPy. Each is read as _Unread, never imported.
_BESIDES = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
)


def read_weights(path):
    """{key: array} of a .safetensors file or a checkpoint of PyTorch, where it may lie under "state_dict".

    Raises UserError for a file that is missing, damaged, or holds something else than tensors.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def read_safetensors(path):
    """{key: array} of a safetensors file; bfloat16 too. Raises UserError for a damaged one."""
    # Through JAX's arrays on the host: NumPy's own reader does not know bfloat16.
    with jax.default_device(jax.local_devices(backend="cpu")[0]), opened_safetensors(path, "flax") as file:
        return {key: np.asarray(file.get_tensor(key)) for key in file.keys()}


@contextlib.contextmanager
def opened_safetensors(path, framework):
    """A safetensors file, open to be read as arrays of `framework`. Raises UserError for a damaged one."""
    try:
        with safetensors.safe_open(path, framework) as file:
            yield file
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is no whole safetensors file ({error}); make or download it again") from error


def _read_torch(path):
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path} is a file of PyTorch, which is not installed: {_EXTRA}") from error
    try:
        with torch.serialization.safe_globals([(_Unread, name) for name in _BESIDES]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and PyTorch each raise their own
        said = str(error).split("WeightsUnpickler error: ")[-1].strip()  # before it stands advice to run what is there
        reason = (said or type(error).__name__).splitlines()[0][:100]
        raise UserError(
            f"{path} cannot be read as weights alone ({reason}); give it as safetensors, which runs no code"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    named = state.items() if isinstance(state, dict) else ()
    tensors = {key: value for key, value in named if isinstance(value, torch.Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors by their names")
    return {
        key: value.float().numpy() if value.is_floating_point() else value.numpy() for key, value in tensors.items()
    }
