"""Conversion of our parameters to PyTorch's layouts and back; modules keep their names, and values do not change.

Convolutions [h w c d] become [d c h w], dense kernels [c d] become [d c], maps of positions [h w d] become [d h w], and
attention's axes of heads and channels become one.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ovseg_jax.errors import UserError
from ovseg_jax.models.hooks import HOOKS

# Flax's last name -> PyTorch's.
_NAMES = {
    **dict.fromkeys(("kernel", "scale", "embedding"), "weight"),
    **{"mean": "running_mean", "var": "running_var"},
}
# Fields of our modules without effect on inference.
_TRAINING = ("parent", "name", "dtype", "remat", "scan", "drop_rate")
_HEADS = re.compile(r"(query|key|value|out)(_\d+)?")


def to_torch(parameters: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts parameters by path, `decoder/query_0/kernel`, to a state dictionary, `decoder.query_0.weight`."""
    out = {}
    for path, value in parameters.items():
        order, joined = _layout(path, np.shape(value))
        out[torch_name(path)] = np.array(np.reshape(value, joined).transpose(order), order="C")
    return out


def from_torch(state: Mapping[str, np.ndarray], shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Converts a state dictionary back to parameters of these shapes by path: the inverse of `to_torch`.

    Raises:
      ValueError: an array has another number of values than its shape.
    """
    out = {}
    for path, shape in shapes.items():
        order, _ = _layout(path, shape)
        out[path] = np.array(
            np.asarray(state[torch_name(path)]).transpose(np.argsort(order)).reshape(shape), order="C"
        )
    return out


def describe(module: Any) -> dict[str, Any]:
    """Describes a module for JSON and for its PyTorch form: `kind`, the name of its class, and its fields.

    Raises:
      UserError: the module has hooks, which have no PyTorch form.
    """
    if used := [hook for hook in ("adapter", "between", "last") if getattr(module, hook, None)]:
        raise UserError(f"a {type(module).__name__} with {used[0]!r} cannot be exported to PyTorch")
    fields = {
        field.name: getattr(module, field.name)
        for field in dataclasses.fields(module)
        if field.name not in (*_TRAINING, *HOOKS)
    }
    inner = {k: describe(v) if dataclasses.is_dataclass(v) else v for k, v in fields.items()}
    return {"kind": type(module).__name__, **inner}


def describe_adapted(tower: Any) -> dict[str, Any]:
    """Describes a tower of CLIP, see `describe`, and as `adapter` the arguments of its adapters, if it has some."""
    if getattr(tower, "adapter", None) is None:
        return describe(tower)
    inside = {key: tower.adapter.keywords[key] for key in ("width", "activation")}
    return dict(describe(tower.clone(adapter=None)), adapter=dict(inside, scale=tower.adapter_scale))


def torch_name(path: str) -> str:
    """Converts `a/b/kernel` to `a.b.weight`."""
    *scope, last = path.split("/")
    return ".".join([*scope, _NAMES.get(last, last)])


def _layout(path: str, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the permutation of the axes, and the shape with joined axes of heads to apply it to."""
    *scope, last = path.split("/")
    shape = tuple(shape)
    attention = _HEADS.fullmatch(scope[-1]) if scope else None
    if attention and last == "kernel" and len(shape) == 3:
        a, b, c = shape
        shape = (a * b, c) if attention[1] == "out" else (a, b * c)
    elif attention and last == "bias":
        shape = (int(np.prod(shape)),)
    orders = (
        {4: (3, 2, 0, 1), 2: (1, 0)} if last == "kernel" else {3: (2, 0, 1)} if last == "position" else {}
    )
    return orders.get(len(shape), tuple(range(len(shape)))), shape
