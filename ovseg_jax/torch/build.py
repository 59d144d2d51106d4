"""Builds the PyTorch form of an exported module once its description is known to fit its arrays."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ovseg_jax.errors import UserError
from ovseg_jax.reading import reading

M = TypeVar("M", bound=nn.Module)

MOST = 100_000  # of any number in a description; the largest published one, words, is the size of an array instead
# Numbers of layers, which are built one by one before any array can tell that they are too many.
LAYERS = ("depth", "depths", "layers", "decoder_layers", "head_convs", "levels", "blocks", "stage_sizes")
MOST_LAYERS = 1000


def build(
    make: Callable[[], M],
    described: Mapping[str, Any],
    arrays: Mapping[str, Tensor],
    what: str,
    *inputs: Tensor,
) -> M:
    """Builds a module and fills it with its parameters.

    The module is first built and run on PyTorch's device without memory: a number that is wrong by a factor of a
    thousand would otherwise take all there is.

    Args:
      make: builds it from `described`.
      described: its arguments, from JSON.
      arrays: its parameters by name.
      what: how an error calls the file.
      *inputs: what it has to run on, on the device "meta".

    Raises:
      UserError: a description that is none, or is not that of these arrays.
    """
    with reading(what, "the exported model"):
        check_numbers(described)
        bare = _run_without_memory(make, inputs)
        expected = {name: tuple(x.shape) for name, x in bare.state_dict().items()}
        for name in sorted(expected.keys() | arrays.keys()):
            given = tuple(arrays[name].shape) if name in arrays else "missing"
            if given != expected.get(name, "not known"):
                raise ValueError(
                    f"{name} is {given}, and by its description {expected.get(name, 'not known')}"
                )
        module = make()
        module.load_state_dict(arrays, strict=True)
    return module


def _run_without_memory(make: Callable[[], M], inputs: tuple[Tensor, ...]) -> M:
    """Builds a module on the device "meta" and runs it."""
    try:
        with torch.device("meta"), torch.no_grad():
            bare = make().eval()
            bare(*inputs)
    except UserError as error:  # of a part, which does not know the file
        raise ValueError(str(error)) from error
    return bare


def check_numbers(described: Any, name: str = "") -> None:
    """Raises a ValueError if a number anywhere in a description from JSON is not finite or far too large."""
    if isinstance(described, Mapping):
        for key, value in described.items():
            check_numbers(value, key)
    elif isinstance(described, list):
        if len(described) > MOST_LAYERS:
            raise ValueError(f"{name} has {len(described)} entries")
        for value in described:
            check_numbers(value, name)
    elif isinstance(described, int | float):
        most = MOST_LAYERS if name in LAYERS else MOST
        if not (math.isfinite(described) and abs(described) <= most):
            raise ValueError(f"{name} is {described}, and may be {most} at most")
