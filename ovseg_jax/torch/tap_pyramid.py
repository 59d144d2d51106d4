"""A plain transformer as a backbone, from four of its blocks, see `ovseg_jax/models/tap_pyramid.py`."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ovseg_jax.torch.resnet import make_norm


class TapPyramid(nn.Module):
    """A pyramid of feature maps `c2` to `c5`, with widths `channels`, from a ViT's four taps."""

    def __init__(self, tower: Any, norm: str = "batch"):
        super().__init__()
        self.tower = tower
        width = tower.embedding.out_channels
        self.channels = dict.fromkeys(("c2", "c3", "c4", "c5"), width)
        up = lambda: nn.ConvTranspose2d(width, width, 2, 2)
        self.up_c2_0, self.norm_c2, self.up_c2_1 = up(), make_norm(norm, width), up()
        self.up_c3 = up()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Computes the maps of normalised images [b 3 h w], whose sides are multiples of the tower's patch."""
        tapped = self.tower(x).taps
        c2, c3, c4, c5 = (tapped[i] for i in self.tower.taps)
        c2 = self.up_c2_1(F.gelu(self.norm_c2(self.up_c2_0(c2))))
        return dict(c2=c2, c3=self.up_c3(c3), c4=c4, c5=F.max_pool2d(c5, 2))
