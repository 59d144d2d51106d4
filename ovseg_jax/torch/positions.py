"""Tables of positions, resized to other grids, see `ovseg_jax/models/positions.py`."""

import torch
from torch import Tensor

from ovseg_jax.models.position_weights import axis_weights


def resize_positions(table: Tensor, size: tuple[int, int], method: str = "bicubic") -> Tensor:
    """Resizes a position table to another grid; returns the table itself for its own grid."""
    rows, columns, _ = table.shape
    if size == (rows, columns):
        return table
    weights = (axis_weights(rows, size[0], method), axis_weights(columns, size[1], method))
    down, across = (torch.as_tensor(w, dtype=torch.float32, device=table.device) for w in weights)
    return (across @ torch.einsum("hr,rcd->hcd", down, table.float())).to(table.dtype)
