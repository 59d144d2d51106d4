"""Rematerialisation: recomputation in the backward pass instead of storage."""

from collections.abc import Callable
from typing import Any, TypeVar

import flax.linen as nn
import jax

from ovseg_jax.errors import UserError

POLICIES = ("none", "dots", "all")
_DOTS = ("dot_general", "conv_general_dilated")

M = TypeVar("M", bound=type[nn.Module])


def rematerialise(module: M, policy: str, static_argnums: tuple[int, ...] = ()) -> M:
    """Wraps a module class so that the backward pass keeps what `policy` says and recomputes the rest.

    Args:
      module: a class of modules; its inputs and its result are always kept.
      policy: "none" keeps everything; "dots" keeps the results of matrix products and convolutions, and recomputes
        normalisations and activations, which only cost bandwidth; "all" recomputes everything.
      static_argnums: positions of the arguments of `__call__` that are not arrays, with `self` as 0.

    Raises:
      UserError: the policy is unknown.
    """
    again, kept = _read(policy)
    return nn.remat(module, policy=kept, static_argnums=static_argnums) if again else module


def rematerialise_function(function: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """Wraps a function so that the backward pass keeps what `policy` says; see `rematerialise`."""
    again, kept = _read(policy)
    return jax.checkpoint(function, policy=kept) if again else function


def _read(policy: str) -> tuple[bool, Callable[..., bool] | None]:
    """Returns whether anything is recomputed, and the policy for what is kept."""
    if policy not in POLICIES:
        raise UserError(f"remat={policy!r} is not one of {', '.join(POLICIES)}")
    return policy != "none", _is_dot if policy == "dots" else None


def _is_dot(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name in _DOTS
