"""UPerNet for inference, see `ovseg_jax/models/upernet.py`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovseg_jax.torch.openseg import Normalise, OpenSegFeatures, build_backbone
from ovseg_jax.torch.resnet import make_norm

LEVELS = ("c2", "c3", "c4", "c5")


class ConvNorm(nn.Module):
    """A convolution, a norm and a ReLU."""

    def __init__(self, inputs: int, features: int, size: int, norm: str):
        super().__init__()
        self.conv = nn.Conv2d(inputs, features, size, padding=size // 2, bias=False)
        self.norm = make_norm(norm, features)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b c h w] to [b features h w]."""
        return F.relu(self.norm(self.conv(x)))


class UPerHead(nn.Module):
    """The head: pooled context of the coarsest level, a top-down path, the fusion of all levels."""

    def __init__(self, channels: Mapping[str, int], width: int, pools: Sequence[int], norm: str):
        super().__init__()
        self.pools, top = pools, channels[LEVELS[-1]]
        for i in range(len(pools)):
            self.add_module(f"pool_{i}", ConvNorm(top, width, 1, norm))
        self.context = ConvNorm(top + len(pools) * width, width, 3, norm)
        for name in LEVELS[:-1]:
            self.add_module(f"lateral_{name}", ConvNorm(channels[name], width, 1, norm))
            self.add_module(f"output_{name}", ConvNorm(width, width, 3, norm))
        self.fusion = ConvNorm(len(LEVELS) * width, width, 3, norm)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Fuses the maps `c2` to `c5` at the resolution of the finest."""
        layer, top = self.get_submodule, features[LEVELS[-1]]
        pooled = [
            enlarge(layer(f"pool_{i}")(F.adaptive_avg_pool2d(top, side)), top.shape[2:])
            for i, side in enumerate(self.pools)
        ]
        x = self.context(torch.cat([top, *pooled], 1))
        outputs = [x]
        for name in reversed(LEVELS[:-1]):
            x = layer(f"lateral_{name}")(features[name]) + enlarge(x, features[name].shape[2:])
            outputs.insert(0, layer(f"output_{name}")(x))
        return self.fusion(torch.cat([enlarge(y, outputs[0].shape[2:]) for y in outputs], 1))


class UPerNet(nn.Module):
    """A per-pixel classifier with a closed set of classes.

    Args:
      model: the Flax module's fields, as `pretrained.to_torch.describe` returns them.
    """

    num_queries = 0

    def __init__(self, model: Mapping[str, Any]):
        super().__init__()
        backbone: Any = build_backbone(model["backbone"])
        self.backbone = backbone
        width, norm, aux_width = model["width"], model["norm"], model["aux_width"]
        self.normalise = Normalise(model["mean"], model["std"])
        self.head = UPerHead(backbone.channels, width, model["pools"], norm)
        self.classifier = nn.Linear(width, model["classes"])
        if aux_width:  # Not used here, but part of the model, which may be trained further.
            self.aux_head = ConvNorm(backbone.channels["c4"], aux_width, 3, norm)
            self.aux_classifier = nn.Linear(aux_width, model["classes"])

    def forward(self, image: Tensor, image_size: Tensor) -> OpenSegFeatures:
        """Scores the classes of the pixels of uint8 images [b 3 s t] that fill `image_size` [b 2] of their canvas.

        Returns:
          `pixel_embed` [b K h w], 1 + log p / log K.
        """
        fused = self.head(self.backbone(self.normalise(image, image_size)))
        logits = self.classifier(fused.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return OpenSegFeatures(None, None, 1 + logits.log_softmax(1) / math.log(logits.shape[1]))


def enlarge(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resizes [b c h w] bilinearly with half-pixel centres, without antialiasing."""
    return F.interpolate(x, tuple(size), mode="bilinear")
