"""Masks as COCO's run lengths: {"size": [height, width], "counts": text}.

Runs go down the columns. The first run is of zeros and may be empty. The text holds each run as a
number in base 32, lowest digit first; from the fourth run on, the number is the difference from the
run two before.

Reference: cocodataset/cocoapi, common/maskApi.c.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Returns a mask, bool [H, W], as run lengths."""
    flat = mask.ravel(order="F").astype(bool)
    edges = np.flatnonzero(np.diff(flat, prepend=False)).tolist()
    runs = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": "".join(map(_text, _differences(runs)))}


def decode(rle: Mapping[str, Any]) -> np.ndarray:
    """Returns the mask, bool [H, W], of run lengths as text or as a list of numbers.

    Raises:
      ValueError: the runs do not fill the mask.
    """
    height, width = rle["size"]
    counts = rle["counts"]
    runs = _numbers(counts) if isinstance(counts, str) else list(counts)
    if sum(runs) != height * width or min(runs, default=0) < 0:
        raise ValueError(f"runs of {sum(runs)} pixels do not fill {height}x{width}")
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape((height, width), order="F")


def _differences(runs: list[int]) -> list[int]:
    return [run - (runs[i - 2] if i > 2 else 0) for i, run in enumerate(runs)]


def _text(number: int) -> str:
    text, more = "", True
    while more:
        digit, number = number & 31, number >> 5  # arithmetic: the sign stays
        more = number != (-1 if digit & 16 else 0)
        text += chr(48 + digit + (32 if more else 0))
    return text


def _numbers(text: str) -> list[int]:
    runs: list[int] = []
    value = shift = 0
    for character in text:
        digit = ord(character) - 48
        value |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            if digit & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs
