"""Layers that compute as Flax's do, with channels first."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv(nn.Conv2d):
    """A convolution with padding "SAME": an odd pixel of padding is at the bottom and right."""

    def __init__(self, inputs: int, features: int, size: int, stride: int = 1, *, groups: int = 1, bias=True):
        super().__init__(inputs, features, size, stride, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b c h w] to [b features ceil(h/stride) ceil(w/stride)]."""
        (size, _), (stride, _) = self.kernel_size, self.stride
        rows, columns = (max((-(-n // stride) - 1) * stride + size - n, 0) for n in x.shape[2:])
        if rows == columns and rows % 2 == 0:
            return F.conv2d(x, self.weight, self.bias, stride, rows // 2, groups=self.groups)
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return F.conv2d(x, self.weight, self.bias, stride, groups=self.groups)


class GroupNorm(nn.GroupNorm):
    """Group normalisation with Flax's epsilon."""

    def __init__(self, channels: int, groups: int = 8):
        super().__init__(groups, channels, eps=1e-6)


class BatchNorm(nn.Module):
    """Batch normalisation by running statistics; PyTorch's own would also need a batch counter."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises [b c h w]."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation with Flax's epsilon."""

    def __init__(self, features: int):
        super().__init__(features, eps=1e-6)


def space_to_depth(x: Tensor, size: int) -> Tensor:
    """Folds each size x size square of pixels into channels, (row, column, channel), with zero padding."""
    b, c, h, w = x.shape
    x = F.pad(x, (0, -w % size, 0, -h % size))
    h, w = x.shape[2] // size, x.shape[3] // size
    x = x.reshape(b, c, h, size, w, size).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(b, size * size * c, h, w)


def resize(x: Tensor, size: Sequence[int], method: str = "bilinear") -> Tensor:
    """Resizes [b c h w] to `size` with half-pixel centres; antialiased when shrinking, as in `jax.image.resize`."""
    size = tuple(size)
    if tuple(x.shape[2:]) == size:
        return x
    if method == "nearest":
        return F.interpolate(x, size, mode="nearest-exact")
    shrinks = size[0] < x.shape[2] or size[1] < x.shape[3]
    return F.interpolate(x, size, mode="bilinear", antialias=shrinks)


def resize_within(x: Tensor, size: Sequence[int], count: Tensor, new_count: Tensor) -> Tensor:
    """Resizes the part of each map [b c h w] that holds its image, see `kernels.resize.resize_within`."""
    down, across = (
        _interpolation(size[i], x.shape[2 + i], count[:, i], new_count[:, i]).to(x.dtype) for i in range(2)
    )
    return down[:, None] @ x @ across[:, None].transpose(2, 3)


def _interpolation(pixels: int, cells: int, count: Tensor, new_count: Tensor) -> Tensor:
    """Returns matrices [b pixels cells] of bilinear interpolation from the first `count` cells to `new_count`."""
    count, new_count = (x.clamp(min=1)[:, None] for x in (count, new_count))
    pixel = torch.minimum(torch.arange(pixels, device=count.device), new_count - 1)
    position = ((pixel + 0.5) * count / new_count - 0.5).clamp(min=0)
    position = torch.minimum(position, count - 1)[..., None]
    return (1 - (position - torch.arange(cells, device=count.device)).abs()).clamp(min=0)


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Computes x / |x| along the last axis in float32; zeros stay zeros."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps**2)


def class_scores(names: Tensor, owner: Tensor) -> Tensor:
    """Returns the score [k n] of each class, that of its best name, from scores [t n] and owners [t] of names."""
    lowest = torch.full_like(names[:1], -torch.inf).expand(int(owner.max()) + 1, -1)
    return lowest.scatter_reduce(0, owner[:, None].expand_as(names), names, "amax")
