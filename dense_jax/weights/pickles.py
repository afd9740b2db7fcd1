"""Interprets a pickle without Python's unpickler, so that nothing in the pickle can run.

A pickle is a program for a small stack machine. Python's `pickle` fetches any function of any
module for the program, calls it, and sets attributes on any object. A limit on the functions closes
only the first of these doors. The machine here has what plain data need: it pushes values and
containers, looks names up in a table of stand-ins, and rejects everything else.

Reference: Python library reference, `pickletools`; PEP 3154; pytorch/pytorch:
torch/_weights_only_unpickler.py, which sets the same limits.
"""

import mmap
import pickletools
import re
from collections.abc import Callable, Mapping
from typing import IO, Any, NamedTuple, cast

import numpy as np

_LONGEST_LINE = 4096
_FROM_LENGTH = 2**16  # bytes of a text or a number from which it is a `Piece`
_MOST_STEPS = 2**22
_LONGEST_KEY = 32  # plain values in a tuple

_KEYS = (str, int, float, bool, type(None))
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = re.compile(r"(SHORT_)?(BIN)?(INT|LONG|FLOAT|STRING|UNICODE|BYTES|BYTEARRAY)[1248]?")


class RefusedError(ValueError):
    """The pickle asks for a name that is not admitted; the text is the name."""


class UnsupportedError(ValueError):
    """Valid files may have this, but the reader does not take it; the text says what to do."""


class Name(NamedTuple):
    """A function or class that the pickle names, such as "torch.FloatStorage"; only its name."""

    text: str


class Built:
    """A stand-in for an object whose state a pickle sets after it makes the object."""

    def set_state(self, state: Any) -> None:
        """Takes the state of the object from the pickle."""
        raise NotImplementedError


class Piece(np.ndarray):
    """A long part of the file, uint8, which is mapped and not read.

    Arrays are such parts. Python 2 writes their bytes as text, and `pickletools` decodes that.
    """

    def decode(self, *_: Any) -> "Piece":
        """Returns itself in place of a text."""
        return self


class Stream:
    """A file for `pickletools` that reads nothing beyond its end, and no array.

    Attributes:
      position: position of the next byte.
    """

    def __init__(self, data: bytes | mmap.mmap, position: int = 0, end: int | None = None):
        self.data, self.position = data, position
        self.end = len(data) if end is None else end

    def read(self, size: int) -> bytes | Piece:
        """Returns the next bytes; fewer if the stream ends."""
        start, stop = self.position, min(self.position + size, self.end)
        self.position = stop
        if stop - start < _FROM_LENGTH:
            return self.data[start:stop]
        return np.frombuffer(self.data, np.uint8, stop - start, start).view(Piece)

    def readline(self) -> bytes:
        """Returns the bytes up to the end of the line, or the first ones of a line too long."""
        stop = min(self.position + _LONGEST_LINE, self.end)
        stop = self.data.find(b"\n", self.position, stop) + 1 or stop
        line, self.position = self.data[self.position : stop], stop
        return line


def follow(
    stream: Stream,
    admitted: Mapping[str, Callable[..., Any] | None],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Returns the object that a pickle describes, and moves the stream behind the pickle.

    Args:
      stream: a stream at the start of the pickle.
      admitted: name to the function that is called in its place; None for names without a call.
      persistent: function from the description of an object outside the pickle to its stand-in.

    Returns:
      Plain values, lists, tuples and dicts, `Name`s, and the results of the stand-ins.

    Raises:
      RefusedError: a name is not admitted.
      UnsupportedError: the pickle may be valid, but the reader does not take it.
      ValueError, TypeError, IndexError, KeyError: the pickle is damaged.
    """
    machine = _Machine(admitted, persistent)
    file = cast(IO[bytes], stream)  # `pickletools` calls only read and readline
    for step, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if step == _MOST_STEPS:
            raise UnsupportedError(f"over {_MOST_STEPS} plain values: save the arrays alone")
        machine.step(opcode.name, argument)
    return machine.stack.pop()


def put(target: dict[Any, Any], key: Any, value: Any) -> None:
    """Sets an item; a key is a plain value or a short tuple: the hash of others may never end."""
    parts = key if type(key) is tuple else (key,)
    if len(parts) > _LONGEST_KEY or any(type(part) not in _KEYS for part in parts):
        raise UnsupportedError("a key that is not a plain value: save the arrays alone")
    target[key] = value


class _Machine:
    """The stack machine; `marks` holds heights of the stack."""

    def __init__(
        self,
        admitted: Mapping[str, Callable[..., Any] | None],
        persistent: Callable[[Any], Any] | None,
    ):
        self.admitted, self.persistent = admitted, persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, code: str, argument: Any) -> None:
        stack = self.stack
        match code:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _ if code in _CONSTANTS:
                stack.append(_CONSTANTS[code])
            case _ if _VALUES.fullmatch(code):
                stack.append(argument)
            case "MARK":
                self.marks.append(len(stack))
            case "POP":
                stack.pop()
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(self.pop_to(self.marks.pop())))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self.pop_to(len(stack) - int(code[-1]))))
            case "APPEND":
                self.extend(self.pop_to(len(stack) - 1))
            case "APPENDS":
                self.extend(self.pop_to(self.marks.pop()))
            case "SETITEM":
                self.set_items(self.pop_to(len(stack) - 2))
            case "SETITEMS":
                self.set_items(self.pop_to(self.marks.pop()))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(self.name(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                module, attribute = self.pop_to(len(stack) - 2)
                stack.append(self.name(f"{module}.{attribute}"))
            case "INST":
                self.name(argument.replace(" ", "."))
                raise ValueError("the pickle makes an instance of an old-style class")
            case "REDUCE" | "NEWOBJ":
                name, arguments = self.pop_to(len(stack) - 2)
                stack.append(self.call(name, arguments))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], Built):
                    stack[-1].set_state(state)
                elif not isinstance(stack[-1], dict):  # an OrderedDict's attributes do not matter
                    raise ValueError("the pickle sets a state of an object without states")
            case "BINPERSID" if self.persistent is not None:
                stack.append(self.persistent(stack.pop()))
            case _:
                raise ValueError(f"plain data do not need the step {code}")

    def pop_to(self, height: int) -> list[Any]:
        """Removes the items above a height of the stack and returns them."""
        if not 0 <= height <= len(self.stack):
            raise ValueError("a step lacks its operands")
        items = self.stack[height:]
        del self.stack[height:]
        return items

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("the pickle extends an object that is not a list")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not dict or len(items) % 2:
            raise ValueError("the pickle sets items of an object that is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            put(self.stack[-1], key, value)

    def name(self, text: str) -> Name:
        if text not in self.admitted:
            raise RefusedError(text if text.isprintable() else repr(text))
        return Name(text)

    def call(self, name: Any, arguments: Any) -> Any:
        function = self.admitted[name.text] if type(name) is Name else None
        if function is None or type(arguments) is not tuple:
            raise ValueError("an object that cannot be called is called")
        return function(*arguments)
