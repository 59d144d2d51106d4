"""Image towers of EVA-CLIP for inference, see `ovseg_jax/models/eva.py`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovseg_jax.torch.layers import LayerNorm
from ovseg_jax.torch.positions import resize_positions
from ovseg_jax.torch.tower import TowerOutput, count_patches, places, visible
from ovseg_jax.torch.transformer import Adapted, Apart, attended_alone, mix


def rotary_table(rows: int, columns: int, grid: int, size: int, device: torch.device) -> Tensor:
    """Returns cosines and sines [2 1+rows*columns size] of the angles by which `rotate` turns channel pairs."""
    index = lambda length: torch.arange(length, dtype=torch.float32, device=device)
    rates = 10000.0 ** (-index(size // 4) / (size // 4))
    y = index(rows)[:, None, None] * (grid / rows) * rates
    x = index(columns)[None, :, None] * (grid / columns) * rates
    angles = torch.cat([y.expand(rows, columns, -1), x.expand(rows, columns, -1)], -1)
    angles = F.pad(angles.flatten(0, 1).repeat_interleave(2, -1), (0, 0, 1, 0))
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotates each pair of neighbouring channels of each token of [b h n d] by its angle, in float32."""
    y = x.float()
    first, second = y.unflatten(-1, (-1, 2)).unbind(-1)
    neighbours = torch.stack([-second, first], -1).flatten(-2)
    return (y * table[0] + neighbours * table[1]).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention among all tokens; keys have no bias."""

    def __init__(self, width: int, heads: int, inner_norm: bool):
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.inner_norm = LayerNorm(width) if inner_norm else None

    def forward(
        self,
        x: Tensor,
        rotary: Tensor | None,
        valid: Tensor | None = None,
        apart: Apart | None = None,
    ) -> Tensor:
        """Mixes tokens [b n d], those `valid` [b n]; `rotary` is a `rotary_table` for queries and keys."""
        query, key, value = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        mask = None if valid is None else valid[:, None, None, :]
        mixed = mix(query, key, value, mask, apart=apart)
        return self.out(mixed if self.inner_norm is None else self.inner_norm(mixed))


class Mlp(nn.Module):
    """An MLP: fc2(norm(gelu(fc1(x)))), or fc2(norm(silu(gate(x)) * fc1(x)))."""

    def __init__(self, width: int, hidden: int, swiglu: bool, mlp_norm: bool):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.gate = nn.Linear(width, hidden) if swiglu else None
        self.norm = LayerNorm(hidden) if mlp_norm else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps each token."""
        y = self.fc1(x)
        y = F.gelu(y) if self.gate is None else F.silu(self.gate(x)) * y
        return self.fc2(y if self.norm is None else self.norm(y))


class Block(Adapted):
    """A block: x + branch(norm(x)) for attention, then for the MLP; x + norm(branch(x)) with `post_norm`."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        swiglu: bool,
        attn_norm: bool,
        mlp_norm: bool,
        post_norm: bool,
        adapter: Mapping[str, Any] | None = None,
    ):
        super().__init__(width, adapter)
        self.post_norm = post_norm
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.attn = Attention(width, heads, attn_norm)
        self.mlp = Mlp(width, hidden, swiglu, mlp_norm)

    def forward(
        self,
        x: Tensor,
        rotary: Tensor | None,
        grid: tuple[int, int] | None = None,
        valid: Tensor | None = None,
        apart: Apart | None = None,
    ) -> Tensor:
        """Maps all tokens [b n d], with the adapters for a `grid` of patches."""
        if self.post_norm:
            attended = self.norm1(self.attn(x, rotary, valid, apart)) + self.beside("attention", x, grid)
            x = x + attended
            return attended_alone(x + self.norm2(self.mlp(x)) + self.beside("mlp", x, grid), attended, apart)
        y = self.norm1(x)
        attended = self.attn(y, rotary, valid, apart) + self.beside("attention", y, grid)
        x = x + attended
        y = self.norm2(x)
        return attended_alone(x + self.mlp(y) + self.beside("mlp", y, grid), attended, apart)


class Eva(nn.Module):
    """An image tower of EVA-CLIP for images of any size; the arguments are the Flax module's fields.

    `adapter` holds the arguments of `Convpass` except the first.
    """

    def __init__(
        self,
        patch: int = 16,
        grid: int = 14,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        hidden: int = 3072,
        embed_dim: int = 512,
        rope_grid: int | None = None,
        swiglu: bool = False,
        attn_norm: bool = False,
        mlp_norm: bool = False,
        post_norm: bool = False,
        taps: Sequence[int] = (),
        adapter: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.patch, self.grid, self.depth, self.taps = patch, grid, depth, taps
        self.rope_grid, self.head_size = rope_grid, width // heads
        self.embedding = nn.Conv2d(3, width, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embedding = nn.Parameter(torch.zeros(1, 1 + grid**2, width))
        for i in range(depth):
            block = Block(width, heads, hidden, swiglu, attn_norm, mlp_norm, post_norm, adapter)
            self.add_module(f"blocks_{i}", block)
        self.norm, self.head = LayerNorm(width), nn.Linear(width, embed_dim)

    def forward(
        self, image: Tensor, adapted: bool = True, inside: Tensor | None = None, last: str = ""
    ) -> TowerOutput:
        """Embeds images; for the arguments see `ViT.forward` of `ovseg_jax/torch/vit.py`.

        Raises:
          UserError: a side is not a multiple of the patch.
        """
        grid = count_patches(image, self.patch)
        x = self.embedding(image.to(self.embedding.weight.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        table = self.pos_embedding[0, 1:].unflatten(0, (self.grid, self.grid))
        patches = resize_positions(table, grid).flatten(0, 1)
        x = x + torch.cat([self.pos_embedding[:, :1], patches[None]], 1)
        rotary = None
        if self.rope_grid is not None:
            rotary = rotary_table(*grid, self.rope_grid, self.head_size, x.device)
        taps, valid = {}, visible(inside, 1)
        for i in range(self.depth):
            apart = (1, last) if last and i == self.depth - 1 else None
            x = self.get_submodule(f"blocks_{i}")(x, rotary, grid if adapted else None, valid, apart)
            if i in self.taps:
                taps[i] = places(x, grid)
        x = self.norm(x)
        return TowerOutput(self.head(x[:, 0]), places(x, grid), taps)
