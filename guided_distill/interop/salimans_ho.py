"""Checkpoints of diffusion_distillation (the code of arXiv 2202.00512, Flax's msgpack) <-> the pixel U-Net's weights.

It is the same network, layer by layer, under other names; attention has an axis for heads there.
"""

import re

import flax.serialization
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from guided_distill.errors import UserError
from guided_distill.files import absolute, write_whole
from guided_distill.interop.tensors import export_tree, import_tree

# (what a path is called here, there), each rule on what those before it have left.
_RENAMED = (
    (r"^embedding/time1/", "dense0/"),
    (r"^embedding/time2/", "dense1/"),
    (r"^embedding/label/", "class_emb/"),
    (r"^(down|up)_(\d+)_(\d+)_attention/", r"\1_\2.attn_\3/"),
    (r"^(down|up)_(\d+)_(\d+)/", r"\1_\2.block_\3/"),
    (r"^(down|up)_(\d+)_resample/", r"\1_\2.\1sample/"),
    (r"^mid_attention/", "mid.attn_1/"),
    (r"^mid_0/", "mid.block_1/"),
    (r"^mid_1/", "mid.block_2/"),
    (r"/emb/", "/temb_proj/"),
    (r"/skip/", "/nin_shortcut/"),
    (r"/out/", "/proj_out/"),
)
_BY_HEADS = re.compile(r"_attention/([qkv]/(kernel|(?P<bias>bias))|(?P<out>out)/kernel)$")


class _Names:
    """As `tensors.Names`, for that layout of the network `config` (a UNetConfig)."""

    def __init__(self, config):
        self._head_dim = config.head_dim

    def key(self, path):
        for ours, theirs in _RENAMED:
            path = re.sub(ours, theirs, path)
        return path

    def to_theirs(self, path, value):
        return value.reshape(self._shape(path, value.shape))

    def to_ours(self, path, value):
        by_heads = _BY_HEADS.search(path)
        if not by_heads:
            return value
        if by_heads["bias"]:
            return value.reshape(-1)
        return value.reshape(-1, value.shape[-1]) if by_heads["out"] else value.reshape(len(value), -1)

    def their_shapes(self, shapes):
        return {self.key(path): self._shape(path, leaf.shape) for path, leaf in flatten_dict(shapes, sep="/").items()}

    def _shape(self, path, shape):
        by_heads, of_one = _BY_HEADS.search(path), self._head_dim or shape[-1]
        if not by_heads:
            return shape
        heads = (shape[-1] // of_one, of_one)
        if by_heads["bias"]:
            return heads
        return (*heads, shape[-1]) if by_heads["out"] else (shape[0], *heads)


def is_checkpoint(path):
    """Whether a path is such a file, rather than a run or one of its stages."""
    return absolute(path).is_file()


def looks_like_one(path):
    """Whether a file begins as they do: a map of msgpack whose first key is a word, which no other weights here are."""
    with path.open("rb") as file:
        return re.match(rb"[\x81-\x8f][\xa1-\xbf][a-z_]{4}", file.read(6)) is not None


def read_checkpoint(path, config, shapes):
    """(the averaged parameters f32, the number of steps of a distilled student, else 0) of a checkpoint.

    `shapes` is our tree of parameters. A network without classes is read as one of a single class, whose label says
    nothing. Raises UserError for a file that is none, and for one of another network than `config`, a UNetConfig.
    """
    path, names = absolute(path), _Names(config)
    state, num_steps = _read(path)
    wanted = names.their_shapes(shapes)
    if config.num_classes == 1:
        state = {**{key: np.zeros(wanted[key], np.float32) for key in wanted if key.startswith("class_emb/")}, **state}
    elif "class_emb/kernel" not in state:
        raise UserError(f"{path} is of a network without classes: it needs config.data.num_classes = 1, and such data")
    state = {key: _without_ones(value, wanted.get(key)) for key, value in state.items()}
    return import_tree(names, shapes, state, str(path)), num_steps


def write_checkpoint(path, config, params):
    """Writes a teacher's parameters as such a checkpoint. Raises UserError for a student: w has no place in it."""
    if config.w_conditioned:
        raise UserError(f"{path}: a checkpoint of diffusion_distillation has no place for the w input")
    theirs = unflatten_dict(export_tree(_Names(config), params), sep="/")
    state = {"step": 0, "ema_params": theirs, "num_sample_steps": 0}
    write_whole(absolute(path), flax.serialization.msgpack_serialize(state))


def _read(path):
    content = path.read_bytes()
    try:
        state = flax.serialization.msgpack_restore(content)  # arrays, numbers and dictionaries alone
        found = flatten_dict(state["ema_params"], sep="/")
        return {key: np.asarray(value) for key, value in found.items()}, int(state.get("num_sample_steps", 0))
    except Exception as error:  # msgpack raises what it likes
        raise UserError(
            f"{path} is no checkpoint of diffusion_distillation with its ema_params ({type(error).__name__}); give one "
            "as downloaded, a workdir, or a folder that --mode=import wrote"
        ) from error


def _without_ones(value, shape):
    # Before version 0.3.6 Flax kept scales and biases of GroupNorm as [1, 1, 1, C].
    same = shape is not None and [n for n in value.shape if n > 1] == [n for n in shape if n > 1]
    return value.reshape(shape) if same else value
