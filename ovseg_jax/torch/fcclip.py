"""FC-CLIP for inference, see `ovseg_jax/models/fcclip.py` and `ovseg_jax/methods/fcclip.py`."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovseg_jax.errors import UserError
from ovseg_jax.torch.convnext import ConvNeXt
from ovseg_jax.torch.deformable import cell_counts
from ovseg_jax.torch.eva import Eva
from ovseg_jax.torch.layers import class_scores, resize_within, unit
from ovseg_jax.torch.mask2former import Mask2FormerHead, Mask2FormerOutput
from ovseg_jax.torch.maskformer import cells_inside
from ovseg_jax.torch.openseg import Normalise
from ovseg_jax.torch.tower_pyramid import LEVELS, TowerPyramid
from ovseg_jax.torch.vit import ViT

MAX_SCALE = 100.0
EPSILON = 1e-8  # added to probabilities in the published code


class Rule(NamedTuple):
    """The combination of both spaces: CLIP's weight for seen classes and for others, and OVRCOAT's `trust`."""

    seen: float
    unseen: float
    trust: float


class FCClipOutput(NamedTuple):
    """The outputs of the network.

    Attributes:
      mask_logits: [B N h w].
      head: [B N D], the trained head's embeddings of masks, as unit vectors times the factor from cosines to logits.
      clip: [B N D], the same by CLIP's features under the masks.
      void: [B N], the logit of "no object" beside those of `head`.
      pixel_embed: [B D h w], CLIP's features.
    """

    mask_logits: Tensor
    head: Tensor
    clip: Tensor
    void: Tensor
    pixel_embed: Tensor


def pool_under(masks: Tensor, features: Tensor) -> Tensor:
    """Averages features [b c h w] under masks [b n h w], zero for an empty mask."""
    total = masks.to(features.dtype).flatten(2) @ features.flatten(2).transpose(1, 2)
    return total / (masks.sum((2, 3))[..., None] + 1e-8)


class MaskClassifier(nn.Module):
    """The head that was trained on the masks' classes."""

    def __init__(self, width: int, mask_dim: int, dim: int):
        super().__init__()
        self.pooled_norm, self.pooled = nn.LayerNorm(mask_dim), nn.Linear(mask_dim, width)
        self.mlp_0, self.mlp_1 = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp_2 = nn.Linear(width, dim)
        self.void, self.logit_scale = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(()))

    def forward(self, out: Mask2FormerOutput, image_size: Tensor) -> tuple[Tensor, Tensor]:
        """Returns `head` and `void` of `FCClipOutput`."""
        valid = cells_inside(image_size, out.pixels, "c2")[:, None]
        pooled = pool_under((out.mask_logits > 0) & valid, out.pixels)
        x = self.pooled(self.pooled_norm(pooled)) + out.queries
        x = F.relu(self.mlp_1(F.relu(self.mlp_0(x))))
        regions = self.logit_scale.exp().clamp(max=MAX_SCALE) * unit(self.mlp_2(x))
        return regions, regions @ unit(self.void)


class TrunkOutput(NamedTuple):
    """The output of a trunk.

    Attributes:
      maps: "c2" to at most "c5", for masks.
      last: [b c h w], the map under which masks are pooled.
      dense: [b d h w], features of its cells in the space of texts.
    """

    maps: dict[str, Tensor]
    last: Tensor
    dense: Tensor


class ConvNeXtTrunk(ConvNeXt):
    """CLIP's ConvNeXt, see `methods.trunks`; other trunks have the same attributes and methods.

    Attributes:
      channels: the widths of the maps by level.
      cell: pixels of a cell of the coarsest map.
      level: the level of the map under which masks are pooled.
    """

    def __init__(self, **fields: Any):
        super().__init__(**fields)
        self.level = max(self.channels)
        self.cell = 2 ** int(self.level[1:])

    def forward(self, x: Tensor) -> TrunkOutput:  # type: ignore[override]
        """Computes the maps of normalised images [b 3 h w]."""
        out = super().forward(x)
        maps = {level: out[level] for level in self.channels}
        return TrunkOutput(maps, maps[self.level], out["dense"])

    def embed(self, pooled: Tensor) -> Tensor:
        """Maps pooled features [... c] to unit vectors in the space of texts."""
        return unit(self.head(pooled))


