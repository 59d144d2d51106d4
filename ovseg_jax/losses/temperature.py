"""A learned temperature: a parameter on the log scale, between two bounds or free."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ovseg_jax.errors import UserError


def bounded(raw: Float[Array, ""], low: float = 0.0, high: float = 0.0) -> Float[Array, ""]:
    """Returns a positive scalar between two bounds, by a sigmoid on the log scale; without bounds, exp(raw)."""
    return low * (high / low) ** jax.nn.sigmoid(raw) if high else jnp.exp(raw)


def unbounded(value: float, low: float = 0.0, high: float = 0.0) -> Float[Array, ""]:
    """Returns the inverse of `bounded`.

    Raises:
      UserError: the value is outside of the bounds, or there is an upper bound without a positive lower one.
    """
    if high and low <= 0:
        raise UserError(
            f"loss.temperature_bounds=({low}, {high}): the lower bound must be above 0; () sets no bounds"
        )
    if not low < value < (high or float("inf")):
        raise UserError(f"loss.temperature={value} is outside its bounds ({low}, {high or 'inf'})")
    if not high:
        return jnp.log(jnp.float32(value))
    share = jnp.log(value / low) / jnp.log(high / low)
    return jnp.log(share / (1 - share))
