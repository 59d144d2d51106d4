"""MaskFormer without its classifier for inference, see `ovseg_jax/models/maskformer.py`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovseg_jax.torch.layers import Conv
from ovseg_jax.torch.openseg import Normalise, build_backbone, inside


def cells_inside(image_size: Tensor, x: Tensor, level: str) -> Tensor:
    """Tells which cells [b h w] of a map [b c h w] of this level begin within each image."""
    stride = float(2 ** int(level[1:]))
    return inside(image_size, x.shape[2:], (stride, stride))


def sine_positions(valid: Tensor, channels: int) -> Tensor:
    """Computes DETR's normalised sine embedding [b h w channels] of the valid cells [b h w]."""
    half = channels // 2
    exponent = 2 * torch.div(torch.arange(half, device=valid.device), 2, rounding_mode="floor") / half
    even = torch.arange(half, device=valid.device) % 2 == 0

    def axis(length: int, count: Tensor) -> Tensor:
        place = torch.arange(1, length + 1, device=valid.device)
        place = place / (count.clamp(min=1)[:, None] + 1e-6) * (2 * np.pi)
        angle = place[..., None] / 10_000**exponent
        return torch.where(even, angle.sin(), angle.cos())

    b, h, w = valid.shape
    rows, columns = axis(h, valid.any(2).sum(1)), axis(w, valid.any(1).sum(1))
    return torch.cat([rows[:, :, None].expand(b, h, w, half), columns[:, None].expand(b, h, w, half)], -1)


class GroupNorm(nn.Module):
    """Group normalisation whose moments are of valid cells alone."""

    def __init__(self, channels: int, groups: int = 32):
        super().__init__()
        self.groups = groups
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """Normalises [b c h w] by the cells where `valid` [b h w]."""
        y = x.unflatten(1, (self.groups, -1))
        mask = valid[:, None, None].to(x.dtype)
        count = mask.sum((3, 4), keepdim=True).clamp(min=1) * y.shape[2]
        mean = (y * mask).sum((2, 3, 4), keepdim=True) / count
        variance = ((y - mean).square() * mask).sum((2, 3, 4), keepdim=True) / count
        y = ((y - mean) * torch.rsqrt(variance + 1e-5)).flatten(1, 2)
        return y * self.weight[:, None, None] + self.bias[:, None, None]


class PixelDecoder(nn.Module):
    """An FPN: from the coarsest map, add a finer one and convolve."""

    def __init__(self, channels: Mapping[str, int], width: int, mask_dim: int):
        super().__init__()
        self.levels = sorted(channels, reverse=True)
        for i, level in enumerate(self.levels):
            if i:
                self.add_module(f"lateral_{level}", Conv(channels[level], width, 1, bias=False))
                self.add_module(f"lateral_norm_{level}", GroupNorm(width))
            self.add_module(f"output_{level}", Conv(width if i else channels[level], width, 3, bias=False))
            self.add_module(f"output_norm_{level}", GroupNorm(width))
        self.mask_features = Conv(width, mask_dim, 3)

    def forward(self, features: Mapping[str, Tensor], image_size: Tensor) -> Tensor:
        """Computes the mask features [b mask_dim h w] from a backbone's maps."""
        part = self.get_submodule
        x: Tensor | None = None
        for level in self.levels:
            finer = features[level]
            valid = cells_inside(image_size, finer, level)
            if x is not None:
                finer = part(f"lateral_norm_{level}")(part(f"lateral_{level}")(finer), valid)
                up = F.interpolate(x, scale_factor=2, mode="nearest")
                finer = finer + up[:, :, : finer.shape[2], : finer.shape[3]]
            x = part(f"output_{level}")(torch.where(valid[:, None], finer, 0))
            x = F.relu(part(f"output_norm_{level}")(x, valid))
        assert x is not None
        return self.mask_features(torch.where(valid[:, None], x, 0))


