"""The transformer of ViT and of the text towers, with big_vision's names."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
}


# How patch tokens attend in the last block of a tower, see `Block` of `ovseg_jax/models/transformer.py`.
LAST = ("", "value", "sclip", "clearclip")
Apart = tuple[int, str]
"""The first of the tokens that attend in another way, and that way, a member of `LAST` other than ""."""


def mix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    apart: Apart | None = None,
) -> Tensor:
    """Attends with heads [b h n e], see `attend` of `ovseg_jax/models/transformer.py`; returns [b n h*e]."""
    own = None if apart is None else apart[0]
    x = F.scaled_dot_product_attention(query[:, :, :own], key, value, attn_mask=mask, is_causal=causal)
    if apart is not None:
        ways: dict[str, list[Tensor]] = {"value": [], "sclip": [query, key], "clearclip": [query]}
        rest = [
            F.scaled_dot_product_attention(y[:, :, own:], y, value, attn_mask=mask) for y in ways[apart[1]]
        ]
        x = torch.cat([x, torch.stack(rest).sum(0) if rest else value[:, :, own:]], 2)
    return x.transpose(1, 2).flatten(2)


def attended_alone(x: Tensor, attended: Tensor, apart: Apart | None) -> Tensor:
    """Returns a block's tokens; for "clearclip", those from `apart` on are the output of attention alone."""
    if apart is None or apart[1] != "clearclip":
        return x
    return torch.cat([x[:, : apart[0]], attended[:, apart[0] :]], 1)


class Attention(nn.Module):
    """Multi-head attention.

    Args:
      width: channels of a token.
      heads: number of heads; divides the width.
      causal: whether tokens do not attend to later ones.
    """

    def __init__(self, width: int, heads: int, causal: bool = False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(
        self, queries: Tensor, values: Tensor, valid: Tensor | None = None, apart: Apart | None = None
    ) -> Tensor:
        """Attends from each query [b q d] to all values [b n d], or to those that are `valid` [b n]."""
        query, key, value = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, x in ((self.query, queries), (self.key, values), (self.value, values))
        )
        mask = None if valid is None else valid[:, None, None, :]
        return self.out(mix(query, key, value, mask, self.causal, apart))


class MlpBlock(nn.Module):
    """An MLP: dense, activation (or SwiGLU), dense back to the width of the input."""

    def __init__(self, width: int, mlp_dim: int, activation: str):
        super().__init__()
        self.Dense_0, self.Dense_1 = nn.Linear(width, mlp_dim), nn.Linear(mlp_dim, width)
        self.gate = nn.Linear(width, mlp_dim) if activation == "swiglu" else None
        self.activation = F.silu if activation == "swiglu" else ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """Maps each token."""
        if self.gate is not None:
            return self.Dense_1(self.activation(self.gate(x)) * self.Dense_0(x))
        return self.Dense_1(self.activation(self.Dense_0(x)))


class Convpass(nn.Module):
    """An adapter of a frozen tower, see `ovseg_jax/models/convpass.py`.

    Args:
      features: channels of a token.
      width, activation: see the Flax module.
      scale: factor on the output.
    """

    def __init__(self, features: int, width: int, activation: str, scale: float):
        super().__init__()
        self.down, self.up = nn.Linear(features, width), nn.Linear(width, features)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.activation, self.scale = ACTIVATIONS[activation], scale

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Maps tokens [b n d], of which the last rows * columns are patches, to what is added to the branch."""
        y = self.activation(self.down(x))
        first = y.shape[1] - grid[0] * grid[1]
        # A class token is an image of one pixel, which only meets the middle of the kernel.
        single = F.linear(y[:, :first], self.conv.weight[:, :, 1, 1], self.conv.bias)
        patches = self.conv(y[:, first:].transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        return self.scale * self.up(self.activation(torch.cat([single, patches], 1)))


class Adapted(nn.Module):
    """A block that may have adapters beside attention and MLP.

    Args:
      width: channels of a token.
      adapter: arguments of `Convpass` without the first; None for no adapters.
    """

    def __init__(self, width: int, adapter: Mapping[str, Any] | None):
        super().__init__()
        self.adapter_attention = Convpass(width, **adapter) if adapter else None
        self.adapter_mlp = Convpass(width, **adapter) if adapter else None

    def beside(self, branch: str, x: Tensor, grid: tuple[int, int] | None) -> Tensor | float:
        """Returns the output of a branch's adapter, 0.0 if there is none or `grid` is None."""
        adapter = self.adapter_attention if branch == "attention" else self.adapter_mlp
        return 0.0 if adapter is None or grid is None else adapter(x, grid)


class Block(Adapted):
    """A block of attention and MLP, each with a norm before it or, in BERT's order (`post_norm`), after the sum.

    BERT's has no adapters.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_dim: int,
        activation: str,
        epsilon: float,
        causal: bool = False,
        post_norm: bool = False,
        adapter: Mapping[str, Any] | None = None,
    ):
        super().__init__(width, adapter)
        self.post_norm = post_norm
        self.LayerNorm_0, self.LayerNorm_1 = nn.LayerNorm(width, epsilon), nn.LayerNorm(width, epsilon)
        self.MultiHeadDotProductAttention_0 = Attention(width, heads, causal)
        self.MlpBlock_0 = MlpBlock(width, mlp_dim, activation)

    def forward(
        self,
        x: Tensor,
        valid: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        apart: Apart | None = None,
    ) -> Tensor:
        """Maps tokens [b n d] to tokens, with the adapters for a `grid` of patches."""
        attention = self.MultiHeadDotProductAttention_0
        if self.post_norm:
            x = self.LayerNorm_0(x + attention(x, x, valid))
            return self.LayerNorm_1(x + self.MlpBlock_0(x))
        y = self.LayerNorm_0(x)
        attended = attention(y, y, valid, apart) + self.beside("attention", y, grid)
        x = x + attended
        y = self.LayerNorm_1(x)
        return attended_alone(x + self.MlpBlock_0(y) + self.beside("mlp", y, grid), attended, apart)


class Encoder(nn.Module):
    """A sequence of blocks, with a final norm unless blocks end in one; for the other arguments see `Block`."""

    def __init__(
        self,
        depth: int,
        width: int,
        heads: int,
        mlp_dim: int,
        activation: str,
        epsilon: float,
        causal: bool = False,
        post_norm: bool = False,
        adapter: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.depth, self.post_norm = depth, post_norm
        for i in range(depth):
            block = Block(width, heads, mlp_dim, activation, epsilon, causal, post_norm, adapter)
            self.add_module(f"encoderblock_{i}", block)
        if not post_norm:
            self.encoder_norm = nn.LayerNorm(width, epsilon)

    def forward(
        self,
        x: Tensor,
        valid: Tensor | None = None,
        taps: Sequence[int] = (),
        grid: tuple[int, int] | None = None,
        apart: Apart | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Returns the tokens after the norm, and those after each block of `taps`; `apart` is for the last block."""
        tapped = {}
        for i in range(self.depth):
            x = self.get_submodule(f"encoderblock_{i}")(
                x, valid, grid, apart if i == self.depth - 1 else None
            )
            if i in taps:
                tapped[i] = x
        return x if self.post_norm else self.encoder_norm(x), tapped
