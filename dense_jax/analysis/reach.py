"""The part of the image that each value of a traced program depends on.

`trace` interprets a program (a jaxpr) on sets of pixels instead of numbers. For each element of an
image-dependent value, it stores the first and the last image row that the element depends on, and
likewise for columns. Data movement moves these bounds. Sums and maxima take their union, and
convolutions and poolings take the union over each window. A value that does not depend on the image
is either known or free. Sizes, indices and interpolation matrices are known, and are computed only
on demand. Parameters are free: they may have any value. The interpreter knows operations and no
layers. It marks values behind an unsupported operation with the name of that operation.

Dependence means that a gradient can flow: comparisons, indices and switches pass none. Values
behind `stop_gradient` count as dependent all the same.

Rows and columns are tracked separately. Along an axis on which the bounds do not vary, only one
copy is stored, so that an image of thousands of pixels costs as much as one of its rows. There is
one drawback: if a unit sees only padding along one axis, it may still have bounds along the other.
Bounds are exact for units that have no path from padding.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from dense_jax.analysis import reach_rules as rules
from dense_jax.analysis.reach_rules import FREE, Known, Opaque, Seen, Value


class Join(NamedTuple):
    """Image-dependent values that an operation adds, compares or concatenates.

    Attributes:
      primitive: name of the operation.
      scope: names of the modules that contain it.
      parts: the values.
    """

    primitive: str
    scope: str
    parts: tuple[Seen, ...]


class Trace(NamedTuple):
    """Result of `trace`.

    Attributes:
      outputs: one value for each output of the program.
      joins: every sum, difference, maximum, minimum or concatenation of image-dependent values,
        except those in functions with custom gradients. Max pooling thus counts as one operation,
        although it compares shifted images.
      widest: span of the widest window as a share of its map's side; it may exceed 1.
      is_global: whether an operation reduces a whole side of a map at once.
    """

    outputs: list[Value]
    joins: list[Join]
    widest: float
    is_global: bool


def trace(program: core.ClosedJaxpr, image: int) -> Trace:
    """Traces the image [B, H, W, C], which is argument number `image`, through a program."""
    arguments: list[Value] = [FREE] * len(program.jaxpr.invars)
    rows, columns = (np.arange(n) for n in program.jaxpr.invars[image].aval.shape[1:3])
    arguments[image] = Seen(
        np.stack([rows, -rows]).astype(np.int32).reshape(2, 1, -1, 1, 1),
        np.stack([columns, -columns]).astype(np.int32).reshape(2, 1, 1, -1, 1),
    )
    walk = _Walk()
    outputs = walk.run(program.jaxpr, program.consts, arguments, "")
    return Trace(outputs, walk.joins, walk.notes.widest, walk.notes.is_global)


_FLAT = frozenset({"ceil", "floor", "round", "sign"})  # Their gradient is zero.
_JOINS = frozenset({"add", "add_any", "sub", "max", "min", "concatenate"})
_CALLS = {  # Primitives that call a program, and the name of the parameter with that program.
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat2": "jaxpr",  # "checkpoint" in JAX 0.11.
}


class _Walk:
    """State of one walk through a program."""

    def __init__(self) -> None:
        self.joins: list[Join] = []
        self.notes = rules.Notes()
        self._depth = 0  # Number of enclosing functions with custom gradients.

    def run(self, jaxpr: core.Jaxpr, consts, arguments: Sequence[Value], scope: str) -> list[Value]:
        """Returns the outputs of a program."""
        values: dict[Any, Value] = dict(zip(jaxpr.invars, arguments, strict=True))
        for variable, const in zip(jaxpr.constvars, consts, strict=True):
            values[variable] = Known(functools.partial(np.asarray, const))

        def read(atom) -> Value:
            if isinstance(atom, core.Literal):
                return Known(functools.partial(np.asarray, atom.val))
            return values[atom]

        for eqn in jaxpr.eqns:
            inside = f"{scope}/{eqn.source_info.name_stack}".strip("/")
            outputs = self._equation(eqn, [read(atom) for atom in eqn.invars], inside)
            values.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: core.JaxprEqn, inputs: list[Value], scope: str) -> list[Value]:
        name, count = eqn.primitive.name, len(eqn.outvars)
        for value in inputs:
            if isinstance(value, Opaque):
                return [value] * count
        if name == "platform_index":  # The last branch is the default for all platforms.
            return [Known(functools.partial(np.int32, len(eqn.params["platforms"]) - 1))]
        if name == "cond" and isinstance(inputs[0], Known):
            chosen = eqn.params["branches"][int(inputs[0].value)]
            return self.run(chosen.jaxpr, chosen.consts, inputs[1:], scope)
        if name in _CALLS:
            return self._call(eqn, inputs, scope)
        seen = tuple(value for value in inputs if isinstance(value, Seen))
        if not seen:
            known = [value for value in inputs if isinstance(value, Known)]
            return [FREE] * count if len(known) < len(inputs) else rules.known(eqn, known)
        if name == "scan":
            return self._scan(eqn, inputs, scope)
        if name in _FLAT or not any(map(_is_inexact, eqn.outvars)):
            return [FREE] * count
        if name in _JOINS and len(seen) > 1 and not self._depth:
            self.joins.append(Join(name, scope, seen))
        if name == "optimization_barrier":
            return inputs
        if name in rules.ELEMENTWISE:
            return [rules.elementwise(name, inputs)]
        if name not in rules.RULES:
            return [Opaque(name)] * count
        return rules.RULES[name](self.notes, eqn, inputs)

    def _call(self, eqn: core.JaxprEqn, inputs: list[Value], scope: str) -> list[Value]:
        program = eqn.params[_CALLS[eqn.primitive.name]]
        is_custom = eqn.primitive.name == "custom_vjp_call"
        self._depth += is_custom
        is_closed = isinstance(program, core.ClosedJaxpr)
        jaxpr, consts = (program.jaxpr, program.consts) if is_closed else (program, ())
        outputs = self.run(jaxpr, consts, inputs, scope)
        self._depth -= is_custom
        return outputs

    def _scan(self, eqn: core.JaxprEqn, inputs: list[Value], scope: str) -> list[Value]:
        """Unrolls a loop of known length.

        The inputs are constants, then the carry, then stacks with one item for each step. The
        outputs are the carry, then stacks. Shapes show which is which, because the parameters that
        count them differ between JAX releases.
        """
        body = eqn.params["jaxpr"]
        num_carry = len(eqn.outvars) - _num_stacks(eqn.outvars, body.jaxpr.outvars)
        last = len(inputs) - _num_stacks(eqn.invars, body.jaxpr.invars)
        first = last - num_carry
        carry, stacks = inputs[first:last], inputs[last:]
        steps: list[list[Value]] = []
        for step in range(eqn.params["length"])[:: -1 if eqn.params["reverse"] else 1]:
            slices = [_item(stack, step) for stack in stacks]
            found = self.run(body.jaxpr, body.consts, [*inputs[:first], *carry, *slices], scope)
            carry = found[:num_carry]
            steps.append(found[num_carry:])
        if eqn.params["reverse"]:
            steps.reverse()
        return [*carry, *(_stack(items) for items in zip(*steps, strict=True))]


def _num_stacks(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """Returns the number of variables that have one more axis outside a loop than inside it."""
    pairs = zip(outside, inside, strict=True)
    return sum(len(rules.shape_of(a)) > len(rules.shape_of(b)) for a, b in pairs)


def _is_inexact(variable) -> bool:
    return jnp.issubdtype(variable.aval.dtype, jnp.inexact)


def _item(stack: Value, index: int) -> Value:
    """Returns one item along the first axis."""

    def pick(array: np.ndarray, axis: int) -> np.ndarray:
        return np.take(array, index if array.shape[axis] > 1 else 0, axis)

    if isinstance(stack, Seen):
        return Seen(pick(stack.rows, 1), pick(stack.columns, 1))
    if isinstance(stack, Known):
        return Known(lambda: pick(stack.value, 0))
    return stack


def _stack(items: Sequence[Value]) -> Value:
    """Stacks items along a new first axis."""
    seen = [item for item in items if isinstance(item, Seen)]
    opaque = [item for item in items if isinstance(item, Opaque)]
    if opaque or not seen:
        return opaque[0] if opaque else FREE
    nothing = np.array(rules.NOTHING, np.int32)

    def join(arrays: list[np.ndarray]) -> np.ndarray:
        return np.stack(np.broadcast_arrays(*arrays), axis=1)

    return Seen(
        join([item.rows if isinstance(item, Seen) else nothing for item in items]),
        join([item.columns if isinstance(item, Seen) else nothing for item in items]),
    )
