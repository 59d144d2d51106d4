"""Tables of positions for grids of another size than the one that they were trained on."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ovseg_jax.errors import UserError

RESIZES = ("bicubic", "dino", "bilinear", "antialias")


def resize_positions(
    table: Float[Array, "r c d"], size: tuple[int, int], method: str = "bicubic"
) -> Float[Array, "h w d"]:
    """A position table for another grid; for its own grid, the table itself.

    Args:
      table: one vector for each place of a grid, float32.
      size: rows and columns of the new grid.
      method: "bicubic" as PyTorch's `interpolate` and Hugging Face do it: a = -0.75, centres of pixels, repeated
        border; "dino", the same with DINO's own scale; "bilinear" as big_vision does it: corners stay corners;
        "antialias" as timm and open_clip do it: bicubic with a = -0.5, and wider kernels where the grid shrinks.

    Raises:
      UserError: another method.
    """
    if method not in RESIZES:
        raise UserError(f"resize is {method!r}; known are {', '.join(RESIZES)}")
    rows, columns, channels = table.shape
    if size == (rows, columns):
        return table
    if method == "antialias":
        return jax.image.resize(table, (*size, channels), "cubic", antialias=True)
    down = jnp.asarray(axis_weights(rows, size[0], method), table.dtype)
    across = jnp.asarray(axis_weights(columns, size[1], method), table.dtype)
    return jnp.einsum("hr,wc,rcd->hwd", down, across, table, precision=jax.lax.Precision.HIGHEST)


def axis_weights(length: int, size: int, method: str = "bicubic") -> Float[np.ndarray, "size length"]:
    """What each of `size` new places takes from the `length` old ones, as float64."""
    new = np.arange(size, dtype=np.float64)
    if method == "bilinear":
        places = new * ((length - 1) / max(size - 1, 1))
    else:
        # DINO's code divides by a size with a tenth added, against rounding, and is published with what that does.
        places = (new + 0.5) * (length / (size + 0.1 * (method == "dino"))) - 0.5
    kernel = _triangle if method == "bilinear" else _cubic
    weights = np.zeros((size, length))
    for offset in (-1, 0, 1, 2):
        old = np.floor(places) + offset
        # Beyond the border stands the border again.
        np.add.at(weights, (np.arange(size), np.clip(old, 0, length - 1).astype(int)), kernel(places - old))
    return weights


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, 1.0 - np.abs(x))


def _cubic(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Cubic convolution (Keys 1981), whose own a is -0.5, as in `jax.image.resize`."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
