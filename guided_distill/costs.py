"""What a function costs, counted from the shapes in its jaxpr: operations, bytes moved, memory. Nothing is computed.

XLA's own count misses the convolutions that cuDNN does. Operations are those of matrix products and convolutions, and
exact. Bytes and memory follow a model of XLA's fusion as its TPU compiler's schedules show it (results/plan): products,
with what is elementwise after them, reductions and joined arrays are written to memory; anything else elementwise is
made where it is used, a second time where that is much later; and what is only used in bfloat16 is written so.
"""

import collections
import dataclasses
import math

import jax
import jax.extend

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
_KERNELS = {"flash_attention": 2, "flash_attention_gradient": 5}  # products of two tokens (models/attention.py)
_PRODUCTS = {"dot_general", "conv_general_dilated"}
_JOINS = {
    "concatenate", "cumsum", "dynamic_update_slice", "gather", "pad", "scatter", "scatter-add", "sort", "stack",
    *_KERNELS,
}  # fmt: skip
_VIEWS = {
    "broadcast_in_dim", "convert_element_type", "copy", "expand_dims", "neg", "optimization_barrier", "reshape", "rev",
    "slice", "split", "squeeze", "stop_gradient", "transpose",
}  # fmt: skip
_FAR = 40  # operations between two uses of a value that are not one fusion's


@dataclasses.dataclass(frozen=True)
class Cost:
    """Operations; bytes read and written; the most bytes at once besides the arguments; those of the results, in it."""

    flops: float
    moved: float
    peak: float
    results: float


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


def costs_with_gradient(function, params, *arguments, bytes_of=plain_bytes):
    """The Costs of an array function(params, *arguments), and of a square loss of it with the gradient of params."""
    closed = jax.make_jaxpr(function)(params, *arguments)
    # Differentiated as it was traced: tracing a network of many layers takes longer than the rest.
    evaluate, rest = jax.extend.core.jaxpr_as_fun(closed), jax.tree.leaves(arguments)
    leaves = jax.tree.leaves(params)

    def gradient(leaves, *rest):
        return jax.grad(lambda leaves: (evaluate(*leaves, *rest)[0] ** 2).sum())(leaves)

    return _cost_of_jaxpr(closed, bytes_of), cost_of(gradient, leaves, *rest, bytes_of=bytes_of)


def flops_of(name, params, shapes_in, shape_out):
    """Operations of one product, two for each multiplication and addition; 0 of anything else."""
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * math.prod(shape_out) * math.prod(shapes_in[0][axis] for axis in contracted)
    if name == "conv_general_dilated":
        # The kernel's features per group are counted in its shape: [.., in / groups, out].
        kernel = shapes_in[1]
        return 2 * math.prod(shape_out) * math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
    if name in _KERNELS:
        queries, keys = shapes_in[:2]
        return _KERNELS[name] * 2 * math.prod(queries) * keys[-3]
    return 0


def _cost_of_jaxpr(closed, bytes_of):
    avals, operations = [], []
    jaxpr = closed.jaxpr
    arguments = [_new(avals, var.aval) for var in (*jaxpr.constvars, *jaxpr.invars)]
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), arguments, strict=True))
    results = _inline(jaxpr, env, avals, operations)
    operations = _needed(operations, {value for value in results if value is not None})
    sizes = [bytes_of(aval.shape, getattr(aval.dtype, "itemsize", 4)) for aval in avals]
    base = _bases(operations)
    results = _unwidened(results, base, avals, sizes)
    sizes = _narrowed(operations, avals, sizes, results)
    inner = {}  # place -> (times, Cost) of a loop's body
    for place, operation in enumerate(operations):
        if operation.name in _LOOPS:
            body = operation.params[_LOOPS[operation.name]]
            inner[place] = operation.params.get("length", 1), _cost_of_jaxpr(body, bytes_of)
    written, repeated = _written(operations, avals, base, results)
    return _walk(operations, avals, sizes, written, repeated, set(arguments), results, inner)


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
        name = eqn.params.get("target_name", name)  # of a kernel
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


def _uses(operations):
    """{value: [(place, name of the operation)]} of what uses it, itself or as a view, in order."""
    uses = collections.defaultdict(list)
    for place, operation in reversed(list(enumerate(operations))):
        through = [use for out in operation.outputs for use in uses[out]] if operation.name in _VIEWS else []
        for value in operation.inputs:
            if value is not None:
                uses[value] += through or [(place, operation.name)]
    return uses


def _written(operations, avals, base, results):
    """(numbers of the values that are written to memory, those among them that are made again when used again later).

    A product, or random numbers, end with the elementwise operations that alone use what comes before. What is
    elementwise otherwise is made where it is used; where products or joined arrays read it, it is written for them.
    """
    uses, written, repeated = _uses(operations), set(results), set()
    ends = set()  # the values that a product or random numbers end with
    for operation in operations:
        inputs = [base.get(value, value) for value in operation.inputs if value is not None]
        if operation.name in _VIEWS:
            continue
        if _is_written_always(operation.name):
            written.update(operation.outputs)
            if operation.name in _PRODUCTS or operation.name.startswith("random"):
                ends.update(operation.outputs)
        else:
            (value, *_) = operation.outputs
            size = math.prod(avals[value].shape)
            ending = [v for v in inputs if v in ends and len(uses[v]) == 1 and math.prod(avals[v].shape) == size]
            if ending and uses[value]:
                written.discard(max(ending))
                written.add(value)
                ends.add(value)
            elif any(name in _PRODUCTS | _JOINS for value in operation.outputs for _, name in uses[value]):
                written.update(operation.outputs)
                repeated.update(set(operation.outputs) - results)
    return written, repeated


