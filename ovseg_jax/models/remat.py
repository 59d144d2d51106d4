"""Rematerialisation: what the backward pass computes again instead of storing it."""

from collections.abc import Callable
from typing import Any, TypeVar

import flax.linen as nn
import jax

from ovseg_jax.errors import UserError

POLICIES = ("none", "dots", "all")
_DOTS = ("dot_general", "conv_general_dilated")

M = TypeVar("M", bound=type[nn.Module])


def rematerialise(module: M, policy: str, static_argnums: tuple[int, ...] = ()) -> M:
    """Wraps a module class so that the backward pass keeps what `policy` says and computes the rest again.

    Args:
      module: a class of modules; its inputs and its result are kept in any case.
      policy: "none" keeps everything; "dots" the results of matrix products and convolutions, and computes
        normalisations and activations again, which cost bandwidth alone; "all" computes everything again.
      static_argnums: arguments of `__call__` that are no arrays, counted with `self` as 0.

    Raises:
      UserError: another policy.
    """
    again, kept = _read(policy)
    return nn.remat(module, policy=kept, static_argnums=static_argnums) if again else module


def rematerialise_function(function: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """Wraps a function so that the backward pass keeps what `policy` says; see `rematerialise`."""
    again, kept = _read(policy)
    return jax.checkpoint(function, policy=kept) if again else function


def _read(policy: str) -> tuple[bool, Callable[..., bool] | None]:
    """Whether anything is computed again, and what is not."""
    if policy not in POLICIES:
        raise UserError(f"remat is one of {', '.join(POLICIES)}, not {policy!r}")
    return policy != "none", _is_dot if policy == "dots" else None


def _is_dot(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name in _DOTS
