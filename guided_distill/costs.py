"""What a function costs, counted from the shapes in its jaxpr: operations, bytes moved, memory. Nothing is computed.

XLA's own count misses the convolutions that cuDNN does. Operations are those of matrix products and convolutions, and
exact. Bytes and memory follow a model of XLA's fusion: products, reductions and joined arrays are written to memory,
and of everything elementwise only what products read, what is returned, and what is used again much later.
"""

import collections
import dataclasses
import math

import jax

_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}
_LOOPS = {"scan": "jaxpr", "while": "body_jaxpr"}
_PRODUCTS = {"dot_general", "conv_general_dilated"}
_JOINS = {"concatenate", "dynamic_update_slice", "gather", "scatter", "scatter-add", "sort", "cumsum", "pad", "stack"}
_VIEWS = {
    "broadcast_in_dim", "convert_element_type", "copy", "expand_dims", "neg", "optimization_barrier", "reshape", "rev",
    "slice", "split", "squeeze", "stop_gradient", "transpose",
}  # fmt: skip
_FAR = 40  # operations between two uses of a value that one fusion no longer reaches over


@dataclasses.dataclass(frozen=True)
class Cost:
    """Operations; bytes read and written; the most bytes that live at once besides the arguments, results included."""

    flops: float
    moved: float
    peak: float


@dataclasses.dataclass
class _Operation:
    name: str
    params: dict
    inputs: list[int]
    outputs: list[int]


def plain_bytes(shape, itemsize):
    """Bytes of an array without padding."""
    return math.prod(shape) * itemsize


def cost_of(function, *arguments, bytes_of=plain_bytes):
    """The Cost of function(*arguments), trees of ShapeDtypeStructs; `bytes_of` (shape, itemsize) as a device has it."""
    return _cost_of_jaxpr(jax.make_jaxpr(function)(*arguments), bytes_of)


def flops_of(name, params, shapes_in, shape_out):
    """Operations of one product, two for each multiplication and addition; 0 of anything else."""
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * math.prod(shape_out) * math.prod(shapes_in[0][axis] for axis in contracted)
    if name == "conv_general_dilated":
        # The kernel's features per group are counted in its shape: [.., in / groups, out].
        kernel = shapes_in[1]
        return 2 * math.prod(shape_out) * math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
    return 0


def _cost_of_jaxpr(closed, bytes_of):
    avals, operations = [], []
    jaxpr = closed.jaxpr
    arguments = [_new(avals, var.aval) for var in (*jaxpr.constvars, *jaxpr.invars)]
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), arguments, strict=True))
    results = _inline(jaxpr, env, avals, operations)
    operations = _needed(operations, {value for value in results if value is not None})
    sizes = [bytes_of(aval.shape, getattr(aval.dtype, "itemsize", 4)) for aval in avals]
    inner = {}  # place -> (times, Cost) of a loop's body
    for place, operation in enumerate(operations):
        if operation.name in _LOOPS:
            body = operation.params[_LOOPS[operation.name]]
            inner[place] = operation.params.get("length", 1), _cost_of_jaxpr(body, bytes_of)
    written = _written(operations, set(results))
    return _walk(operations, avals, sizes, written, set(arguments), set(results), inner)


def _new(avals, aval):
    avals.append(aval)
    return len(avals) - 1


def _inline(jaxpr, env, avals, operations):
    """Appends the jaxpr's operations, those of the functions it calls in their place; returns its results' numbers.

    Of a `cond` the last branch is taken: that of `lax.platform_dependent` for accelerators.
    """

    def read(atom):
        return None if hasattr(atom, "val") else env[atom]

    for eqn in jaxpr.eqns:
        name, inputs = eqn.primitive.name, [read(atom) for atom in eqn.invars]
        inner = eqn.params["branches"][-1] if name == "cond" else eqn.params.get(_CALLS.get(name, ""))
        if inner is None:
            outputs = [_new(avals, var.aval) for var in eqn.outvars]
            operations.append(_Operation(name, eqn.params, inputs, outputs))
        else:
            inner, inputs = getattr(inner, "jaxpr", inner), inputs[1:] if name == "cond" else inputs
            consts = [_new(avals, var.aval) for var in inner.constvars]
            own = dict(zip((*inner.constvars, *inner.invars), (*consts, *inputs), strict=True))
            outputs = _inline(inner, own, avals, operations)
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _needed(operations, wanted):
    """The operations without those whose results nobody uses."""
    kept = []
    for operation in reversed(operations):
        if wanted.intersection(operation.outputs):
            wanted.update(value for value in operation.inputs if value is not None)
            kept.append(operation)
    return kept[::-1]


def _is_written_always(name):
    return name in _PRODUCTS or name in _JOINS or name in _LOOPS or name.startswith(("reduce", "arg", "random"))


def _written(operations, results):
    """Numbers of the values that are written to memory."""
    uses = collections.defaultdict(list)  # value -> (place, name) of what uses it, itself or as a view
    for place, operation in reversed(list(enumerate(operations))):
        through = [use for out in operation.outputs for use in uses[out]] if operation.name in _VIEWS else []
        for value in operation.inputs:
            if value is not None:
                uses[value] += through or [(place, operation.name)]
    written = set(results)
    for operation in operations:
        for value in operation.outputs:
            if _is_written_always(operation.name):
                written.add(value)
            elif operation.name not in _VIEWS and uses[value]:
                places, names = zip(*uses[value], strict=True)
                if max(places) - min(places) > _FAR or any(name in _PRODUCTS | _JOINS for name in names):
                    written.add(value)
    return written


def _walk(operations, avals, sizes, written, arguments, results, inner):
    """The Cost of operations in their order."""
    sources = {value: {value} for value in arguments}  # the written values that a value is made of
    born, last_use, reduced_at = {}, {}, {}
    flops, moved = (sum(times * getattr(cost, name) for times, cost in inner.values()) for name in ("flops", "moved"))
    for place, operation in enumerate(operations):
        read = set().union(*(sources.get(value, ()) for value in operation.inputs))
        kept = written.intersection(operation.outputs)
        flops += flops_of(
            operation.name,
            operation.params,
            [() if value is None else avals[value].shape for value in operation.inputs],
            avals[operation.outputs[0]].shape,
        )
        if kept:
            # Reductions near to each other are one fusion, which reads what they share once.
            reduces = operation.name.startswith("reduce")
            moved += sum(sizes[v] for v in read if not (reduces and place - reduced_at.get(v, -_FAR) < _FAR))
            moved += sum(sizes[value] for value in kept)
            reduced_at.update(dict.fromkeys(read if reduces else (), place))
            last_use.update(dict.fromkeys(read, place))
        for value in operation.outputs:
            sources[value] = {value} if value in kept else read
        born.update((value, place) for value in kept)
    last_use.update(dict.fromkeys(results, len(operations)))
    inner_peaks = {place: cost.peak for place, (_, cost) in inner.items()}
    return Cost(flops, moved, _peak(len(operations), born, last_use, sizes, inner_peaks))


def _peak(places, born, last_use, sizes, inner_peaks):
    change = [0] * (places + 2)
    for value, place in born.items():
        change[place] += sizes[value]
        change[last_use.get(value, place) + 1] -= sizes[value]
    peak = live = 0
    for place in range(places + 1):
        live += change[place]
        peak = max(peak, live + inner_peaks.get(place, 0))
    return peak
