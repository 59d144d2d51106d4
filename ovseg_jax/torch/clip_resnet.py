"""CLIP's ResNets for inference, see `ovseg_jax/models/clip_resnet.py`."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovseg_jax.torch.positions import resize_positions
from ovseg_jax.torch.resnet import conv, make_norm

HEAD_CHANNELS = 64


def average_pool(x: Tensor) -> Tensor:
    """Averages 2x2 pixels, to ceil(h/2) x ceil(w/2); an incomplete square is averaged over its own pixels."""
    return F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)


class ClipBottleneck(nn.Module):
    """A bottleneck as in `resnet`, with average pooling after the 3x3 and before the projection as the stride."""

    def __init__(self, inputs: int, width: int, stride: int, project: bool, norm: str):
        super().__init__()
        self.conv1, self.norm1 = conv(inputs, width, 1, 1), make_norm(norm, width)
        self.conv2, self.norm2 = conv(width, width, 3, 1), make_norm(norm, width)
        self.conv3, self.norm3 = conv(width, 4 * width, 1, 1), make_norm(norm, 4 * width)
        self.stride, self.project = stride, project
        if project:
            self.downsample_conv = conv(inputs, 4 * width, 1, 1)
            self.downsample_norm = make_norm(norm, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b c h w] to [b 4*width ceil(h/stride) ceil(w/stride)]."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        if self.stride == 2:
            x, y = average_pool(x), average_pool(y)
        y = self.norm3(self.conv3(y))
        if self.project:
            x = self.downsample_norm(self.downsample_conv(x))
        return F.relu(x + y)


class AttentionPool(nn.Module):
    """A step of multi-head attention whose query is the mean of the map, with learned positions."""

    def __init__(self, channels: int, embed: int, grid: int):
        super().__init__()
        self.grid = grid
        self.positions = nn.Parameter(torch.empty(1 + grid**2, channels).normal_(std=channels**-0.5))
        self.query, self.key = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.value, self.out = nn.Linear(channels, channels), nn.Linear(channels, embed)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps [b c h w] to (pooled [b embed], dense [b embed h w])."""
        h, w = x.shape[2:]
        table = self.positions[1:].unflatten(0, (self.grid, self.grid))
        places = resize_positions(table, (h, w)).flatten(0, 1).to(x.dtype)
        mean = self.positions[:1].to(x.dtype)
        x = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([x.mean(1, keepdim=True) + mean, x + places], 1)
        split = lambda y: y.unflatten(-1, (-1, HEAD_CHANNELS)).transpose(1, 2)
        query, key, value = self.query(tokens[:, :1]), self.key(tokens), self.value(tokens)
        pooled = F.scaled_dot_product_attention(split(query), split(key), split(value))
        dense = self.out(self.value(x)).transpose(1, 2).unflatten(2, (h, w))
        return self.out(pooled.transpose(1, 2).flatten(2))[:, 0], dense


class ClipResNet(nn.Module):
    """A CLIP ResNet: feature maps `c2` to `c5`, with widths `channels`, and embeddings `pooled` and `dense`."""

    def __init__(
        self,
        stage_sizes: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        embed: int = 1024,
        grid: int = 7,
        norm: str = "batch",
    ):
        super().__init__()
        inputs = 3
        for i, (features, stride) in enumerate(((width // 2, 2), (width // 2, 1), (width, 1)), 1):
            self.add_module(f"conv{i}", conv(inputs, features, 3, stride))
            self.add_module(f"norm{i}", make_norm(norm, features))
            inputs = features
        self.stage_sizes, self.channels = tuple(stage_sizes), {}
        for stage, blocks in enumerate(stage_sizes):
            inner = width * 2**stage
            for i in range(blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                self.add_module(f"layer{stage + 1}_{i}", ClipBottleneck(inputs, inner, stride, i == 0, norm))
                inputs = 4 * inner
            self.channels[f"c{stage + 2}"] = inputs
        self.attnpool = AttentionPool(inputs, embed, grid)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps normalised images [b 3 h w] to the pyramid, `pooled` [b embed] and `dense` [b embed h w] of c5."""
        for i in (1, 2, 3):
            x = F.relu(self.get_submodule(f"norm{i}")(self.get_submodule(f"conv{i}")(x)))
        x = average_pool(x)
        outputs = {}
        for stage, blocks in enumerate(self.stage_sizes):
            for i in range(blocks):
                x = self.get_submodule(f"layer{stage + 1}_{i}")(x)
            outputs[f"c{stage + 2}"] = x
        outputs["pooled"], outputs["dense"] = self.attnpool(x)
        return outputs
