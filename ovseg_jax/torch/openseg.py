"""OpenSeg's image network, see `ovseg_jax/models/openseg.py`."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovseg_jax.errors import UserError
from ovseg_jax.torch.clip_resnet import ClipResNet
from ovseg_jax.torch.convnext import ConvNeXt
from ovseg_jax.torch.efficientnet import EfficientNet
from ovseg_jax.torch.eva import Eva
from ovseg_jax.torch.layers import Conv, GroupNorm, LayerNorm, resize
from ovseg_jax.torch.resnet import ResNet
from ovseg_jax.torch.small import SmallBackbone
from ovseg_jax.torch.swin import Swin
from ovseg_jax.torch.tap_pyramid import TapPyramid
from ovseg_jax.torch.tower_pyramid import TowerPyramid
from ovseg_jax.torch.vit import ViT

KINDS: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        *(SmallBackbone, ResNet, EfficientNet, ClipResNet, ConvNeXt, Swin),
        *(TowerPyramid, TapPyramid, ViT, Eva),
    )
}


def build_backbone(described: Mapping[str, Any]) -> nn.Module:
    """Creates a backbone from its description: `kind`, the name of its class, and its arguments.

    Raises:
      UserError: the kind is unknown.
    """
    options = {
        k: build_backbone(v) if isinstance(v, dict) and "kind" in v else v for k, v in described.items()
    }
    kind = options.pop("kind", None)
    if kind not in KINDS:
        raise UserError(f"the kind {kind!r} of the backbone is not one of {', '.join(KINDS)}")
    return KINDS[kind](**options)


class FusedPyramid(nn.Module):
    """An FPN whose levels are upsampled to the finest and summed."""

    def __init__(self, channels: Mapping[str, int], width: int, output_conv: bool = True):
        super().__init__()
        self.levels, self.output_conv = sorted(channels), output_conv
        for name in self.levels:
            self.add_module(f"lateral_{name}", Conv(channels[name], width, 1))
            if output_conv:
                self.add_module(f"output_{name}", Conv(width, width, 3))

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Fuses a backbone's maps to one of [b width h w]."""
        size = features[self.levels[0]].shape[2:]
        top: Tensor | None = None
        fused: Tensor | None = None
        for name in reversed(self.levels):
            x = self.get_submodule(f"lateral_{name}")(features[name])
            top = x if top is None else x + resize(top, x.shape[2:], "nearest")
            out = self.get_submodule(f"output_{name}")(top) if self.output_conv else top
            out = resize(out, size)
            fused = out if fused is None else fused + out
        assert fused is not None
        return fused


