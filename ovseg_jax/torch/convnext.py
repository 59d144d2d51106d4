"""ConvNeXts of CLIP for inference, see `ovseg_jax/models/convnext.py`."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def last_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Normalises the channels of [b c h w]."""
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """A block: x + gamma * mlp(norm(conv(x))) with a depthwise 7x7 convolution."""

    def __init__(self, channels: int, epsilon: float):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, epsilon)
        self.fc1, self.fc2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(self.norm.weight.detach() * 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b c h w] to the same shape."""
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.fc2(F.gelu(self.fc1(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXtHead(nn.Module):
    """The projection of the last axis into the space of texts: a norm, then a matrix or an MLP."""

    def __init__(self, channels: int, embed_dim: int, hidden: int, epsilon: float):
        super().__init__()
        self.norm, self.hidden = nn.LayerNorm(channels, epsilon), hidden
        if hidden:
            self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, embed_dim, bias=False)
        else:
            self.proj = nn.Linear(channels, embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [... c] to [... embed_dim]."""
        x = self.norm(x)
        return self.fc2(F.gelu(self.fc1(x))) if self.hidden else self.proj(x)


class ConvNeXt(nn.Module):
    """A ConvNeXt of CLIP: feature maps `c2` to `c5`, with widths `channels`, and embeddings `pooled` and `dense`."""

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 27, 3),
        width: int = 128,
        embed_dim: int = 512,
        head_hidden: int = 0,
        epsilon: float = 1e-6,
    ):
        super().__init__()
        self.depths, self.channels = tuple(depths), {}
        self.stem, self.stem_norm = nn.Conv2d(3, width, 4, 4), nn.LayerNorm(width, epsilon)
        for stage, depth in enumerate(depths, start=1):
            if stage > 1:
                self.add_module(f"downsample{stage}_norm", nn.LayerNorm(width, epsilon))
                self.add_module(f"downsample{stage}", nn.Conv2d(width, 2 * width, 2, 2))
                width *= 2
            for i in range(depth):
                self.add_module(f"stage{stage}_{i}", ConvNeXtBlock(width, epsilon))
            self.channels[f"c{stage + 1}"] = width
        self.head = ConvNeXtHead(width, embed_dim, head_hidden, epsilon)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps normalised images [b 3 h w] to the pyramid, `pooled` [b embed_dim] and `dense` [b embed_dim h w]."""
        x = last_norm(self.stem_norm, self.stem(pad_to(x, 4)))
        outputs = {}
        for stage, depth in enumerate(self.depths, start=1):
            if stage > 1:
                x = last_norm(self.get_submodule(f"downsample{stage}_norm"), x)
                x = self.get_submodule(f"downsample{stage}")(pad_to(x, 2))
            for i in range(depth):
                x = self.get_submodule(f"stage{stage}_{i}")(x)
            outputs[f"c{stage + 1}"] = x
        outputs["pooled"] = self.head(x.mean((2, 3)))
        outputs["dense"] = self.head(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return outputs


def pad_to(x: Tensor, size: int) -> Tensor:
    """Pads height and width with zeros at the bottom and right to multiples of `size`."""
    return F.pad(x, (0, -x.shape[3] % size, 0, -x.shape[2] % size))
