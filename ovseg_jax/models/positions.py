"""Tables of positions, resized to grids of another size than in training."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ovseg_jax.errors import UserError
from ovseg_jax.models.position_weights import axis_weights

RESIZES = ("bicubic", "dino", "bilinear", "antialias", "triangle")


def resize_positions(
    table: Float[Array, "r c d"], size: tuple[int, int], method: str = "bicubic"
) -> Float[Array, "h w d"]:
    """Resizes a position table to another grid; returns the table itself for its own grid.

    Args:
      table: one vector for each cell of a grid, float32.
      size: rows and columns of the new grid.
      method: "bicubic" as in PyTorch's `interpolate` and Hugging Face (a = -0.75, half-pixel centres, repeated border);
        "dino", the same with DINO's own scale; "bilinear" as in big_vision, with aligned corners; "antialias" as in
        timm and open_clip (a = -0.5, wider kernels if the grid shrinks); "triangle" as in TIPS, bilinear with
        half-pixel centres and wider kernels if the grid shrinks.

    Raises:
      UserError: the method is unknown.
    """
    if method not in RESIZES:
        raise UserError(f"resize={method!r} of a position table is not one of {', '.join(RESIZES)}")
    rows, columns, _ = table.shape
    if size == (rows, columns):
        return table
    down = jnp.asarray(axis_weights(rows, size[0], method), table.dtype)
    across = jnp.asarray(axis_weights(columns, size[1], method), table.dtype)
    return jnp.einsum("hr,wc,rcd->hwd", down, across, table, precision=jax.lax.Precision.HIGHEST)
