"""Mask2Former for inference, see `ovseg_jax/models/mask2former.py`."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovseg_jax.torch.deformable import DeformablePixelDecoder, cell_counts
from ovseg_jax.torch.layers import resize_within
from ovseg_jax.torch.maskformer import DecoderLayer, cells_inside, sine_positions
from ovseg_jax.torch.openseg import Normalise, build_backbone


class Mask2FormerOutput(NamedTuple):
    """The outputs of the last layer.

    Attributes:
      queries: [B N D], normalised.
      embeddings: [B N C], the embeddings of the masks.
      mask_logits: [B N h w].
      pixels: [B C h w], the mask features.
    """

    queries: Tensor
    embeddings: Tensor
    mask_logits: Tensor
    pixels: Tensor


class MaskedDecoder(nn.Module):
    """Mask2Former's decoder for maps of these levels, coarsest first; `model` are the fields of `Mask2FormerHead`."""

    def __init__(self, levels: Sequence[str], model: Mapping[str, Any]):
        super().__init__()
        self.levels, self.layers, width = tuple(levels), model["layers"], model["width"]
        learned = lambda rows: nn.Parameter(torch.empty(rows, width).normal_())
        self.level_embedding = learned(len(self.levels))
        self.query_features, self.query_positions = (learned(model["num_queries"]) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.mask_mlp_0, self.mask_mlp_1 = nn.Linear(width, width), nn.Linear(width, width)
        self.mask_mlp_2 = nn.Linear(width, model["mask_dim"])
        for i in range(self.layers):
            layer = DecoderLayer(width, model["heads"], model["ffn"], cross_first=True)
            self.add_module(f"layer_{i}", layer)

    def forward(self, pixels: Tensor, maps: Mapping[str, Tensor], image_size: Tensor) -> Mask2FormerOutput:
        """Predicts masks from the outputs of the pixel decoder."""
        finest = f"c{int(self.levels[-1][1:]) - 1}"
        whole = cell_counts(image_size, pixels, finest)
        keys, values, valid, small = [], [], [], []
        for embedding, level in zip(self.level_embedding, self.levels, strict=True):
            x = maps[level]
            inside = cells_inside(image_size, x, level)
            values.append(x.flatten(2).transpose(1, 2) + embedding)
            position = sine_positions(inside, x.shape[1]).to(x.dtype)
            keys.append(values[-1] + position.flatten(1, 2))
            valid.append(inside.flatten(1)[:, None])
            # Logits are linear in the pixels, so that masks are resized with the pixels, once for all layers.
            count = cell_counts(image_size, x, level)
            small.append(resize_within(pixels.float(), x.shape[2:], whole, count).flatten(2))
        x, position = (y.expand(pixels.shape[0], -1, -1) for y in (self.query_features, self.query_positions))
        queries, embeddings = self._embed(x)
        for i in range(self.layers):
            at = i % len(self.levels)
            open_ = (embeddings.float() @ small[at] >= 0) & valid[at]
            open_ = open_ | (
                valid[at] & ~open_.any(-1, keepdim=True)
            )  # onnxruntime has no `where` of booleans
            x = self.get_submodule(f"layer_{i}")(x, position, keys[at], values[at], open_)
            queries, embeddings = self._embed(x)
        logits = torch.einsum("bnc,bchw->bnhw", embeddings, pixels).float()
        return Mask2FormerOutput(queries, embeddings, logits, pixels)

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the normalised queries, and the embeddings of their masks."""
        x = self.norm(x)
        return x, self.mask_mlp_2(F.relu(self.mask_mlp_1(F.relu(self.mask_mlp_0(x)))))


class Mask2FormerHead(nn.Module):
    """Pixel decoder and decoder, for the maps of any backbone with these `channels`."""

    def __init__(self, channels: Mapping[str, int], model: Mapping[str, Any]):
        super().__init__()
        sizes = ("width", "mask_dim", "encoder_layers", "heads", "encoder_points", "encoder_ffn")
        self.pixel_decoder = DeformablePixelDecoder(channels, *(model[name] for name in sizes))
        self.decoder = MaskedDecoder(self.pixel_decoder.levels, model)

    def forward(self, features: Mapping[str, Tensor], image_size: Tensor) -> Mask2FormerOutput:
        """Predicts masks from a backbone's maps."""
        return self.decoder(*self.pixel_decoder(features, image_size), image_size)


class Mask2FormerNet(nn.Module):
    """The network without its classifier; `model` are the Flax module's fields."""

    def __init__(self, model: Mapping[str, Any]):
        super().__init__()
        backbone: Any = build_backbone(model["backbone"])
        self.backbone, self.width = backbone, model["head"]["width"]
        self.normalise = Normalise(model["mean"], model["std"])
        self.head = Mask2FormerHead(backbone.channels, model["head"])

    def forward(self, image: Tensor, image_size: Tensor) -> tuple[Tensor, Tensor]:
        """Returns queries [b n d] and mask logits [b n h w] of uint8 images [b 3 s t]."""
        features = self.backbone(self.normalise(image, image_size))
        out = self.head({level: features[level] for level in self.backbone.channels}, image_size)
        return out.queries, out.mask_logits
