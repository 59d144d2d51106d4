"""Convpass adapters (Jie & Deng 2022) beside attention and MLP in every block of a frozen tower (papers/003, eq. 4)."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from ovseg_jax.errors import UserError
from ovseg_jax.models.transformer import ACTIVATIONS, Places

# The paths of adapters' parameters.
ADAPTERS = r"(^|/)adapter_(attention|mlp)/"


def _centre(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Float[Array, "3 3 c c"]:
    """Returns the kernel of a convolution that changes nothing."""
    del key
    return jnp.zeros(shape, dtype).at[1, 1].set(jnp.eye(shape[2], shape[3], dtype=dtype))


class Convpass(nn.Module):
    """An adapter: down-projection, activation, 3x3 convolution on the grid, activation, dropout, up-projection.

    Class tokens, and prompts behind the patches, pass through the same convolution, each as an image of one pixel. The
    up-projection starts as zeros, so that a new adapter adds nothing, and the convolution as the identity, as in the
    authors' code. Where tokens were clustered, the convolution sees the whole grid, each place with its token's value.

    Attributes:
      width: channels inside; 8 in the authors' code.
      activation: a key of `ACTIVATIONS`: "gelu" in papers/003, "quick_gelu" in the authors' code.
      dropout: probability of dropout, for training (needs the rng `dropout`).
      dtype: compute type; parameters are float32.
    """

    width: int = 8
    activation: str = "gelu"
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], places: Places) -> Float[Array, "b n d"]:
        """Computes the addition to a branch's output."""
        act, (rows, columns) = ACTIVATIONS[self.activation], places.grid
        down = nn.Dense(
            self.width, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform(), name="down"
        )
        conv = nn.Conv(self.width, (3, 3), padding=1, dtype=self.dtype, kernel_init=_centre, name="conv")
        up = nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=nn.initializers.zeros, name="up")
        y = act(down(x))
        first, end = places.first, places.first + places.count

        def single(tokens: Array) -> Array:
            return conv(tokens.reshape(-1, 1, 1, self.width)).reshape(tokens.shape)

        grid = places.unfold(y)[:, first:]
        patches = conv(grid.reshape(-1, rows, columns, self.width)).reshape(grid.shape)
        if places.kept is not None:
            patches = jnp.take_along_axis(patches, places.kept[..., None], axis=1)
        parts = [single(y[:, :first])] * bool(first) + [patches]
        parts += [single(y[:, end:])] * (y.shape[1] > end)
        y = act(jnp.concatenate(parts, axis=1))
        if self.dropout:
            y = nn.Dropout(self.dropout, deterministic=False)(y)
        return up(y)


def all_but_adapters(prefix: str = "") -> str:
    """Returns a regex of a tower's parameters except its adapters', for rules such as (regex, None).

    Args:
      prefix: the path of the tower among the parameters, such as "image/".
    """
    return rf"^{prefix}(?!(.*/)?adapter_(attention|mlp)/)"


def with_convpass(
    tower: Any,
    *,
    width: int = 8,
    activation: str = "gelu",
    dropout: float = 0.1,
    scale: float = 0.1,
    train: bool = False,
) -> Any:
    """Returns a copy of an image tower with adapters beside both branches of every block.

    The input of an adapter is that of its branch: the norm's output, or the block's input for post-norm (E/14).

    Args:
      tower: a `ViT` or `Eva`.
      width, activation: see `Convpass`.
      dropout: probability of dropout, if `train`; 0.1 in the authors' code.
      scale: factor on the adapters' output, s of papers/003, eq. 4.
      train: whether dropout is on. Parameters are the same with and without.

    Raises:
      UserError: a value is invalid.
    """
    if width < 1:
        raise UserError(f"adapter.width={width} is less than 1")
    if activation not in ACTIVATIONS:
        raise UserError(f"adapter.activation={activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if not 0 <= dropout < 1:
        raise UserError(f"adapter.dropout={dropout} is not in [0, 1)")
    adapter = partial(
        Convpass,
        width=width,
        activation=activation,
        dropout=dropout if train else 0.0,
        dtype=tower.dtype,
    )
    return tower.clone(adapter=adapter, adapter_scale=scale)
