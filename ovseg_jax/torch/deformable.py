"""Mask2Former's pixel decoder for inference, see `ovseg_jax/models/deformable.py`."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovseg_jax.torch.layers import Conv, resize_within
from ovseg_jax.torch.maskformer import GroupNorm, cells_inside, sine_positions


def cell_counts(image_size: Tensor, x: Tensor, level: str) -> Tensor:
    """Counts the rows and columns [b 2] of a map [b c h w] that begin within each image."""
    stride = 2 ** int(level[1:])
    counts = torch.div(image_size + stride - 1, stride, rounding_mode="floor")
    return torch.stack([counts[:, i].clamp(max=x.shape[2 + i]) for i in range(2)], 1)


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention by `grid_sample`."""

    def __init__(self, width: int, heads: int, points: int, levels: int):
        super().__init__()
        self.split = (heads, levels, points)
        count = heads * levels * points
        self.offsets, self.weights = nn.Linear(width, 2 * count), nn.Linear(width, count)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(
        self,
        queries: Tensor,
        values: Tensor,
        reference: Tensor,
        valid: Sequence[Tensor],
        counts: Sequence[Tensor],
    ) -> Tensor:
        """Attends from each query [b q d] to points around its place in all levels; see the Flax module.

        Args:
          queries: one for each cell of all levels.
          values: [b q d], the cells.
          reference: [b q 2], (x, y) of each query as shares of the image's width and height.
          valid: for each level, the cells [b h w] within the images; the others count as zero.
          counts: for each level, the rows and columns [b 2] of those.
        """
        heads, levels, points = self.split
        offsets = self.offsets(queries).float().unflatten(-1, (heads, levels, points, 2))
        weights = torch.softmax(self.weights(queries).float().unflatten(-1, (heads, -1)), -1)
        weights = weights.unflatten(-1, (levels, points))
        values = self.value(values)
        parts, start = [], 0
        for i, (inside, count) in enumerate(zip(valid, counts, strict=True)):
            h, w = inside.shape[1:]
            cells = values[:, start : start + h * w] * inside.flatten(1)[..., None]
            start += h * w
            # In grid_sample, -1 and 1 are the outer edges of the whole map.
            own = (reference * count[:, None].flip(-1))[:, :, None, None] + offsets[:, :, :, i]
            place = torch.stack([own[..., 0] * 2 / w - 1, own[..., 1] * 2 / h - 1], -1)
            by_head = cells.transpose(1, 2).unflatten(1, (heads, -1)).unflatten(3, (h, w)).flatten(0, 1)
            sampled = F.grid_sample(by_head, place.transpose(1, 2).flatten(0, 1), align_corners=False)
            share = weights[:, :, :, i].transpose(1, 2).flatten(0, 1)[:, None]
            parts.append((sampled * share).sum(-1))  # [b*heads d/heads q]
        total = torch.stack(parts).sum(0).unflatten(0, (-1, heads)).flatten(1, 2)
        return self.out(total.transpose(1, 2))


class DeformableLayer(nn.Module):
    """A post-norm layer of the encoder: deformable self-attention and an MLP."""

    def __init__(self, width: int, heads: int, points: int, levels: int, ffn: int):
        super().__init__()
        self.attention = DeformableAttention(width, heads, points, levels)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp_in, self.mlp_out = nn.Linear(width, ffn), nn.Linear(ffn, width)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        reference: Tensor,
        valid: Sequence[Tensor],
        counts: Sequence[Tensor],
    ) -> Tensor:
        """Maps the cells [b s d] of all levels; for the arguments see `DeformableAttention`."""
        x = self.attention_norm(x + self.attention(x + position, x, reference, valid, counts))
        return self.mlp_norm(x + self.mlp_out(F.relu(self.mlp_in(x))))


class DeformablePixelDecoder(nn.Module):
    """The encoder of the coarse maps and one level of an FPN."""

    def __init__(
        self,
        channels: Mapping[str, int],
        width: int,
        mask_dim: int,
        layers: int,
        heads: int,
        points: int,
        ffn: int,
    ):
        super().__init__()
        self.finest, *coarse = sorted(channels)
        self.levels, self.layers = coarse[::-1], layers
        for level in self.levels:
            self.add_module(f"input_{level}", Conv(channels[level], width, 1))
            self.add_module(f"input_norm_{level}", GroupNorm(width))
        self.level_embedding = nn.Parameter(torch.empty(len(self.levels), width).normal_())
        for i in range(layers):
            self.add_module(f"layer_{i}", DeformableLayer(width, heads, points, len(self.levels), ffn))
        self.add_module(f"lateral_{self.finest}", Conv(channels[self.finest], width, 1, bias=False))
        self.add_module(f"lateral_norm_{self.finest}", GroupNorm(width))
        self.add_module(f"output_{self.finest}", Conv(width, width, 3, bias=False))
        self.add_module(f"output_norm_{self.finest}", GroupNorm(width))
        self.mask_features = Conv(width, mask_dim, 1)

    def forward(self, features: Mapping[str, Tensor], image_size: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the mask features [b mask_dim h w], and the coarse maps [b width h w] by level."""
        part = self.get_submodule
        valid = {level: cells_inside(image_size, x, level) for level, x in features.items()}
        counts = {level: cell_counts(image_size, x, level) for level, x in features.items()}
        tokens, positions, places = [], [], []
        for embedding, level in zip(self.level_embedding, self.levels, strict=True):
            x = part(f"input_norm_{level}")(part(f"input_{level}")(features[level]), valid[level])
            tokens.append(x.flatten(2).transpose(1, 2))
            position = sine_positions(valid[level], x.shape[1]).to(x.dtype) + embedding
            positions.append(position.flatten(1, 2))
            rows, columns = (torch.arange(n, device=x.device) + 0.5 for n in x.shape[2:])
            grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).flatten(0, 1)  # (x, y)
            places.append(grid / counts[level].clamp(min=1)[:, None].flip(-1))
        x, position, reference = (torch.cat(each, 1) for each in (tokens, positions, places))
        inside, count = ([by[level] for level in self.levels] for by in (valid, counts))
        for i in range(self.layers):
            x = part(f"layer_{i}")(x, position, reference, inside, count)
        maps, start = {}, 0
        for level in self.levels:
            h, w = features[level].shape[2:]
            maps[level] = x[:, start : start + h * w].transpose(1, 2).unflatten(2, (h, w))
            start += h * w
        last, own = self.levels[-1], self.finest
        y = part(f"lateral_norm_{own}")(part(f"lateral_{own}")(features[own]), valid[own])
        y = y + resize_within(maps[last], y.shape[2:], counts[last], counts[own])
        y = part(f"output_{own}")(torch.where(valid[own][:, None], y, 0))
        return self.mask_features(F.relu(part(f"output_norm_{own}")(y, valid[own]))), maps
