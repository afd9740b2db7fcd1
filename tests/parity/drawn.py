"""Parameters and images that follow from names and shapes alone, the same wherever they are drawn.

Only the bits of NumPy's PCG64 are used, a stream that NumPy has promised never to change
(numpy.org/neps/nep-0019-rng-policy.html); of its distributions it has not.
"""

import hashlib
import re
from collections.abc import Mapping

import numpy as np

Shape = tuple[int, ...]

# Deviation of what goes into batch normalisation. Small as in trained networks, so that an epsilon
# of 1e-5 is seen: it is about a thousandth of the variance.
_BEFORE_NORM = 0.1
# What no normalisation follows.
_PLAIN = re.compile(
    r"(fc|(aux_)?classifier\.4|rpn|roi_heads\.(mask_predictor|box_(predictor|head\.(fc.|5))))\."
)


def uniform(name: str, shape: Shape) -> np.ndarray:
    """Returns float32 values [*shape] between -1 and 1, another set for each name and shape."""
    digest = hashlib.sha256(f"{name} {shape}".encode()).digest()
    bits = np.random.PCG64(np.random.SeedSequence(int.from_bytes(digest[:16], "little")))
    size = int(np.prod(shape))
    words = bits.random_raw((size + 1) // 2).astype("<u8").view("<u4")[:size]
    values = (words >> 8).astype(np.float32)  # 24 bits, which float32 holds exactly
    values *= np.float32(2**-23)
    values -= np.float32(1)
    return values.reshape(shape)


def parameter(name: str, shape: Shape, is_normalised: bool) -> np.ndarray:
    """Returns a parameter under torchvision's name; activations stay of order 1 behind 101 layers.

    Nothing is at its initial value: scales lie around 1, means around 0, and of the last
    normalisation of a residual block, that its shortcut may prevail, scales lie around 1/6.

    Args:
      name: key of torchvision's state dict.
      shape: of the parameter.
      is_normalised: whether batch normalisation follows the network's convolutions.
    """
    before = _BEFORE_NORM if is_normalised and not _PLAIN.match(name) else 1.0
    values = uniform(name, shape)
    if name.endswith("num_batches_tracked"):
        return np.array(1)
    if name.endswith("running_var"):
        return (1 + values / 2) * np.float32(before**2)
    if name.endswith("running_mean"):
        return values * np.float32(before / 4)
    if len(shape) > 1:  # uniform values of width 2 have the variance 1 / 3
        return values * np.float32(before * np.sqrt(6 / np.prod(shape[1:])))
    if name.endswith("bias"):
        return values / 10
    return (1 + values / 2) * np.float32(1 / 6 if ".bn3." in name else 1)


def parameters(shapes: Mapping[str, Shape]) -> dict[str, np.ndarray]:
    """Returns a whole state dict from its shapes."""
    parts = {name.split(".")[1] for name in shapes if name.endswith("running_var")}

    def is_normalised(name: str) -> bool:  # these may not be, on a trunk that is
        part = name.split(".")[1]
        return part in parts if part in ("fpn", "mask_head") else bool(parts)

    return {name: parameter(name, shape, is_normalised(name)) for name, shape in shapes.items()}


def image(height: int, width: int) -> np.ndarray:
    """Returns waves that widen from the corner, [1, height, width, 3] in -1..1, float32."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    waves = np.sin(x * (9 + x) / 90 + c) * np.cos(y * (14 - c + y) / 110 - c)
    return waves.astype(np.float32)[None]
