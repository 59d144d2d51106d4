"""The transformer of ViT and of the text towers, with big_vision's names."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


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

    def forward(self, queries: Tensor, values: Tensor, valid: Tensor | None = None) -> Tensor:
        """Attends from each query [b q d] to all values [b n d], or to those that are `valid` [b n]."""
        query, key, value = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, x in ((self.query, queries), (self.key, values), (self.value, values))
        )
        mask = None if valid is None else valid[:, None, None, :]
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=self.causal)
        return self.out(x.transpose(1, 2).flatten(2))


class MlpBlock(nn.Module):
    """An MLP: dense, activation, dense back to the width of the input."""

    def __init__(self, width: int, mlp_dim: int, activation: str):
        super().__init__()
        self.Dense_0, self.Dense_1 = nn.Linear(width, mlp_dim), nn.Linear(mlp_dim, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """Maps each token."""
        return self.Dense_1(self.activation(self.Dense_0(x)))


class Block(nn.Module):
    """A block of attention and MLP, each with a norm before it or, in BERT's order (`post_norm`), after the sum."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_dim: int,
        activation: str,
        epsilon: float,
        causal: bool = False,
        post_norm: bool = False,
    ):
        super().__init__()
        self.post_norm = post_norm
        self.LayerNorm_0, self.LayerNorm_1 = nn.LayerNorm(width, epsilon), nn.LayerNorm(width, epsilon)
        self.MultiHeadDotProductAttention_0 = Attention(width, heads, causal)
        self.MlpBlock_0 = MlpBlock(width, mlp_dim, activation)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Maps tokens [b n d] to tokens."""
        attention = self.MultiHeadDotProductAttention_0
        if self.post_norm:
            x = self.LayerNorm_0(x + attention(x, x, valid))
            return self.LayerNorm_1(x + self.MlpBlock_0(x))
        y = self.LayerNorm_0(x)
        x = x + attention(y, y, valid)
        return x + self.MlpBlock_0(self.LayerNorm_1(x))


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
    ):
        super().__init__()
        self.depth, self.post_norm = depth, post_norm
        for i in range(depth):
            block = Block(width, heads, mlp_dim, activation, epsilon, causal, post_norm)
            self.add_module(f"encoderblock_{i}", block)
        if not post_norm:
            self.encoder_norm = nn.LayerNorm(width, epsilon)

    def forward(
        self, x: Tensor, valid: Tensor | None = None, taps: Sequence[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Returns the tokens after the norm, and those after each block of `taps`."""
        tapped = {}
        for i in range(self.depth):
            x = self.get_submodule(f"encoderblock_{i}")(x, valid)
            if i in taps:
                tapped[i] = x
        return x if self.post_norm else self.encoder_norm(x), tapped
