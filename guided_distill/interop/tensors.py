"""PyTorch's tensors by their keys <-> our trees by paths, given the names; every value keeps its bits."""

import dataclasses

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from guided_distill.errors import UserError

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


@dataclasses.dataclass(frozen=True)
class Names:
    """Their names for a network: {path of a layer here: prefix of its keys there}, or {path of a parameter: key}.

    It may name layers that a network lacks. `pointwise` are layers that are matrices here and 1x1 convolutions there.
    """

    layers: dict[str, str]
    pointwise: frozenset[str] = frozenset()

    def key(self, path):
        """Their key of a parameter. Raises KeyError where they have none."""
        if path in self.layers:
            return self.layers[path]
        layer, leaf = path.rsplit("/", 1)
        return f"{self.layers[layer]}.{_LEAVES[leaf]}"

    def to_theirs(self, path, value):
        """Our array in their order of axes: HWIO -> OIHW, [in, out] -> [out, in]."""
        if not path.endswith("kernel"):
            return value
        value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        return value[:, :, None, None] if path.rsplit("/", 1)[0] in self.pointwise else value

    def to_ours(self, path, value):
        """Their array in our order of axes."""
        if not path.endswith("kernel"):
            return value
        if path.rsplit("/", 1)[0] in self.pointwise:
            value = value.reshape(value.shape[:2])
        return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T

    def their_shapes(self, shapes):
        """{their key: shape} of a tree of ours, arrays or ShapeDtypeStructs."""
        flat = flatten_dict(shapes, sep="/")
        return {self.key(path): self.to_theirs(path, _Shape(leaf.shape)).shape for path, leaf in flat.items()}


@dataclasses.dataclass(frozen=True)
class _Shape:
    """An array of which only the shape is known."""

    shape: tuple[int, ...]

    @property
    def ndim(self):
        return len(self.shape)

    @property
    def T(self):  # noqa: N802
        return _Shape(self.shape[::-1])

    def transpose(self, *axes):
        return _Shape(tuple(self.shape[axis] for axis in axes))

    def __getitem__(self, _):
        return _Shape((*self.shape, 1, 1))


def import_tree(names, shapes, state, what):
    """Their arrays {key: array} -> our tree, float32. `shapes` is our tree of ShapeDtypeStructs.

    Raises one UserError that names the keys of `what` which are missing, left over or of another shape.
    """
    wanted = names.their_shapes(shapes)
    wrong = {
        "missing": [key for key in wanted if key not in state],
        "left over": [key for key in state if key not in wanted],
        "of another shape": [
            f"{key} {state[key].shape}, not {shape}"
            for key, shape in wanted.items()
            if key in state and state[key].shape != shape
        ],
    }
    said = [f"{kind}: {_few(keys)}" for kind, keys in wrong.items() if keys]
    if said:
        raise UserError(f"{what} does not fit its network; {'; '.join(said)}")
    flat = {
        path: np.ascontiguousarray(names.to_ours(path, state[names.key(path)]), np.float32)
        for path in flatten_dict(shapes, sep="/")
    }
    return unflatten_dict(flat, sep="/")


def export_tree(names, params):
    """Our tree -> their arrays {key: array}, float32."""
    return {
        names.key(path): np.ascontiguousarray(names.to_theirs(path, np.asarray(value, np.float32)))
        for path, value in flatten_dict(params, sep="/").items()
    }


def _few(keys):
    return ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
