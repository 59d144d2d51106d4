"""Interpolation weights of a table of positions on one axis, for Flax and for PyTorch."""

import numpy as np
from jaxtyping import Float

from ovseg_jax.kernels.keys import keys


def axis_weights(length: int, size: int, method: str = "bicubic") -> Float[np.ndarray, "size length"]:
    """Returns the weight of each of `length` old positions for each of `size` new ones, see `resize_positions`."""
    new = np.arange(size, dtype=np.float64)
    if method == "bilinear":
        places = new * ((length - 1) / max(size - 1, 1))
    else:
        # DINO's code adds 0.1 to the size, against rounding errors; published results include the effect.
        places = (new + 0.5) * (length / (size + 0.1 * (method == "dino"))) - 0.5
    if method in ("antialias", "triangle"):
        # Positions beyond the border are left out.
        distance = (places[:, None] - np.arange(length)) / max(length / size, 1.0)
        weights = keys(distance, a=-0.5) if method == "antialias" else _triangle(distance)
        return weights / weights.sum(1, keepdims=True)
    kernel = _triangle if method == "bilinear" else keys
    weights = np.zeros((size, length))
    for offset in (-1, 0, 1, 2):
        old = np.floor(places) + offset
        # Positions beyond the border repeat it.
        taken = np.clip(old, 0, length - 1)[:, None] == np.arange(length)
        weights += kernel(places - old)[:, None] * taken
    return weights


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, 1.0 - np.abs(x))
