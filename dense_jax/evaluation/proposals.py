"""The proposals of a network for many images, as a file that other runs take.

The file is the one of `dense_jax.data.proposals`.
"""

import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import jax
import numpy as np

from dense_jax import runs
from dense_jax.data.dataset import Example
from dense_jax.errors import UserError
from dense_jax.train import processes


class Examples(Protocol):
    """Images by number; they have a "name" and an "image"."""

    def __len__(self) -> int:
        """Returns their number."""
        ...

    def __getitem__(self, index: int) -> Example:
        """Returns one of them."""
        ...


def write(path: str | os.PathLike[str], boxes: Mapping[str, np.ndarray]) -> None:
    """Writes boxes [N, 4] of each image, in hundredths of a pixel; those without an area not.

    Raises:
      UserError: the file cannot be written.
    """
    try:
        with runs.replacing(pathlib.Path(path)) as stream:
            for i, (name, own) in enumerate(boxes.items()):
                own = np.round(np.asarray(own, float), 2)
                kept = own[(own[:, :2] < own[:, 2:]).all(axis=1)]
                entry = f"{json.dumps(name)}: {json.dumps(kept.tolist())}"
                stream.write((",\n" if i else "{").encode() + entry.encode())
            stream.write(b"}" if boxes else b"{}")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): give another file"
        ) from error


def of_sources(
    propose: Callable[[np.ndarray], np.ndarray], sources: Sequence[Examples]
) -> dict[str, np.ndarray]:
    """Returns the boxes of all images of some splits; of many processes, each does its share.

    Args:
      propose: (image uint8 [H, W, 3]) -> boxes [N, 4].
      sources: the splits.

    Raises:
      UserError: two images have one name, so that a file cannot tell them apart.
    """
    pairs = [(source, i) for source in sources for i in range(len(source))]
    found = []
    for source, i in pairs[jax.process_index() :: jax.process_count()]:
        example = source[i]
        found.append((example["name"], propose(example["image"])))
    if jax.process_count() > 1:
        lists = processes.from_all([(name, boxes.tolist()) for name, boxes in found])
        found = [(name, np.array(x, float).reshape(-1, 4)) for own in lists for name, x in own]
    table = dict(found)
    if len(table) < len(found):
        names = [name for name, _ in found]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(
            f"two images of the dataset are named {twice!r}, and proposals go by names: rename one"
        )
    return table
