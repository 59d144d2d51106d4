"""The Vision Transformer for inference, see `ovseg_jax/models/vit.py`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ovseg_jax.torch.positions import resize_positions
from ovseg_jax.torch.tower import TowerOutput, count_patches, places, visible
from ovseg_jax.torch.transformer import Attention, Encoder, MlpBlock


class MAPHead(nn.Module):
    """A pooling head with one learned query."""

    def __init__(self, width: int, heads: int, mlp_dim: int, activation: str, epsilon: float):
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, width))
        self.MultiHeadDotProductAttention_0 = Attention(width, heads)
        self.LayerNorm_0 = nn.LayerNorm(width, epsilon)
        self.MlpBlock_0 = MlpBlock(width, mlp_dim, activation)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Pools all tokens [b n d], or those that are `valid` [b n], into one [b d]."""
        x = self.MultiHeadDotProductAttention_0(self.probe.expand(x.shape[0], -1, -1), x, valid)
        return (x + self.MlpBlock_0(self.LayerNorm_0(x)))[:, 0]


class ViT(nn.Module):
    """A Vision Transformer for images of any size; the arguments are the Flax module's fields.

    `adapter` holds the arguments of `Convpass` except the first.
    """

    def __init__(
        self,
        patch: int = 16,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_dim: int = 3072,
        grid: Sequence[int] = (14, 14),
        resize: str = "bicubic",
        cls: str = "placed",
        front: int = 1,
        pool: str = "cls",
        pre_norm: bool = False,
        activation: str = "gelu",
        epsilon: float = 1e-6,
        embed_dim: int = 0,
        head_bias: bool = True,
        taps: Sequence[int] = (),
        adapter: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.patch, self.grid, self.resize, self.pool, self.taps = patch, tuple(grid), resize, pool, taps
        self.first = int(cls == "placed")  # rows of the position table that belong to no patch
        self.embedding = nn.Conv2d(3, width, patch, patch, bias=not pre_norm)
        self.pos_embedding = nn.Parameter(torch.zeros(1, self.first + grid[0] * grid[1], width))
        self.cls = nn.Parameter(torch.zeros(1, front, width)) if cls != "none" else None
        self.pre_norm = nn.LayerNorm(width, epsilon) if pre_norm else None
        self.Transformer = Encoder(depth, width, heads, mlp_dim, activation, epsilon, adapter=adapter)
        self.MAPHead_0 = MAPHead(width, heads, mlp_dim, activation, epsilon) if pool == "map" else None
        self.head = nn.Linear(width, embed_dim, head_bias) if embed_dim else None

    def forward(
        self, image: Tensor, adapted: bool = True, inside: Tensor | None = None, last: str = ""
    ) -> TowerOutput:
        """Computes the embedding, the tokens and the taps.

        Args:
          image: normalised images [b 3 h w].
          adapted: whether adapters are used.
          inside: the patches [b rows columns] that may be attended to; None means all.
          last: how patch tokens attend in the last block, a member of `transformer.LAST`.

        Raises:
          UserError: a side is not a multiple of the patch.
        """
        grid = count_patches(image, self.patch)
        x = self.embedding(image.to(self.embedding.weight.dtype)).flatten(2).transpose(1, 2)
        table = self.pos_embedding[0, self.first :].unflatten(0, self.grid)
        x = x + resize_positions(table, grid, self.resize).flatten(0, 1)
        if self.cls is not None:
            cls: Tensor = self.cls
            if self.first:
                cls = torch.cat([cls[:, :1] + self.pos_embedding[:, :1], cls[:, 1:]], 1)
            x = torch.cat([cls.expand(x.shape[0], -1, -1), x], 1)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        front = x.shape[1] - grid[0] * grid[1]
        valid = visible(inside, front)
        apart = (front, last) if last else None
        x, tapped = self.Transformer(x, valid, self.taps, grid if adapted else None, apart)
        tokens = places(x, grid)
        if self.MAPHead_0 is not None:
            pooled = self.MAPHead_0(x, valid)
        elif self.pool == "cls":
            pooled = x[:, 0]
        elif inside is None:
            pooled = tokens.mean((2, 3))
        else:
            shown = inside[:, None].to(tokens.dtype)
            pooled = (tokens * shown).sum((2, 3)) / shown.sum((2, 3))
        if self.head is not None:
            pooled = self.head(pooled)
        return TowerOutput(pooled, tokens, {i: places(tap, grid) for i, tap in tapped.items()})