class Attention(nn.Module):
    """Multi-head attention whose keys have another input than its values."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None = None) -> Tensor:
        """Attends from each query [b q d] to all values [b n d], or to those that are `valid` [b n] or [b q n]."""
        split = lambda x: x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        mask = valid
        if valid is not None:
            mask = valid[:, None, None] if valid.ndim == 2 else valid[:, None]
        x = F.scaled_dot_product_attention(
            split(self.query(queries)), split(self.key(keys)), split(self.value(values)), attn_mask=mask
        )
        return self.out(x.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """A post-norm layer of DETR's decoder: self-attention, cross-attention, MLP.

    Mask2Former's begins with the cross-attention (`cross_first`).
    """

    def __init__(self, width: int, heads: int, ffn: int, cross_first: bool = False):
        super().__init__()
        self.cross_first = cross_first
        self.self_attention, self.cross_attention = Attention(width, heads), Attention(width, heads)
        self.self_norm, self.cross_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.mlp_in, self.mlp_out = nn.Linear(width, ffn), nn.Linear(ffn, width)

    def forward(self, x: Tensor, position: Tensor, keys: Tensor, values: Tensor, valid: Tensor) -> Tensor:
        """Maps queries [b n d] to queries; see the Flax module."""

        def to_queries(x: Tensor) -> Tensor:
            placed = x + position
            return self.self_norm(x + self.self_attention(placed, placed, x))

        def to_image(x: Tensor) -> Tensor:
            return self.cross_norm(x + self.cross_attention(x + position, keys, values, valid))

        x = to_queries(to_image(x)) if self.cross_first else to_image(to_queries(x))
        return self.mlp_norm(x + self.mlp_out(F.relu(self.mlp_in(x))))


class MaskFormerNet(nn.Module):
    """The network without its classifier; `model` are the Flax module's fields."""

    def __init__(self, model: Mapping[str, Any]):
        super().__init__()
        backbone: Any = build_backbone(model["backbone"])
        self.backbone = backbone
        width, self.layers = model["width"], model["layers"]
        self.width = width
        self.normalise = Normalise(model["mean"], model["std"])
        self.pixel_decoder = PixelDecoder(backbone.channels, width, model["mask_dim"])
        self.input_projection = nn.Linear(backbone.channels[max(backbone.channels)], width)
        self.queries = nn.Parameter(torch.empty(model["num_queries"], width).normal_())
        for i in range(self.layers):
            self.add_module(f"layer_{i}", DecoderLayer(width, model["heads"], model["ffn"]))
        self.decoder_norm = nn.LayerNorm(width)
        self.mask_mlp_0, self.mask_mlp_1 = nn.Linear(width, width), nn.Linear(width, width)
        self.mask_mlp_2 = nn.Linear(width, model["mask_dim"])

    def forward(self, image: Tensor, image_size: Tensor) -> tuple[Tensor, Tensor]:
        """Returns queries [b n d] and mask logits [b n h w] of uint8 images [b 3 s t]."""
        features = self.backbone(self.normalise(image, image_size))
        features = {level: features[level] for level in self.backbone.channels}
        pixels = self.pixel_decoder(features, image_size)
        top = max(features)
        valid = cells_inside(image_size, features[top], top)
        values = self.input_projection(features[top].flatten(2).transpose(1, 2))
        keys = values + sine_positions(valid, values.shape[-1]).flatten(1, 2).to(values.dtype)
        position = self.queries.to(values.dtype).expand(values.shape[0], -1, -1)
        x = torch.zeros_like(position)
        for i in range(self.layers):
            x = self.get_submodule(f"layer_{i}")(x, position, keys, values, valid.flatten(1))
        x = self.decoder_norm(x)
        y = self.mask_mlp_2(F.relu(self.mask_mlp_1(F.relu(self.mask_mlp_0(x)))))
        return x, torch.einsum("bnc,bchw->bnhw", y, pixels).float()
