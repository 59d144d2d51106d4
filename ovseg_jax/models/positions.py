"""Tables of positions for grids of another size than the one that they were trained on."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ovseg_jax.errors import UserError
from ovseg_jax.models.position_weights import axis_weights

RESIZES = ("bicubic", "dino", "bilinear", "antialias")


def resize_positions(
    table: Float[Array, "r c d"], size: tuple[int, int], method: str = "bicubic"
) -> Float[Array, "h w d"]:
    """Resizes a position table to another grid; for its own grid, returns the table itself.

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
    rows, columns, _ = table.shape
    if size == (rows, columns):
        return table
    down = jnp.asarray(axis_weights(rows, size[0], method), table.dtype)
    across = jnp.asarray(axis_weights(columns, size[1], method), table.dtype)
    return jnp.einsum("hr,wc,rcd->hwd", down, across, table, precision=jax.lax.Precision.HIGHEST)
