"""ONNX files, through jax2onnx.

jax2onnx replaces functions of JAX and Flax by its own while it traces, and does not know what it
meets in ours: programs for one platform among others, and derivatives of our own. So a function is
traced as it is, reduced to plain operations as a CPU would do them, and only these are converted.
"""

import functools
import importlib
import importlib.metadata
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from dense_jax.errors import UserError

# Operations that are nothing but a program of their own, and where they keep it.
_CALLS = {
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "jit": "jaxpr",
}
_FATAL = 4  # of onnxruntime's levels; errors are raised besides
_MOST_APART = 1e-2  # of the largest score; sums in another order are 1e-7 to 3e-4 apart


def convert(
    fn: Callable[[jax.Array], dict[str, jax.Array]], images: jax.ShapeDtypeStruct
) -> tuple[bytes, float]:
    """Returns an ONNX file of a function, and how far onnxruntime's results are from JAX's.

    The file's input is "images"; its outputs have the names that the function's have.

    Args:
      fn: maps images to arrays by name.
      images: their shape, of whole numbers, and dtype.

    Returns:
      The file, and the largest difference of a score on noise, as a share of the largest score.

    Raises:
      UserError: jax2onnx is not installed, or does not know an operation, or not well enough.
    """
    jax2onnx, runtime = _packages()
    version = importlib.metadata.version("jax2onnx")
    names = sorted(jax.eval_shape(fn, images))  # The order of a dictionary's leaves.
    plain = core.jaxpr_as_fun(reduce_program(fn, images))
    try:
        model = jax2onnx.to_onnx(plain, [images], input_names=["images"], output_names=names)
        del model.graph.value_info[:]  # shapes inside; of broadcast values it tells wrong ones
        file = model.SerializeToString()
        options = runtime.SessionOptions()
        options.log_severity_level = _FATAL
        session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        noise = np.random.default_rng(0).integers(0, 256, images.shape).astype(images.dtype)
        found = dict(zip(names, session.run(names, {"images": noise}), strict=True))
    except Exception as error:  # of all kinds: converters and run times are not ours
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"jax2onnx {version} cannot convert this network ({reason:.200}): use --to=stablehlo"
        ) from error
    apart = max(_apart(found[name], values) for name, values in jax.jit(fn)(noise).items())
    if not apart < _MOST_APART:
        raise UserError(
            f"jax2onnx {version} converts this network wrongly (onnxruntime's scores are "
            f"{apart:.1e} off): use --to=stablehlo"
        )
    return file, apart


def _apart(found: np.ndarray, expected: jax.Array) -> float:
    """The largest difference as a share of the largest score; of labels, which jump, none."""
    if not jnp.issubdtype(expected.dtype, jnp.floating):
        return 0.0
    return float(np.max(np.abs(found - np.asarray(expected))) / jnp.max(jnp.abs(expected)))


def reduce_program(fn: Callable[..., Any], *arguments: jax.ShapeDtypeStruct) -> core.ClosedJaxpr:
    """Returns what a function does on a CPU, traced, without calls, choices of platform, barriers.

    Loops and choices by values remain; what they hold is reduced likewise. Its results are the
    leaves of the function's.
    """
    closed = jax.make_jaxpr(fn)(*arguments)
    return jax.make_jaxpr(functools.partial(_evaluate, closed))(*arguments)


def _packages() -> tuple[Any, Any]:
    for name in ("jax2onnx", "onnx_ir"):  # they tell of what is none of a user's concern
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return importlib.import_module("jax2onnx"), importlib.import_module("onnxruntime")
    except ImportError as error:
        # A package that is there and cannot be imported gives a reason and no name.
        needed = error.name or f"packages that can be imported ({str(error).splitlines()[0]:.200})"
        raise UserError(f"--to=onnx needs {needed}: pip install jax2onnx onnxruntime") from error


def _evaluate(closed: core.ClosedJaxpr, *arguments: Any) -> list[Any]:
    """Runs a program, with the programs that it calls in place of the calls."""
    jaxpr, values = closed.jaxpr, {}

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, core.Literal) else values[variable]

    def write(variables: Sequence[Any], results: Sequence[Any]) -> None:
        values.update(zip(variables, results, strict=True))

    write([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *arguments])
    for equation in jaxpr.eqns:
        inputs = [read(variable) for variable in equation.invars]
        write(equation.outvars, _apply(equation, inputs))
    return [read(variable) for variable in jaxpr.outvars]


def _apply(equation: core.JaxprEqn, inputs: list[Any]) -> list[Any]:
    name, parameters = equation.primitive.name, equation.params
    if name == "platform_index":
        on_cpu = (
            platforms is not None and "cpu" in platforms for platforms in parameters["platforms"]
        )
        return [next(i for i, is_cpu in enumerate(on_cpu) if is_cpu)]
    if name == "cond" and isinstance(inputs[0], int):  # what stands behind it
        return _evaluate(parameters["branches"][inputs[0]], *inputs[1:])
    if name == "optimization_barrier":
        return inputs
    if name in _CALLS:
        return _evaluate(parameters[_CALLS[name]], *inputs)
    parameters = {key: _reduce(value) for key, value in parameters.items()}
    results = equation.primitive.bind(*inputs, **parameters)
    return results if equation.primitive.multiple_results else [results]


def _reduce(value: Any) -> Any:
    """The programs among an operation's parameters (of loops), reduced likewise."""
    if isinstance(value, tuple) and any(isinstance(item, core.ClosedJaxpr) for item in value):
        return tuple(map(_reduce, value))
    if not isinstance(value, core.ClosedJaxpr):
        return value
    return jax.make_jaxpr(functools.partial(_evaluate, value))(*value.in_avals)
