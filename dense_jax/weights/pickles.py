"""Follows a pickle without Python's unpickler, so that nothing in it can run.

A pickle is a program for a small stack machine. `pickle` also fetches any function of any module
for it, calls it, and sets attributes on what it finds; limiting which functions it may fetch leaves
the rest open. Here the machine is written out for what plain data need: values and containers are
pushed, names are looked up in a table of stand-ins, and everything else is refused.

Reference: Python library reference, `pickletools`; PEP 3154; pytorch/pytorch:
torch/_weights_only_unpickler.py, which draws the same line.
"""

import mmap
import pickletools
import re
from collections.abc import Callable, Mapping
from typing import IO, Any, NamedTuple, cast

_LONGEST_LINE = 4096
_LONGEST_TEXT = 2**24  # bytes of one text or number
_MOST_STEPS = 2**22
_LONGEST_KEY = 32  # of plain values

_KEYS = (str, int, float, bool, type(None))
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = re.compile(r"(SHORT_)?(BIN)?(INT|LONG|FLOAT|STRING|UNICODE|BYTES)[1248]?")


class RefusedError(ValueError):
    """A name that the pickle asks for and that is not admitted; the text is the name."""


class UnsupportedError(ValueError):
    """Sound files may have it, and it is not read here; the text says what, and what to do."""


class Name(NamedTuple):
    """A function or class that the pickle names, such as "torch.FloatStorage"; only its name."""

    text: str


class Built:
    """A stand-in for an object that a pickle fills after making it."""

    def set_state(self, state: Any) -> None:
        """Takes what the pickle stores of the object."""
        raise NotImplementedError


class Stream:
    """Bytes as the file that `pickletools` reads, with a bound on each piece.

    Attributes:
      position: of the next byte.
    """

    def __init__(self, data: bytes | mmap.mmap, position: int = 0, end: int | None = None):
        self.data, self.position = data, position
        self.end = len(data) if end is None else end

    def read(self, size: int) -> bytes:
        """Returns the next bytes, fewer where the stream ends or where a piece is too long."""
        stop = min(self.position + min(size, _LONGEST_TEXT), self.end)
        piece, self.position = self.data[self.position : stop], stop
        return piece

    def readline(self) -> bytes:
        """Returns the bytes up to a line's end, or a part of them where the line is too long."""
        stop = min(self.position + _LONGEST_LINE, self.end)
        return self.read((self.data.find(b"\n", self.position, stop) + 1 or stop) - self.position)


def follow(
    stream: Stream,
    admitted: Mapping[str, Callable[..., Any] | None],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Returns what the pickle at the stream's position describes, and moves behind it.

    Args:
      stream: where the pickle begins.
      admitted: name to what is called in its place; None for names that are never called.
      persistent: what is called for objects stored outside the pickle, with their description.

    Returns:
      Plain values, lists, tuples and dicts, `Name`s, and what the stand-ins return.

    Raises:
      RefusedError: a name is not admitted.
      UnsupportedError: a sound pickle may be like this.
      ValueError, TypeError, IndexError, KeyError: the pickle is damaged.
    """
    machine = _Machine(admitted, persistent)
    file = cast(IO[bytes], stream)  # two of a file's functions are enough
    for step, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if step == _MOST_STEPS:
            raise UnsupportedError(f"over {_MOST_STEPS} plain values: save the arrays alone")
        machine.step(opcode.name, argument)
    return machine.stack.pop()


def put(target: dict[Any, Any], key: Any, value: Any) -> None:
    """Sets an item; keys are plain values or a few in a tuple: hashing others may never end."""
    parts = key if type(key) is tuple else (key,)
    if len(parts) > _LONGEST_KEY or any(type(part) not in _KEYS for part in parts):
        raise UnsupportedError("a key that is no plain value: save the arrays alone")
    target[key] = value


class _Machine:
    """The stack machine; `marks` are heights of the stack."""

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
                raise ValueError("an instance of an old kind of class")
            case "REDUCE" | "NEWOBJ":
                name, arguments = self.pop_to(len(stack) - 2)
                stack.append(self.call(name, arguments))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], Built):
                    stack[-1].set_state(state)
                elif not isinstance(stack[-1], dict):  # attributes of an OrderedDict say nothing
                    raise ValueError("a state for what has none")
            case "BINPERSID" if self.persistent is not None:
                stack.append(self.persistent(stack.pop()))
            case _:
                raise ValueError(f"the step {code}, which plain data do not need")

    def pop_to(self, height: int) -> list[Any]:
        """Returns what lies above a height of the stack, and takes it off."""
        if not 0 <= height <= len(self.stack):
            raise ValueError("a step that lacks its operands")
        items = self.stack[height:]
        del self.stack[height:]
        return items

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("entries for what is no list")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not dict or len(items) % 2:
            raise ValueError("items for what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            put(self.stack[-1], key, value)

    def name(self, text: str) -> Name:
        if text not in self.admitted:
            raise RefusedError(text if text.isprintable() else repr(text))
        return Name(text)

    def call(self, name: Any, arguments: Any) -> Any:
        function = self.admitted[name.text] if type(name) is Name else None
        if function is None or type(arguments) is not tuple:
            raise ValueError("a call of what cannot be called")
        return function(*arguments)
