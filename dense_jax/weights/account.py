"""What happens to each tensor of a weight file and to each parameter of a network."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

from dense_jax.errors import UserError

Shape = tuple[int, ...]
Status = Literal["loaded", "ignored", "new", "missing", "unexpected", "mismatch"]

_UNEXPLAINED: tuple[Status, ...] = ("missing", "unexpected", "mismatch")
_NUM_NAMED = 3  # names of each kind in an error message


class Row(NamedTuple):
    """A tensor of the file, a parameter of the network, or a pair of both.

    Attributes:
      status: three statuses explain a row, and three are errors.
        "loaded": the tensor becomes the parameter.
        "ignored": the tensor stays in the file on purpose.
        "new": the parameter keeps its initial value on purpose.
        "missing": the file lacks a parameter of the network.
        "unexpected": the network lacks a tensor of the file.
        "mismatch": tensor and parameter differ in shape or dtype.
      source: name in the file, or "".
      source_shape: shape in the file; None without a source.
      target: name in the network, or "".
      target_shape: shape in the network; None without a target.
      layout: layout of the tensor; see `dense_jax.weights.layouts`.
      note: how the values change ("permuted, cast from float16"), or why they do not fit.
    """

    status: Status
    source: str = ""
    source_shape: Shape | None = None
    target: str = ""
    target_shape: Shape | None = None
    layout: str = "same"
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Account:
    """All rows: the tensors in the order of the file, then parameters that only the network has.

    `str` returns a table of all rows with the totals below.
    """

    rows: tuple[Row, ...]

    @property
    def unexplained(self) -> tuple[Row, ...]:
        """The rows that are errors."""
        return tuple(row for row in self.rows if row.status in _UNEXPLAINED)

    def check(self, path: str, advice: str = "give another network or another file") -> None:
        """Raises an error if any row is one.

        Args:
          path: the file, for the message.
          advice: what the user can do, for the message.

        Raises:
          UserError: the message names the first tensors of each status.
        """
        kinds = []
        for status in _UNEXPLAINED:
            names = [_name(row) for row in self.rows if row.status == status]
            if names:
                more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
                kinds.append(f"{len(names)} {status}: {', '.join(names[:_NUM_NAMED])}{more}")
        if kinds:
            raise UserError(f"{path} does not fit the network ({'; '.join(kinds)}): {advice}")

    def summary(self) -> str:
        """Returns one line: the number of rows of each status, and how many loaded ones change."""
        counts = Counter(row.status for row in self.rows)
        changes = Counter(
            change.split(" from ")[0]
            for row in self.rows
            if row.status == "loaded" and row.note
            for change in row.note.split(", ")
        )
        parts = []
        for status, number in counts.most_common():
            details = ", ".join(f"{n} {change}" for change, n in changes.most_common())
            parts.append(f"{number} {status}" + (f" ({details})" if status == "loaded" else ""))
        return ", ".join(parts).replace(" ()", "")

    def __str__(self) -> str:
        header = ("", "tensor of the file", "shape", "parameter here", "shape", "")
        cells = [header] + [
            (
                row.status,
                row.source,
                _text(row.source_shape),
                row.target,
                _text(row.target_shape),
                row.note,
            )
            for row in self.rows
        ]
        return "\n".join([*_aligned(cells), self.summary()])


def _name(row: Row) -> str:
    name = row.source or row.target
    return f"{name} ({row.note})" if row.note else name


def _text(shape: Shape | None) -> str:
    return "" if shape is None else "x".join(map(str, shape)) or "scalar"


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