class TowerTrunk(TowerPyramid):
    """A ViT or EVA of CLIP, with or without adapters, see `methods.trunks`.

    Args:
      make: creates the tower.
      again: whether a second pass, without adapters, gives CLIP's features of masks.
      **fields: those of the tower.
    """

    cell = 32

    def __init__(self, make: Callable[..., ViT | Eva], again: bool = False, **fields: Any):
        super().__init__(make(**fields))
        self.again, self.level = again, f"c{self.own}"

    def forward(self, x: Tensor) -> TrunkOutput:  # type: ignore[override]
        """Computes the maps of normalised images [b 3 h w]."""
        tokens = self.tower(x).tokens
        maps = {f"c{level}": self.at(tokens, level) for level in LEVELS}
        if self.again:
            tokens = self.tower(x, adapted=False).tokens
        head = self.tower.head
        dense = tokens if head is None else head(tokens.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return TrunkOutput(maps, dense, dense)

    def embed(self, pooled: Tensor) -> Tensor:
        """Maps pooled features [... d] to unit vectors in the space of texts."""
        return unit(pooled.float())


TRUNKS: dict[str, Callable[..., Any]] = {
    "ConvNeXt": ConvNeXtTrunk,
    "ViT": partial(TowerTrunk, ViT),
    "Eva": partial(TowerTrunk, Eva),
}


class FCClipNet(nn.Module):
    """The trunk, Mask2Former's masks and both embeddings of them.

    Args:
      model: `trunk`, `masks` and `classifier` as `pretrained.to_torch.describe` returns them, `mean` and `std` of the
        trunk's pixels, and `rule`, the fields of `Rule`.

    Raises:
      UserError: the trunk is none of `TRUNKS`.
    """

    def __init__(self, model: Mapping[str, Any]):
        super().__init__()
        fields = dict(model["trunk"])
        kind, masks = fields.pop("kind", None), model["masks"]
        if kind not in TRUNKS:
            raise UserError(f"the kind {kind!r} of FC-CLIP's trunk is not one of {', '.join(TRUNKS)}")
        self.trunk = TRUNKS[kind](**fields)
        self.normalise, self.rule = Normalise(model["mean"], model["std"]), Rule(**model["rule"])
        self.masks = Mask2FormerHead(self.trunk.channels, masks)
        self.classifier = MaskClassifier(masks["width"], masks["mask_dim"], model["classifier"]["dim"])
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def forward(self, image: Tensor, image_size: Tensor) -> FCClipOutput:
        """Segments uint8 images [b 3 s t] that fill `image_size` [b 2] (height, width) of their canvas."""
        seen = self.trunk(self.normalise(image, image_size))
        # In the published code, padding to whole cells of the coarsest map is part of the image.
        cell = self.trunk.cell
        cells = torch.div(image_size + cell - 1, cell, rounding_mode="floor")
        size = torch.stack([(cells[:, i] * cell).clamp(max=image.shape[2 + i]) for i in range(2)], 1)
        out = self.masks(seen.maps, size)
        head, void = self.classifier(out, size)
        pooled = pool_under(self._last_masks(out, seen.last, size), seen.last)
        clip = self.logit_scale.exp().clamp(max=MAX_SCALE) * self.trunk.embed(pooled)
        return FCClipOutput(out.mask_logits, head, clip, void, seen.dense)

    def _last_masks(self, out: Mask2FormerOutput, last: Tensor, size: Tensor) -> Tensor:
        """Returns the masks [b n h w] on the cells of the trunk's last map."""
        level, pixels = self.trunk.level, out.pixels.float()
        whole, cells = cell_counts(size, pixels, "c2"), cell_counts(size, last, level)
        # Logits are linear in the pixels, so that the pixels can be resized in their place.
        resized = resize_within(pixels, last.shape[2:], whole, cells)
        small = torch.einsum("bnc,bchw->bnhw", out.embeddings.float(), resized)
        return (small > 0) & cells_inside(size, last, level)[:, None]


def score_regions(
    out: FCClipOutput, text: Tensor, owner: Tensor, seen: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Computes the probability [t n] of each name's class, and that [n] of none, for the first image's masks.

    Args:
      out: the outputs of the network.
      text: [t d], unit vectors of the names.
      owner: [t], the class of each name.
      seen: [t], whether a name is one of the training data's.
      rule: see `methods.fcclip`.
    """
    own, q = (class_scores(text @ space[0].T, owner) for space in (out.head, out.clip))
    count, q = len(own), q.log_softmax(0)
    known = torch.zeros(count, dtype=torch.bool, device=seen.device)
    known[owner[seen]] = True
    w = torch.where(known, rule.seen, rule.unseen)[:, None]
    nothing = torch.cat([own, out.void[:1]]).softmax(0)[-1]
    nothing = nothing * (1 - rule.trust * q.exp().amax(0))
    share = ((1 - w) * own.log_softmax(0) + w * q).softmax(0) * (1 - nothing)
    whole = 1 + (count + 1) * EPSILON
    return ((share + EPSILON) / whole)[owner], (nothing + EPSILON) / whole
