"""A plain transformer as a backbone, see `ovseg_jax/models/tower_pyramid.py`."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ovseg_jax.torch.layers import LayerNorm

LEVELS = range(2, 6)


class TowerPyramid(nn.Module):
    """A pyramid of feature maps `c2` to `c5`, with widths `channels`, from a tower's last map."""

    def __init__(self, tower: Any):
        super().__init__()
        self.tower = tower
        self.own = min(LEVELS, key=lambda level: abs(2**level - tower.patch))
        width = tower.embedding.out_channels
        self.channels = {f"c{level}": width // 2 ** max(self.own - level, 0) for level in LEVELS}
        for level in LEVELS:
            for i in range(self.own - level):
                c = width // 2**i
                if i:
                    self.add_module(f"norm_c{level}_{i}", LayerNorm(c))
                self.add_module(f"up_c{level}_{i}", nn.Linear(c, 2 * c))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Computes the maps of normalised images [b 3 h w], whose sides are multiples of the tower's patch."""
        tokens = self.tower(x).tokens
        return {f"c{level}": self.at(tokens, level) for level in LEVELS}

    def at(self, x: Tensor, level: int) -> Tensor:
        """Computes one map from the tokens [b d h w]."""
        if level > self.own:
            return F.max_pool2d(x, 2 ** (level - self.own), ceil_mode=True)
        x = x.permute(0, 2, 3, 1)
        for i in range(self.own - level):
            if i:
                x = F.gelu(self.get_submodule(f"norm_c{level}_{i}")(x))
            b, h, w, c = x.shape
            x = self.get_submodule(f"up_c{level}_{i}")(x)
            x = x.reshape(b, h, w, 2, 2, c // 2).transpose(2, 3).reshape(b, 2 * h, 2 * w, c // 2)
        return x.permute(0, 3, 1, 2)
