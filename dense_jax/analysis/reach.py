"""Which part of the image each value of a traced program sees.

`trace` walks a program (a jaxpr) with sets of pixels in place of numbers. An image-dependent value
keeps, for each of its elements, the first and the last image row that it can change with, and the
same for columns. Data movement moves these bounds, sums and maxima join them, convolutions and
poolings join them over the window. What does not depend on the image is either known (sizes,
indices, interpolation matrices: computed, but only when asked for) or free (parameters: any value).
No layer is known by name: a program is understood if it is made of the operations below, and what
is not understood says which operation it was.

What counts is what a gradient passes: comparisons, indices and switches pass nothing on. Where
training stops a gradient (`stop_gradient`), the value goes on all the same.

Rows and columns are followed apart from each other, and along an axis on which bounds do not vary
one copy is kept, so that an image of thousands of pixels costs as much as one of its rows. The
price: a unit that sees only padding along one axis may be told pixels along the other. Bounds of
units none of whose paths ends in padding are exact.
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
    """Image-dependent values that were added, compared or concatenated.

    Attributes:
      primitive: the operation.
      scope: names of the modules around it.
      parts: the values.
    """

    primitive: str
    scope: str
    parts: tuple[Seen, ...]


class Trace(NamedTuple):
    """What `trace` found.

    Attributes:
      outputs: one value for each output of the program.
      joins: every sum, difference, maximum, minimum or concatenation of image-dependent values,
        but for those inside of custom gradients: max pooling is one operation, though it is made
        of shifted images.
      widest: how much of a map's side the widest window spans, 0 to 1 or more.
      is_global: whether somewhere a whole side of a map is reduced at once.
    """

    outputs: list[Value]
    joins: list[Join]
    widest: float
    is_global: bool


def trace(program: core.ClosedJaxpr, image: int) -> Trace:
    """Follows the image [B, H, W, C], argument number `image`, through a program."""
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
_CALLS = {  # Primitives that call a program, and the parameter that holds it.
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat2": "jaxpr",  # JAX 0.11's name of "checkpoint".
}


class _Walk:
    """One walk through a program."""

    def __init__(self) -> None:
        self.joins: list[Join] = []
        self.notes = rules.Notes()
        self._depth = 0  # Number of custom gradients around.

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
        if name == "platform_index":  # The last form is the plain one, for any platform.
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

        Its inputs are constants, then the carry, then stacks of which a step gets one item; its
        outputs are the carry, then stacks. Parameters that count them differ between JAX releases.
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
    """Counts the variables that have one more axis outside of a loop than inside."""
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
    """Puts items together along a new first axis."""
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
