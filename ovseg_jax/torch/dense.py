"""CLIP and similar towers without training as a segmenter, see `ovseg_jax/methods/clip_dense.py`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ovseg_jax.errors import UserError
from ovseg_jax.torch.eva import Eva
from ovseg_jax.torch.openseg import Normalise, OpenSegFeatures, build_backbone, inside
from ovseg_jax.torch.transformer import LAST
from ovseg_jax.torch.vit import ViT


class ClipDenseNet(nn.Module):
    """An image tower and the features of its patches in the space of the texts.

    Args:
      model: `tower` as `pretrained.to_torch.describe` returns it, `mean` and `std` of its pixels, and `last`, how the
        patches attend in the last block of a ViT or EVA, a member of `LAST`.

    Raises:
      UserError: the tower or `last` is unknown.
    """

    def __init__(self, model: Mapping[str, Any]):
        super().__init__()
        self.tower: Any = build_backbone(model["tower"])
        self.last, self.normalise = model["last"], Normalise(model["mean"], model["std"])
        if self.last not in LAST:
            raise UserError(f"last={self.last!r} is not one of {', '.join(LAST)}")

    def forward(self, image: Tensor, image_size: Tensor) -> OpenSegFeatures:
        """Embeds the patches of uint8 images [b 3 s t] that fill `image_size` [b 2]; there are no masks."""
        x, tower = self.normalise(image, image_size), self.tower
        if not isinstance(tower, ViT | Eva):
            return OpenSegFeatures(None, None, tower(x)["dense"])
        grid = tuple(side // tower.patch for side in image.shape[2:])
        shown = inside(image_size, grid, (float(tower.patch),) * 2)
        mapped = tower.MAPHead_0 if isinstance(tower, ViT) else None
        tokens = tower(x, inside=shown, last="" if mapped is not None else self.last).tokens
        features = tokens.permute(0, 2, 3, 1)
        if mapped is not None:  # the output of the pooling for each patch alone
            features = mapped(features.flatten(0, 2)[:, None]).unflatten(0, features.shape[:3])
        elif tower.head is not None:
            features = tower.head(features)
        return OpenSegFeatures(None, None, features.permute(0, 3, 1, 2).float())
