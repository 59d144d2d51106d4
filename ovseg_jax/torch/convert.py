"""Flax parameters as a PyTorch state dictionary, and back: names stay, layouts change."""

from collections.abc import Mapping

import numpy as np

# Flax's last name -> PyTorch's.
_NAMES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
# Kernels that Flax keeps with an axis of heads: which of their axes PyTorch joins.
_HEADS = {"query": (1, 2), "key": (1, 2), "value": (1, 2), "out": (0, 1)}


def to_torch(parameters: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters by path, `decoder/query_0/kernel`, as PyTorch names and lays them out.

    Convolutions [h w c d] become [d c h w], dense kernels [c d] become [d c], maps [h w d] become [d h w], and the
    heads of attention are joined.
    """
    out = {}
    for path, value in parameters.items():
        *scope, last = path.split("/")
        value = np.asarray(value)
        heads = _HEADS.get(scope[-1].rpartition("_")[0]) if scope else None
        if heads and last == "kernel" and value.ndim == 3:
            value = (
                value.reshape(value.shape[0], -1) if heads == (1, 2) else value.reshape(-1, value.shape[2])
            )
        elif heads and last == "bias":
            value = value.reshape(-1)
        if last == "kernel":
            value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        elif value.ndim == 3:
            value = value.transpose(2, 0, 1)
        out[".".join([*scope, _NAMES.get(last, last)])] = np.array(value, order="C")
    return out
