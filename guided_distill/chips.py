"""What accelerators can do, as their makers state it, and the topologies they stand in."""

import dataclasses
import math
import re

from guided_distill.errors import UserError

_GB = 1e9


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device's memory in bytes, FLOP/s of matrix products, bytes/s to its memory and to the other chips."""

    memory: float
    bfloat16: float
    float32: float  # as JAX multiplies float32 by default there: in bfloat16 passes on TPUs, in TF32 on GPUs
    memory_speed: float
    link_speed: float

    def flops_per_second(self, dtype):
        """Peak FLOP/s of a network that computes in `dtype`."""
        return self.bfloat16 if dtype == "bfloat16" else self.float32


CHIPS = {
    # Google Cloud documentation, "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e (Trillium)": tables of the architecture.
    # Links there and below are stated for both directions; here is one.
    "v4": Chip(32 * 2**30, 275e12, 275e12, 1228 * _GB, 300 * _GB),
    "v5e": Chip(16 * 2**30, 197e12, 197e12, 819 * _GB, 200 * _GB),
    "v5p": Chip(95 * 2**30, 459e12, 459e12, 2765 * _GB, 600 * _GB),
    "v6e": Chip(32 * 2**30, 918e12, 918e12, 1638 * _GB, 400 * _GB),
    # NVIDIA H100 and A100 data sheets: SXM, 80 GB, without sparsity; NVLink.
    "h100": Chip(80 * _GB, 989e12, 495e12, 3350 * _GB, 450 * _GB),
    # NVIDIA H200 data sheet: the same processor with more and faster memory.
    "h200": Chip(141 * _GB, 989e12, 495e12, 4800 * _GB, 450 * _GB),
    "a100": Chip(80 * _GB, 312e12, 156e12, 2039 * _GB, 300 * _GB),
    # No data sheet: two cores at what the convolutions of models/conv.py reach.
    "cpu": Chip(8 * 2**30, 100e9, 100e9, 20 * _GB, 5 * _GB),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind: "v5e:16x16" are 256."""

    kind: str
    sides: tuple[int, ...]

    @property
    def chip(self):
        """What one of them can do."""
        return CHIPS[self.kind]

    @property
    def chips(self):
        """How many they are."""
        return math.prod(self.sides)

    @property
    def is_tpu(self):
        """Whether programs for it can be compiled without it."""
        return self.kind.startswith("v")

    @property
    def platform(self):
        """As JAX calls it."""
        return "tpu" if self.is_tpu else "cpu" if self.kind == "cpu" else "gpu"

    def bytes_of(self, shape, itemsize):
        """Bytes of an array there. On a TPU a dimension, the one that costs least, is rounded up to 128 lanes."""
        size = math.prod(shape) * itemsize
        if not self.is_tpu or not shape:
            return size
        return math.ceil(size * min(-(-side // 128) * 128 / max(side, 1) for side in shape))

    def __str__(self):
        return f"{self.kind}:{'x'.join(map(str, self.sides))}"


def parse_topology(text):
    """A Topology of "kind:sides": v5e:16x16, h100:8. Raises UserError."""
    kind, _, sides = text.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sides):
        raise UserError(f"--topology={text}: must be like v5e:16x16 or h100:8, the kind one of {', '.join(CHIPS)}")
    return Topology(kind, tuple(map(int, sides.split("x"))))


def peak_flops(device, dtype):
    """FLOP/s that the maker states for a device of JAX's; None of a CPU and of a kind that is not listed here."""
    kind = topology_of(device.device_kind, device.platform, 1).kind
    return None if kind == "cpu" else CHIPS[kind].flops_per_second(dtype)


def topology_of(device_kind, platform, count):
    """The Topology of devices that are there, of the kind that JAX calls `device_kind`; one not known here is "cpu"."""
    name = device_kind.lower().replace(" lite", "e").replace("tpu ", "")
    known = {"v6": "v6e", "v5": "v5p"}
    kind = (
        next((kind for kind in CHIPS if re.search(rf"\b{kind}\b", name)), known.get(name, "cpu"))
        if platform != "cpu"
        else "cpu"
    )
    return Topology(kind, (count,))
