"""Creation of an exported module in PyTorch, after checking that its description fits its arrays."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ovseg_jax.errors import UserError
from ovseg_jax.reading import reading

M = TypeVar("M", bound=nn.Module)

MOST = 100_000  # upper limit of numbers in a description (the number of words, which may be larger, is not in it)
# Fields that count layers, which are created one by one before any array shows that they are too many.
LAYERS = (
    *("depth", "depths", "layers", "decoder_layers", "encoder_layers"),
    *("head_convs", "levels", "blocks", "stage_sizes"),
)
MOST_LAYERS = 1000


def build(
    make: Callable[[], M],
    described: Mapping[str, Any],
    arrays: Mapping[str, Tensor],
    what: str,
    *inputs: Tensor,
) -> M:
    """Creates a module and fills it with its parameters.

    The module is first created and run on PyTorch's device "meta", which allocates nothing, since a wrong number in the
    description could otherwise use up all memory.

    Args:
      make: creates the module from `described`.
      described: its arguments, from JSON.
      arrays: its parameters by name.
      what: the name of the file in errors.
      *inputs: example inputs on the device "meta".

    Raises:
      UserError: the description is invalid, or does not fit the arrays.
    """
    with reading(what, "the exported model"):
        check_numbers(described)
        bare = _run_without_memory(make, inputs)
        expected = {name: tuple(x.shape) for name, x in bare.state_dict().items()}
        for name in sorted(expected.keys() | arrays.keys()):
            given = tuple(arrays[name].shape) if name in arrays else "missing"
            if given != expected.get(name, "not known"):
                raise ValueError(
                    f"{name} is {given}, but by its description {expected.get(name, 'not known')}"
                )
        module = make()
        module.load_state_dict(arrays, strict=True)
    return module


def _run_without_memory(make: Callable[[], M], inputs: tuple[Tensor, ...]) -> M:
    """Creates a module on the device "meta" and runs it."""
    try:
        with torch.device("meta"), torch.no_grad():
            bare = make().eval()
            bare(*inputs)
    except UserError as error:  # raised by a module, whose message does not name the file
        raise ValueError(str(error)) from error
    return bare


def check_numbers(described: Any, name: str = "") -> None:
    """Raises a ValueError if a number anywhere in a description from JSON is not finite or far too large."""
    if isinstance(described, Mapping):
        for key, value in described.items():
            check_numbers(value, key)
    elif isinstance(described, list):
        if len(described) > MOST_LAYERS:
            raise ValueError(f"{name} has {len(described)} entries, more than {MOST_LAYERS}")
        for value in described:
            check_numbers(value, name)
    elif isinstance(described, int | float):
        most = MOST_LAYERS if name in LAYERS else MOST
        if not (math.isfinite(described) and abs(described) <= most):
            raise ValueError(f"{name} is {described}, but may be at most {most}")