class ConvHead(nn.Module):
    """A head of a dense layer, then 3x3 convolutions with group norm and ReLU before each."""

    def __init__(self, width: int, convs: int, features: int):
        super().__init__()
        self.convs = convs
        self.fc = nn.Linear(width, width)
        for i in range(convs):
            self.add_module(f"norm_{i}", GroupNorm(width))
            self.add_module(f"conv_{i}", Conv(width, features if i == convs - 1 else width, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b width h w] to [b features h w]."""
        x = self.fc(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for i in range(self.convs):
            x = self.get_submodule(f"conv_{i}")(F.relu(self.get_submodule(f"norm_{i}")(x)))
        return x


class RegionDecoder(nn.Module):
    """A decoder of blocks of cross-attention from queries to pixels and an MLP; pre-norm, residual."""

    def __init__(self, num_queries: int, width: int, layers: int = 3, heads: int = 1, mlp_ratio: int = 2):
        super().__init__()
        self.layers, self.heads = layers, heads
        self.image_norm, self.out_norm = LayerNorm(width), LayerNorm(width)
        self.queries = nn.Parameter(torch.empty(num_queries, width).normal_(std=0.5))
        self.mask_query = nn.Linear(width, width)
        for t in range(layers):
            for name in ("query_norm", "mlp_norm"):
                self.add_module(f"{name}_{t}", LayerNorm(width))
            for name in ("query", "key", "value", "out"):
                self.add_module(f"{name}_{t}", nn.Linear(width, width))
            self.add_module(f"mlp_in_{t}", nn.Linear(width, mlp_ratio * width))
            self.add_module(f"mlp_out_{t}", nn.Linear(mlp_ratio * width, width))

    def forward(self, features: Tensor, valid: Tensor) -> Tensor:
        """Computes queries [b n d] from pixels [b p d], of which `valid` [b p] are not padding."""
        layer = self.get_submodule
        keys = self.image_norm(features)
        q = self.queries.to(features.dtype).expand(features.shape[0], -1, -1)
        split = lambda x: x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        for t in range(self.layers):
            x = layer(f"query_norm_{t}")(q)
            x = F.scaled_dot_product_attention(
                split(layer(f"query_{t}")(x)),
                split(layer(f"key_{t}")(keys)),
                split(layer(f"value_{t}")(keys)),
                attn_mask=valid[:, None, None, :],
            )
            q = q + layer(f"out_{t}")(x.transpose(1, 2).flatten(2))
            x = F.relu(layer(f"mlp_in_{t}")(layer(f"mlp_norm_{t}")(q)))
            q = q + layer(f"mlp_out_{t}")(x)
        return self.mask_query(self.out_norm(q))


class Normalise(nn.Module):
    """Normalisation of images by the mean and standard deviation of pixels in [0, 1]; padding becomes zero."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).reshape(3, 1, 1), persistent=False)

    def forward(self, image: Tensor, image_size: Tensor) -> Tensor:
        """Maps uint8 images [b 3 s t] that fill `image_size` [b 2] of their canvas."""
        x = (image.float() / 255 - self.mean) / self.std
        x = torch.where(inside(image_size, image.shape[2:])[:, None], x, 0)
        return x.contiguous(memory_format=torch.channels_last)


class OpenSegFeatures(NamedTuple):
    """The outputs of the network.

    Attributes:
      mask_logits: [B N h w], None without a mask decoder.
      region_sum: [B N D], F_z summed under each mask within the image, None without a mask decoder.
      pixel_embed: [B D h w], F_z.
    """

    mask_logits: Tensor | None
    region_sum: Tensor | None
    pixel_embed: Tensor


class OpenSegNet(nn.Module):
    """The image network.

    Args:
      model: the Flax module's fields, as `pretrained.to_torch.describe` returns them.
    """

    def __init__(self, model: Mapping[str, Any]):
        super().__init__()
        backbone: Any = build_backbone(model["backbone"])
        self.backbone = backbone
        self.mask_scale, self.detach_masks = model["mask_scale"], model["detach_masks"]
        self.num_queries, width = model["num_queries"], model["width"]
        self.normalise = Normalise(model["mean"], model["std"])
        self.pyramid = FusedPyramid(backbone.channels, width, model["pyramid_output_conv"])
        self.head_z = ConvHead(width, model["head_convs"], model["embed_dim"])
        if self.num_queries:
            self.head_s = ConvHead(width, model["head_convs"], width)
            self.position = nn.Parameter(torch.empty(width, *2 * (model["position_grid"],)).normal_(std=0.1))
            self.decoder = RegionDecoder(
                self.num_queries, width, model["decoder_layers"], model["decoder_heads"]
            )
            bias = model["mask_bias"]
            self.mask_bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))

    def forward(self, image: Tensor, image_size: Tensor) -> OpenSegFeatures:
        """Encodes uint8 images [b 3 s t] that fill `image_size` [b 2] (height, width) of their canvas."""
        fused = self.pyramid(self.backbone(self.normalise(image, image_size)))
        f_z = self.head_z(fused).float()
        if not self.num_queries:
            return OpenSegFeatures(None, None, f_z)

        f_s = self.head_s(fused)
        f_s = f_s + resize(self.position[None], f_s.shape[2:])
        h, w = f_s.shape[2:]
        pixels = f_s.flatten(2).transpose(1, 2)
        valid = inside(image_size, (h, w), (image.shape[2] / h, image.shape[3] / w)).flatten(1)
        queries = self.decoder(pixels, valid)
        logits = (queries @ pixels.transpose(1, 2)).float() * self.mask_scale
        if self.mask_bias is not None:
            logits = logits + self.mask_bias
        masks = torch.sigmoid(logits) * valid[:, None]
        if self.detach_masks:
            masks = masks.detach()
        region_sum = masks @ f_z.flatten(2).transpose(1, 2)
        return OpenSegFeatures(logits.unflatten(2, (h, w)), region_sum, f_z)


def inside(image_size: Tensor, shape: Sequence[int], stride: Sequence[float] = (1, 1)) -> Tensor:
    """Tells which cells [b h w] of a grid, each `stride` pixels of the canvas, begin within the image."""
    rows, columns = (
        torch.arange(n, device=image_size.device)[None] * step < image_size[:, i : i + 1]
        for i, (n, step) in enumerate(zip(shape, stride, strict=True))
    )
    return rows[:, :, None] & columns[:, None, :]
