"""Swin Transformers for inference, see `ovseg_jax/models/swin.py`; internally channels are last."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovseg_jax.models.windows import window_and_shift


def to_windows(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Cuts [b h w c], whose sides are multiples of `size`, into [b windows n c], both in reading order."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // size[0], size[0], w // size[1], size[1], c)
    return x.transpose(2, 3).reshape(b, -1, size[0] * size[1], c)


def from_windows(x: Tensor, size: tuple[int, int], height: int, width: int) -> Tensor:
    """Joins windows to a map [b height width c]: the inverse of `to_windows`."""
    b, _, _, c = x.shape
    x = x.reshape(b, height // size[0], width // size[1], *size, c)
    return x.transpose(2, 3).reshape(b, height, width, c)


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, with a learned bias for each relative position."""

    index: Tensor

    def __init__(self, channels: int, heads: int, window: int, shifted: bool, window_rule: str):
        super().__init__()
        self.heads, self.window, self.shifted, self.rule = heads, window, shifted, window_rule
        self.query, self.key = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.value, self.out = nn.Linear(channels, channels), nn.Linear(channels, channels)
        side = 2 * window - 1
        self.relative_position_bias = nn.Parameter(torch.empty(side**2, heads).normal_(std=0.02))
        offset = torch.arange(window)[:, None] - torch.arange(window) + window - 1
        # Indexed by row and column of the query, then of the key, so that a smaller window is a corner of it.
        index = side * offset[:, None, :, None] + offset[None, :, None, :]
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Attends within each window of [b h w c]."""
        _, h, w, _ = x.shape
        size, shift = window_and_shift(h, w, self.window, self.shifted, self.rule)
        x = F.pad(x, (0, 0, 0, -w % size[1], 0, -h % size[0]))
        height, width = x.shape[1:3]
        tokens = to_windows(torch.roll(x, (-shift[0], -shift[1]), (1, 2)) if any(shift) else x, size)
        # Heads of all windows are merged into one axis, so that one table of biases serves all images.
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(2, 3).flatten(1, 2)
        query, key, value = split(self.query(tokens)), split(self.key(tokens)), split(self.value(tokens))
        bias = self.bias(size, shift, height, width).to(query.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias[None])
        out = self.out(mixed.unflatten(1, (-1, self.heads)).transpose(2, 3).flatten(3))
        x = from_windows(out, size, height, width)
        return (torch.roll(x, shift, (1, 2)) if any(shift) else x)[:, :h, :w]

    def bias(self, size: tuple[int, int], shift: tuple[int, int], height: int, width: int) -> Tensor:
        """Returns biases [windows*heads n n], with -inf between tokens that were not neighbours before the shift."""
        n = size[0] * size[1]
        index = self.index[: size[0], : size[1], : size[0], : size[1]].reshape(n, n)
        bias = self.relative_position_bias[index].permute(2, 0, 1)[None]
        if any(shift):
            # Only the last `shift` rows and columns wrapped around.
            rows, columns = (
                torch.arange(side, device=index.device) >= side - s
                for side, s in zip((height, width), shift, strict=True)
            )
            region = to_windows((2 * rows[:, None] + columns)[None, :, :, None], size)[0, :, :, 0]
            together = region[:, :, None] == region[:, None, :]
            bias = bias.masked_fill(~together[:, None], -torch.inf)
        windows = height * width // n
        return bias.expand(windows, -1, -1, -1).flatten(0, 1)


class SwinBlock(nn.Module):
    """A block: x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, channels: int, heads: int, window: int, shifted: bool, window_rule: str):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads, window, shifted, window_rule)
        self.fc1, self.fc2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b h w c] to the same shape."""
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class PatchMerging(nn.Module):
    """A merge of four neighbours, concatenated and normalised, into one token of twice the channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.reduction = (
            nn.LayerNorm(4 * channels),
            nn.Linear(4 * channels, 2 * channels, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b h w c] to [b ceil(h/2) ceil(w/2) 2c]."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        b, h, w, c = x.shape
        # The left column comes first, from top to bottom.
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(x.reshape(b, h // 2, w // 2, 4 * c)))


class Swin(nn.Module):
    """A Swin Transformer: feature maps `c2` to `c5`, with widths `channels`."""

    def __init__(
        self,
        width: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        window: int = 7,
        window_rule: str = "axis",
        out_norms: Sequence[int] = (2, 3, 4, 5),
    ):
        super().__init__()
        self.depths, self.out_norms = tuple(depths), tuple(out_norms)
        self.channels = {f"c{level}": width * 2 ** (level - 2) for level in range(2, 2 + len(depths))}
        self.patch_embed, self.patch_norm = nn.Conv2d(3, width, 4, 4), nn.LayerNorm(width)
        for stage, (depth, number) in enumerate(zip(depths, heads, strict=True), start=1):
            features = self.channels[f"c{stage + 1}"]
            if stage > 1:
                self.add_module(f"merge{stage}", PatchMerging(features // 2))
            for i in range(depth):
                self.add_module(
                    f"stage{stage}_{i}", SwinBlock(features, number, window, i % 2 == 1, window_rule)
                )
            if stage + 1 in out_norms:
                self.add_module(f"out_norm{stage + 1}", nn.LayerNorm(features))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps normalised images [b 3 h w] to the pyramid."""
        x = self.patch_embed(F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4)))
        x = self.patch_norm(x.permute(0, 2, 3, 1))
        features = {}
        for stage, depth in enumerate(self.depths, start=1):
            if stage > 1:
                x = self.get_submodule(f"merge{stage}")(x)
            for i in range(depth):
                x = self.get_submodule(f"stage{stage}_{i}")(x)
            level = stage + 1
            y = self.get_submodule(f"out_norm{level}")(x) if level in self.out_norms else x
            features[f"c{level}"] = y.permute(0, 3, 1, 2)
        return features
