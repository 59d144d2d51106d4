"""ResNet-50 and 101 for inference, see `ovseg_jax/models/resnet.py`."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ovseg_jax.torch.layers import BatchNorm


def make_norm(kind: str, channels: int) -> nn.Module:
    """Creates a batch norm with running statistics, or a group norm."""
    return nn.GroupNorm(32, channels, eps=1e-5) if kind == "group" else BatchNorm(channels, eps=1e-5)


def conv(inputs: int, features: int, size: int, stride: int) -> nn.Conv2d:
    """Creates a convolution with PyTorch's symmetric padding."""
    return nn.Conv2d(inputs, features, size, stride, size // 2, bias=False)


class Bottleneck(nn.Module):
    """A bottleneck: 1x1, 3x3 with the stride, 1x1 to 4 `width`, added to the (projected) input."""

    def __init__(self, inputs: int, width: int, stride: int, project: bool, norm: str):
        super().__init__()
        self.conv1, self.norm1 = conv(inputs, width, 1, 1), make_norm(norm, width)
        self.conv2, self.norm2 = conv(width, width, 3, stride), make_norm(norm, width)
        self.conv3, self.norm3 = conv(width, 4 * width, 1, 1), make_norm(norm, 4 * width)
        self.project = project
        if project:
            self.downsample_conv = conv(inputs, 4 * width, 1, stride)
            self.downsample_norm = make_norm(norm, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b c h w] to [b 4*width ceil(h/stride) ceil(w/stride)]."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        if self.project:
            x = self.downsample_norm(self.downsample_conv(x))
        return F.relu(x + y)


class ResNet(nn.Module):
    """A ResNet: feature maps `c2` to `c5`, with widths `channels`."""

    def __init__(self, stage_sizes: Sequence[int], width: int = 64, norm: str = "batch"):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), make_norm(norm, width)
        self.stage_sizes, self.channels = stage_sizes, {}
        inputs = width
        for stage, blocks in enumerate(stage_sizes):
            inner = width * 2**stage
            for i in range(blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                self.add_module(f"layer{stage + 1}_{i}", Bottleneck(inputs, inner, stride, i == 0, norm))
                inputs = 4 * inner
            self.channels[f"c{stage + 2}"] = inputs

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps normalised images [b 3 h w] to the pyramid."""
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 3, 2, 1)
        features = {}
        for stage, blocks in enumerate(self.stage_sizes):
            for i in range(blocks):
                x = self.get_submodule(f"layer{stage + 1}_{i}")(x)
            features[f"c{stage + 2}"] = x
        return features
