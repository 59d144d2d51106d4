"""A linear layer initialised as in PyTorch, which published recipes of learned prompts rely on."""

from collections.abc import Mapping

import jax
from jaxtyping import Array, Float


def linear_init(rng: jax.Array, inputs: int, outputs: int) -> dict[str, Float[Array, "..."]]:
    """Draws `kernel` [inputs outputs] and `bias` [outputs], uniform in ±1/√inputs."""
    bound, shapes = inputs**-0.5, {"kernel": (inputs, outputs), "bias": (outputs,)}
    keys = jax.random.split(rng)
    return {
        name: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def linear(params: Mapping[str, Array], x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
    """Computes x W + b."""
    return x @ params["kernel"] + params["bias"]
