"""What became of every tensor of a weight file and of every parameter of a network."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

from dense_jax.errors import UserError

Shape = tuple[int, ...]
Status = Literal["loaded", "ignored", "new", "missing", "unexpected", "misfit"]

_UNEXPLAINED: tuple[Status, ...] = ("missing", "unexpected", "misfit")
_NUM_NAMED = 3  # names of each kind in an error message


class Row(NamedTuple):
    """One tensor of the file, one parameter of the network, or one pair of both.

    Attributes:
      status: "loaded"; "ignored", left in the file on purpose; "new", kept as initialised on
        purpose; or, not explained, "missing" in the file, "unexpected" in the file, or "misfit", a
        pair of different shape or kind.
      source: name in the file, or "".
      source_shape: shape in the file; None without a source.
      target: name in the network, or "".
      target_shape: shape in the network; None without a target.
      layout: how the pair's layouts differ; see `dense_jax.weights.layouts`.
      note: what is done to the values ("permuted, cast from float16"), or why they do not fit.
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
    """All rows: those of the file in its order, then what only the network has.

    Printed it is a table of all rows with their sums below.
    """

    rows: tuple[Row, ...]

    @property
    def unexplained(self) -> tuple[Row, ...]:
        """The rows that forbid loading."""
        return tuple(row for row in self.rows if row.status in _UNEXPLAINED)

    def check(self, path: str, advice: str = "give a network, or a file, that fits") -> None:
        """Refuses what is not explained.

        Args:
          path: the file, for the message.
          advice: what can be done, for the message.

        Raises:
          UserError: names the first tensors of each kind.
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
        """One line: how many rows of each status, and of those loaded how many were changed."""
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