def _narrowed(operations, avals, sizes, results):
    """Bytes of the values, where one that is used only after a conversion is written converted."""
    itemsize = [getattr(aval.dtype, "itemsize", 4) for aval in avals]
    used_as = {value: itemsize[value] for value in results}  # bytes of an element
    for operation in reversed(operations):
        for value in operation.inputs:
            if value is not None:
                view = operation.name in _VIEWS
                wanted = max(used_as.get(out, 0) for out in operation.outputs) if view else math.inf
                if operation.name == "convert_element_type":
                    wanted = min(wanted, itemsize[operation.outputs[0]])
                used_as[value] = max(used_as.get(value, 0), min(wanted, itemsize[value]))
    return [size * used_as.get(k, itemsize[k]) / itemsize[k] for k, size in enumerate(sizes)]


def _unwidened(results, base, avals, sizes):
    """Results as they are kept: a gradient made in bfloat16 stays so until it is applied."""

    def kept(value):
        shown = base.get(value, value)
        same = math.prod(avals[shown].shape) == math.prod(avals[value].shape)
        return shown if same and sizes[shown] < sizes[value] else value

    return {kept(value) for value in results if value is not None}


def _bases(operations):
    """{view: the value it shows}."""
    base = {}
    for operation in operations:
        inputs = [value for value in operation.inputs if value is not None]
        if operation.name in _VIEWS and inputs:
            # A barrier or a split has many results, and shows its inputs one by one or its only one.
            shown = inputs if len(inputs) == len(operation.outputs) else [inputs[0]] * len(operation.outputs)
            base.update((out, base.get(value, value)) for out, value in zip(operation.outputs, shown, strict=True))
    return base


class _Memory:
    """When values lie in memory, and what is moved to and from it. Values of `repeated` are made again after a gap."""

    def __init__(self, sizes, repeated, arguments):
        self._sizes, self._repeated = sizes, repeated
        self._made_of = {value: {value} for value in arguments}  # the written values that a value is made of
        self._times = {}  # value -> [[born, last used], ...]
        self._reduced_at = {}
        self.moved = 0

    def sources(self, values):
        """The written values, or arguments, that the values are made of."""
        return set().union(*(self._made_of.get(value, ()) for value in values))

    def write(self, values, read, place):
        """`values` are written at `place`, from `read`."""
        for value in values:
            self._times[value] = [[place, place]]
            self._made_of[value] = {value}
            self.moved += self._sizes[value]
            if value in self._repeated:
                self._repeated[value] = read

    def read(self, values, place, reduces=False):
        """`values` are read at `place`. Reductions near to each other are one fusion, which reads them once."""
        for value in values:
            if not (reduces and place - self._reduced_at.get(value, -_FAR) < _FAR):
                self.moved += self._sizes[value]
            if reduces:
                self._reduced_at[value] = place
            self._keep(value, place)

    def _keep(self, value, place):
        times = self._times.get(value)
        if times is None:  # an argument
            return
        if value in self._repeated and place - times[-1][1] > _FAR:
            self.read(self._repeated[value], place)
            self.moved += self._sizes[value]
            times.append([place, place])
        times[-1][1] = place

    def hold(self, values, of):
        """Values that are no written ones are views or elementwise: they lie in what they are made of."""
        self._made_of.update(dict.fromkeys(values, of))

    def peak(self, places, results, inner_peaks):
        """The most bytes at once."""
        change = [0] * (places + 2)
        for value, times in self._times.items():
            for born, last in times:
                change[born] += self._sizes[value]
                change[(places if value in results else last) + 1] -= self._sizes[value]
        peak = live = 0
        for place in range(places + 1):
            live += change[place]
            peak = max(peak, live + inner_peaks.get(place, 0))
        return peak


def _walk(operations, avals, sizes, written, repeated, arguments, results, inner):
    """The Cost of operations in their order."""
    memory = _Memory(sizes, dict.fromkeys(repeated, ()), arguments)
    flops, memory.moved = (
        sum(times * getattr(cost, name) for times, cost in inner.values()) for name in ("flops", "moved")
    )
    for place, operation in enumerate(operations):
        read = memory.sources(operation.inputs)
        kept = written.intersection(operation.outputs)
        flops += flops_of(
            operation.name,
            operation.params,
            [() if value is None else avals[value].shape for value in operation.inputs],
            avals[operation.outputs[0]].shape,
        )
        if kept:
            memory.read(read, place, operation.name.startswith("reduce"))
            memory.write(kept, read, place)
        memory.hold(set(operation.outputs) - kept, read)
    peaks = {place: cost.peak for place, (_, cost) in inner.items()}
    peak = memory.peak(len(operations), results, peaks)
    return Cost(flops, memory.moved, peak, sum(sizes[value] for value in results))
