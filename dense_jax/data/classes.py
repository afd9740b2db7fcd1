"""The meaning of the numbers in a label file: class names, colours and void values."""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from dense_jax.data.keypoints import KeypointTable

IGNORE_LABEL = 255
"""The label of a pixel that no loss and no metric counts, in every array of this library."""

_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # would end a line or drive a terminal
_MOST_NEW = 32  # values of a label that may be classes; smoothed edges have more
_VOID_COLOUR = (224, 224, 192)  # the border colour of the PASCAL VOC palette


@functools.cache
def _voc_palette() -> np.ndarray:
    """Returns the PASCAL VOC colour map: bit i of a channel comes from bit 3 (7 - i) of the id."""
    ids = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((ids >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette


def voc_colours(num_classes: int) -> tuple[tuple[int, int, int], ...]:
    """Returns the first colours (R, G, B) of the PASCAL VOC colour map, black first."""
    return tuple((int(r), int(g), int(b)) for r, g, b in _voc_palette()[:num_classes])


def _whole(number: Any) -> int:
    """Returns a whole number, such as 2.0 of a spreadsheet, as an integer."""
    kinds = int | float | np.integer | np.floating
    if isinstance(number, bool) or not isinstance(number, kinds) or float(number) % 1 != 0:
        raise ValueError(f"values and colours are whole numbers, got {number!r}")
    return int(number)


@dataclasses.dataclass(frozen=True)
class ClassTable:
    """The classes of a dataset; a class id is an index into the names.

    Attributes:
      names: the name of each class.
      colours: (R, G, B) in 0..255 of each class; empty for the PASCAL VOC colours.
      values: the value of each class in the label *files*; empty for 0, 1, 2, ...
      void_values: file values that mean "do not count this pixel"; they become `IGNORE_LABEL`.
      has_chosen_colours: whether somebody chose the colours, which may be those of PASCAL VOC;
        None for whether they are given.
      keypoints: the keypoints of objects; None: there are none.

    Raises:
      ValueError: the lists differ in length, a name or a value occurs twice, or there are no
        classes or more than 255.
    """

    names: Sequence[str]
    colours: Sequence[tuple[int, int, int]] = ()
    values: Sequence[int] = ()
    void_values: Sequence[int] = (IGNORE_LABEL,)
    # Not part of what a table is: hashes and comparisons of earlier tables stay.
    has_chosen_colours: bool | None = dataclasses.field(default=None, repr=False, compare=False)
    keypoints: KeypointTable | None = dataclasses.field(default=None, repr=False)

    ignore_label: ClassVar[int] = IGNORE_LABEL

    def __post_init__(self):
        if not isinstance(self.names, list | tuple):  # letters of a text would be names
            raise ValueError(f"names are a list, got {self.names!r}")
        num = len(self.names)
        set_field = functools.partial(object.__setattr__, self)  # the instance is frozen
        set_field("names", tuple(self.names))
        colours = (tuple(map(_whole, colour)) for colour in self.colours)
        is_chosen = bool(self.colours) if (own := self.has_chosen_colours) is None else bool(own)
        set_field("colours", tuple(colours) or voc_colours(num))
        set_field("has_chosen_colours", is_chosen or not self._has_voc_colours)
        set_field("values", tuple(map(_whole, self.values)) or tuple(range(num)))
        set_field("void_values", tuple(map(_whole, self.void_values)))
        if wrong := [name for name in self.names if not isinstance(name, str)]:
            raise ValueError(f"a class name is text, got {wrong[0]!r}")
        if wrong := [name for name in self.names if _CONTROLS.search(name)]:
            raise ValueError(f"a class name has control characters: {wrong[0]!r}")
        if not 1 <= num <= IGNORE_LABEL:
            raise ValueError(f"a class table needs 1 to {IGNORE_LABEL} classes, got {num}")
        if len(set(self.names)) != num:
            raise ValueError(f"class names must differ, got {', '.join(self.names)}")
        if not len(self.colours) == len(self.values) == num:
            raise ValueError(
                f"{num} names but {len(self.colours)} colours and {len(self.values)} values"
            )
        if self.keypoints is not None and not isinstance(self.keypoints, KeypointTable):
            raise ValueError("keypoints are part of annotations, not of a class table")
        if any(len(c) != 3 or not all(0 <= v <= 255 for v in c) for c in self.colours):
            raise ValueError(f"colours are three numbers in 0..255, got {self.colours}")
        values = (*self.values, *self.void_values)
        if len(set(values)) != len(values) or not all(0 <= v <= 255 for v in values):
            raise ValueError(f"class and void values must differ and be in 0..255, got {values}")

    @property
    def num_classes(self) -> int:
        """The number of classes, without void."""
        return len(self.names)

    def palette(self) -> np.ndarray:
        """Returns the colour of each class id, uint8 [256, 3], with the void colour at 255."""
        palette = _voc_palette().copy()
        palette[: self.num_classes] = self.colours
        palette[IGNORE_LABEL] = _VOID_COLOUR
        return palette

    def lookup(self) -> np.ndarray:
        """Returns the class id of each file value, int16 [256]; 255 for void, -1 for no class."""
        lookup = np.full(256, -1, np.int16)
        lookup[list(self.void_values)] = IGNORE_LABEL
        lookup[list(self.values)] = np.arange(self.num_classes)
        return lookup

    @property
    def _has_voc_colours(self) -> bool:
        return self.colours == voc_colours(self.num_classes)

    @property
    def has_own_colours(self) -> bool:
        """Whether each class has a colour of its own that somebody chose."""
        return bool(self.has_chosen_colours) and len(set(self.colours)) == self.num_classes

    def value_of_colour(self) -> dict[tuple[int, int, int], int]:
        """Returns the file value of each colour, also of the void colour if there is void."""
        values = dict(zip(self.colours, self.values, strict=True))
        return {_VOID_COLOUR: self.void_values[0], **values} if self.void_values else values

    def for_colours(self, seen: Collection[tuple[int, int, int]]) -> "ClassTable | None":
        """Returns a class table of label files with these colours, whose new names are to be given.

        Where nobody chose the colours of this table, nobody knows which name has which.

        Returns:
          None if they are too many to be classes, or one.

        Raises:
          ValueError: they are more than a table holds.
        """
        own = self if self.has_own_colours else None
        names = [*own.names] if own else []
        colours = [*own.colours] if own else []
        new = sorted(set(seen) - {*colours, _VOID_COLOUR})
        colours += new
        names += ["colour_{}_{}_{}".format(*colour) for colour in colours[len(names) :]]
        if not new or len(new) > _MOST_NEW or len(names) < 2:
            return None
        values = [*self.values] if own else []
        free = (value for value in range(256) if value not in {*values, *self.void_values})
        values += itertools.islice(free, len(names) - len(values))
        return ClassTable(names, colours, values, self.void_values)

    def for_values(self, seen: Collection[int]) -> "ClassTable | None":
        """Returns the likely class table of label files with these values, to be looked at.

        As many new values as names belong to the names, in order (1, 2, 3 in place of 0, 1, 2).
        Otherwise 255 is void and others are further classes. Without new values, those of void
        may be those of classes that do not occur (255 in a mask of 0 and 255).

        Returns:
          None if this table explains the values, or if they are too many to be classes.

        Raises:
          ValueError: they are more than a table holds.
        """
        seen = set(seen)
        new = seen.difference(self.values, self.void_values)
        void = [value for value in self.void_values if value in seen]
        absent = [value for value in self.values if value not in seen]
        names, values, void_values = [*self.names], [*self.values], [*self.void_values]
        if len(new) > _MOST_NEW or not (new or (void and absent)):
            return None
        if not new:
            for old, value in zip(absent, void, strict=False):
                values[values.index(old)] = value
                void_values.remove(value)
        elif self.num_classes in (len(seen), len(seen.difference(void))):
            values = sorted(seen if len(seen) == self.num_classes else seen.difference(void))
            void_values = [value for value in void_values if value not in values]
        else:
            further = sorted(new - {IGNORE_LABEL})
            names += [f"value_{value}" for value in further]
            values += further
            void_values += new & {IGNORE_LABEL}
        free = (colour for colour in voc_colours(256) if colour not in self.colours)
        colours = [*self.colours, *itertools.islice(free, len(names) - self.num_classes)]
        return ClassTable(names, colours if self.has_chosen_colours else (), values, void_values)

    def to_json(self) -> dict[str, Any]:
        """Returns the table as plain lists; `from_json` reads them."""
        table = dataclasses.asdict(self)
        if not (self.has_chosen_colours and self._has_voc_colours):
            del table["has_chosen_colours"]  # the colours tell it
        if self.keypoints is None:
            del table["keypoints"]
        return table

    def as_file(self) -> str:
        """Returns the text of a ``classes.json``, in one line; colours are those somebody chose."""
        table = self.to_json()
        table.pop("has_chosen_colours", None)  # who writes colours into a file chose them
        table.pop("keypoints", None)  # of annotations alone
        if not self.has_chosen_colours:
            del table["colours"]
        return json.dumps(table, ensure_ascii=False)

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> "ClassTable":
        """Builds a table from the result of `to_json`, or from some of its keys."""
        fields: dict[str, Any] = {"has_chosen_colours": False, **table}  # records of before lack it
        if fields.get("keypoints") is not None:
            fields["keypoints"] = KeypointTable(**fields["keypoints"])
        return cls(**fields)
