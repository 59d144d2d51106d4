"""The small backbone, see `ovseg_jax/models/small.py`."""

import torch.nn.functional as F
from torch import Tensor, nn

from ovseg_jax.torch.layers import Conv, GroupNorm, space_to_depth


class ConvNorm(nn.Module):
    """A convolution without bias, then group norm."""

    def __init__(self, inputs: int, features: int, size: int = 3, stride: int = 1):
        super().__init__()
        self.conv = Conv(inputs, features, size, stride, bias=False)
        self.norm = GroupNorm(features)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b c h w] to [b features ceil(h/stride) ceil(w/stride)]."""
        return self.norm(self.conv(x))


class ResidualBlock(nn.Module):
    """A residual block of two 3x3 convolutions."""

    def __init__(self, features: int):
        super().__init__()
        self.conv1, self.conv2 = ConvNorm(features, features), ConvNorm(features, features)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b c h w] to the same shape."""
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


class SmallBackbone(nn.Module):
    """A small backbone: feature maps `c2`, `c3`, ... at strides 4, 8, ..., with widths `channels`."""

    def __init__(self, width: int = 48, levels: int = 3, blocks: int = 1, stem: str = "full"):
        super().__init__()
        self.stem, self.levels, self.blocks = stem, levels, blocks
        if stem == "patch":
            self.stem1 = ConvNorm(48, width)
        else:
            self.stem1 = ConvNorm(12, width // 2)
            self.stem2 = ConvNorm(2 * width, width, 3 if stem == "full" else 1)
        self.channels = {}
        channels = (width, width * 3 // 2, width * 2, width * 3)[:levels]
        for level, features in enumerate(channels, start=2):
            if level > 2:
                self.add_module(f"down{level}", ConvNorm(channels[level - 3], features, stride=2))
            for i in range(blocks):
                self.add_module(f"level{level}_{i}", ResidualBlock(features))
            self.channels[f"c{level}"] = features

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps normalised images [b 3 h w] to the pyramid."""
        if self.stem == "patch":
            x = F.relu(self.stem1(space_to_depth(x, 4)))
        else:
            x = F.relu(self.stem1(space_to_depth(x, 2)))
            x = F.relu(self.stem2(space_to_depth(x, 2)))
        features = {}
        for level in range(2, 2 + self.levels):
            if level > 2:
                x = F.relu(self.get_submodule(f"down{level}")(x))
            for i in range(self.blocks):
                x = self.get_submodule(f"level{level}_{i}")(x)
            features[f"c{level}"] = x
        return features
