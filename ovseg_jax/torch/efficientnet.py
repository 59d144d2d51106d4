"""EfficientNet-B0 to B8 and Lite0 to Lite4 for inference, see `ovseg_jax/models/efficientnet.py`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovseg_jax.models.efficientnet_scaling import STAGES, round_channels, stage_blocks, stem_channels
from ovseg_jax.torch.layers import BatchNorm, Conv


class MBConv(nn.Module):
    """An inverted bottleneck, with squeeze-and-excite except in a Lite."""

    def __init__(self, inputs: int, features: int, kernel: int, stride: int, expand: int, lite: bool = False):
        super().__init__()
        inner = inputs * expand
        if expand != 1:
            self.expand_conv, self.expand_norm = Conv(inputs, inner, 1, bias=False), norm(inner)
        self.depthwise_conv = Conv(inner, inner, kernel, stride, groups=inner, bias=False)
        self.depthwise_norm = norm(inner)
        self.activation = F.relu6 if lite else F.silu
        self.se_reduce = None if lite else Conv(inner, max(1, inputs // 4), 1)
        self.se_expand = None if lite else Conv(max(1, inputs // 4), inner, 1)
        self.project_conv, self.project_norm = Conv(inner, features, 1, bias=False), norm(features)
        self.expands, self.adds = expand != 1, stride == 1 and inputs == features

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b c h w] to [b features ceil(h/stride) ceil(w/stride)]."""
        y = self.activation(self.expand_norm(self.expand_conv(x))) if self.expands else x
        y = self.activation(self.depthwise_norm(self.depthwise_conv(y)))
        if self.se_reduce is not None and self.se_expand is not None:
            gate = self.se_expand(F.silu(self.se_reduce(y.mean((2, 3), keepdim=True))))
            y = y * torch.sigmoid(gate)
        y = self.project_norm(self.project_conv(y))
        return x + y if self.adds else y


class EfficientNet(nn.Module):
    """An EfficientNet: feature maps `c2` to `c5`, with widths `channels`."""

    def __init__(self, width: float, depth: float, lite: bool = False):
        super().__init__()
        inputs, self.activation = stem_channels(width, lite), F.relu6 if lite else F.silu
        self.stem_conv, self.stem_norm = Conv(3, inputs, 3, 2, bias=False), norm(inputs)
        self.levels: list[str] = []
        self.channels: dict[str, int] = {}
        level = 1
        for stage, blocks in zip(STAGES, stage_blocks(depth, lite), strict=True):
            level += stage.stride == 2
            features = round_channels(stage.channels, width)
            for i in range(blocks):
                stride = stage.stride if i == 0 else 1
                block = MBConv(inputs, features, stage.kernel, stride, stage.expand, lite)
                self.add_module(f"block_{len(self.levels)}", block)
                self.levels.append(f"c{level}")
                inputs = features
            self.channels[f"c{level}"] = features
        del self.channels["c1"]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps normalised images [b 3 h w] to the pyramid: the last block's output at each stride."""
        x = self.activation(self.stem_norm(self.stem_conv(x)))
        features = {}
        for i, level in enumerate(self.levels):
            x = features[level] = self.get_submodule(f"block_{i}")(x)
        del features["c1"]
        return features


def norm(channels: int) -> BatchNorm:
    """Creates a batch norm with TensorFlow's epsilon."""
    return BatchNorm(channels, eps=1e-3)
